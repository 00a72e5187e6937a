"""Directions in parameter space and random probes on outputs, reproducible from a seed.

Nothing here uses or changes torch's global random state. Values are drawn in float32 on the device where they are
needed and then cast, so a float64 model sees the directions of its float32 twin; CPU and CUDA draw different numbers
from the same seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from alignreg import checks

Distribution = Literal["gaussian", "rademacher"]
_DISTRIBUTIONS = ("gaussian", "rademacher")


class Directions(Protocol):
    """m directions in parameter space, drawn block by block."""

    @property
    def m(self) -> int:
        """Number of directions."""

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` for the parameter ``name``, ``(stop - start, *like.shape)``."""


@final
class GivenDirections:
    """Directions given as tensors."""

    def __init__(self, directions: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        if directions.keys() != shapes.keys():
            raise ValueError(
                f"directions: expected one tensor for each of {list(shapes)}, "
                f"got {sorted(directions.keys() - shapes.keys())} too many and "
                f"{sorted(shapes.keys() - directions.keys())} missing."
            )
        for name, value in directions.items():
            label = f"directions[{name!r}]"
            checks.values(label, value)
        first = next(iter(directions.values()))
        self.m = len(first) if first.ndim else 0
        for name, shape in shapes.items():
            if directions[name].shape != (self.m, *shape):
                raise ValueError(
                    f"directions: expected {name!r} of shape {(self.m, *shape)}, got {tuple(directions[name].shape)}."
                )
        self._directions = directions

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """See :class:`Directions`."""
        return self._directions[name][start:stop].to(like)


@final
@dataclass(frozen=True)
class RandomDirections:
    """m i.i.d. random directions S with E[SSᵀ] = m·I, drawn block by block and never stored.

    The numbers of a direction depend on (seed, parameter name, direction index) alone: chunk size, parameter
    filters, order and sharding never change them.

    Args:
        m: number of directions.
        seed: any integer.
        distribution: of the entries, with mean 0 and variance 1.
    """

    m: int
    seed: int
    distribution: Distribution = "gaussian"
    block_size = 1
    """How many directions in a row depend on each other."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", checks.count("m", self.m))
        object.__setattr__(self, "seed", checks.seed(self.seed))
        checks.choice("distribution", self.distribution, _DISTRIBUTIONS)

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` for the parameter ``name``.

        Args:
            name: the parameter's name.
            like: tensor whose shape, dtype and device the directions take.
            start: first direction.
            stop: one past the last.

        Returns:
            ``(stop - start, *like.shape)``.
        """
        start, stop = _span(start, stop, self.m)
        checks.real("like", like)
        result = torch.empty(stop - start, *like.shape, dtype=torch.float32, device=like.device)
        for row, index in zip(result, range(start, stop), strict=True):
            _fill(row, self.distribution, f"{self.seed}/{name}/{index}")
        return result.to(like.dtype)


@final
@dataclass(frozen=True)
class FactoredDirections:
    """copies·rank² random directions that are products of two vectors, one for each side of a weight.

    A weight counts as a matrix, its first axis against the others. Direction (r, u, v) is p_ru q_rvᵀ there, with
    standard normal p_ru and q_rv, drawn for each parameter; so E[ssᵀ] = I as for any sketch. The rank² directions of a
    copy are not independent of each other, those of different copies are: statistics of two directions are taken from
    different copies (``block=block_size`` in :mod:`.estimators`).

    Args:
        copies: r of them, ≥ 1.
        rank: how many u, and how many v.
        seed: any integer.
    """

    copies: int
    rank: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "copies", checks.count("copies", self.copies))
        object.__setattr__(self, "rank", checks.count("rank", self.rank))
        object.__setattr__(self, "seed", checks.seed(self.seed))

    @property
    def m(self) -> int:
        """Number of directions."""
        return self.copies * self.block_size

    @property
    def block_size(self) -> int:
        """How many directions in a row depend on each other."""
        return self.rank**2

    def factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return p ``(copies, rank, rows)`` and q ``(copies, rank, columns)`` for the parameter ``name``.

        Args:
            name: the parameter's name.
            like: tensor whose shape, dtype and device they take.
        """
        checks.real("like", like)
        rows = like.shape[0] if like.ndim else 1
        found = []
        for side, size in (("rows", rows), ("columns", like.numel() // max(1, rows))):
            values = torch.empty(self.copies, self.rank, size, dtype=torch.float32, device=like.device)
            for copy, value in enumerate(values):
                _fill(value, "gaussian", f"factors/{self.seed}/{name}/{side}/{copy}")
            found.append(values.to(like.dtype))
        return found[0], found[1]

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` for the parameter ``name``, ``(stop - start, *like.shape)``."""
        start, stop = _span(start, stop, self.m)
        left, right = (factor.flatten(0, 1) for factor in self.factors(name, like))
        index = torch.arange(start, stop, device=like.device)
        copy, inside = index // self.block_size, index % self.block_size
        u, v = copy * self.rank + inside // self.rank, copy * self.rank + inside % self.rank
        return (left[u][:, :, None] * right[v][:, None]).reshape(stop - start, *like.shape)


def factored(copies: int, rank: int, seed: int) -> FactoredDirections:
    """Return copies·rank² lazy directions along which features come from the factors of layers.

    Args:
        copies: independent of each other.
        rank: of each side.
        seed: any integer.

    Raises:
        ValueError: if ``copies`` or ``rank`` is no positive integer, or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> S = sketches.factored(copies=2, rank=3, seed=0)
        >>> S.m, torch.linalg.matrix_rank(S.block("w", torch.zeros(4, 5), 7, 8)[0])
        (18, tensor(1))
    """
    return FactoredDirections(copies, rank, seed)


def gaussian(m: int, seed: int) -> RandomDirections:
    """Return m lazy directions with independent standard normal entries.

    Args:
        m: number of directions.
        seed: any integer.

    Raises:
        ValueError: if ``m`` is no positive integer, or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> S = sketches.gaussian(8, seed=0)
        >>> w = torch.zeros(3, 2)
        >>> whole, part = S.block("w", w, 0, 8), S.block("w", w, 5, 8)
        >>> whole.shape, torch.equal(whole[5:], part)
        (torch.Size([8, 3, 2]), True)
    """
    return RandomDirections(m, seed, "gaussian")


def rademacher(m: int, seed: int) -> RandomDirections:
    """Return m lazy directions with independent random signs as entries.

    Args:
        m: number of directions.
        seed: any integer.

    Raises:
        ValueError: if ``m`` is no positive integer, or ``seed`` no integer.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> sketches.rademacher(2, seed=0).block("w", torch.zeros(100), 0, 2).abs().unique()
        tensor([1.])
    """
    return RandomDirections(m, seed, "rademacher")


def probes(
    m: int,
    n: int,
    c: int,
    *,
    seed: int,
    step: int = 0,
    offset: int = 0,
    distribution: Distribution = "gaussian",
    like: Tensor | None = None,
) -> Tensor:
    """Return rows ``offset:offset + n`` of one global draw of m random probes Ω on the outputs.

    The numbers of an example depend on (seed, step, its global index) alone. Ranks that take their own rows, by an
    ``offset`` of the examples on the ranks before, therefore hold one global probe; the same probe on two
    ranks would count the blocks of the kernel between them as if they were equal.

    Args:
        m: number of probes.
        n: number of examples.
        c: number of outputs.
        seed: any integer.
        step: redraws the probes when it changes.
        offset: global index of the first example.
        distribution: of the entries, with mean 0 and variance 1.
        like: tensor whose dtype and device the probes take; float32 on the CPU by default.

    Returns:
        ``(m, n, c)``.

    Raises:
        TypeError: if ``like`` is no real tensor.
        ValueError: if a number is no integer, or out of range, or the distribution unknown.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> whole = sketches.probes(4, 6, 2, seed=0)
        >>> torch.equal(whole[:, 4:], sketches.probes(4, 2, 2, seed=0, offset=4))
        True
    """
    m, n, c = checks.count("m", m), checks.count("n", n, 0), checks.count("c", c)
    seed, step, offset = checks.seed(seed), checks.integer("step", step), checks.integer("offset", offset)
    checks.choice("distribution", distribution, _DISTRIBUTIONS)
    like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
    checks.real("like", like)
    rows = torch.empty(n, m, c, dtype=torch.float32, device=like.device)
    for row, index in zip(rows, range(offset, offset + n), strict=True):
        _fill(row, distribution, f"{seed}/{step}/{index}")
    return rows.transpose(0, 1).to(like.dtype).contiguous()


def subset(n: int, size: int, *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Return ``size`` of the indices below ``n``, drawn uniformly without replacement.

    Args:
        n: number of examples.
        size: how many of them, at most n.
        seed: any integer.
        step: redraws when it changes.
        stream: redraws when it changes, for ranks that are to draw different subsets.

    Raises:
        ValueError: if an argument is no integer, or out of range.

    Example:
        >>> from alignreg import sketches
        >>> sorted(sketches.subset(4, 4, seed=0).tolist())
        [0, 1, 2, 3]
    """
    n, size = checks.count("n", n, 0), checks.count("size", size, 0)
    seed, step, stream = checks.seed(seed), checks.integer("step", step), checks.integer("stream", stream)
    if size > n:
        raise ValueError(f"size: expected at most the {n} examples, got {size}.")
    generator = _generator(f"subset/{seed}/{step}/{stream}", torch.device("cpu"))
    return torch.randperm(n, generator=generator, device="cpu")[:size]


def count_sketch(vectors: Mapping[str, Tensor], size: int, *, seed: int) -> Tensor:
    """Return hashes of vectors of parameter space: linear, and ‖hash‖² has the mean ‖vector‖².

    Entries of one parameter go in runs of ``size``; each run is turned round by a random shift and given random signs
    before it is added. Entries with independent signs add their squares, whichever meet; that two of them meet has a
    probability of 1/``size`` at most, so that the relative standard deviation of ‖hash‖² is at most √(2/size). (After
    Charikar et al., "Finding frequent items in data streams", 2002.)

    Args:
        vectors: r of them, by parameter name, ``(r, *shape)``.
        size: of a hash.
        seed: any integer: hashes of equal seeds add.

    Returns:
        ``(r, size)``, in float64.

    Raises:
        TypeError: if the vectors are no real tensors by name.
        ValueError: if ``size`` is no positive integer or ``seed`` no integer, or the vectors are none, not equally many
            of each parameter, or not finite.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> hashed = sketches.count_sketch({"w": torch.tensor([[3.0, 4.0]])}, 1000, seed=0)
        >>> hashed.shape, hashed.square().sum()
        (torch.Size([1, 1000]), tensor(25., dtype=torch.float64))
    """
    size, seed = checks.count("size", size), checks.seed(seed)
    vectors = checks.by_name("vectors", vectors)
    first = next(iter(vectors.values()))
    total = torch.zeros(len(first), size, dtype=torch.float64, device=first.device)
    for name, vector in vectors.items():
        for index, run in enumerate(torch.split(vector.reshape(len(vector), math.prod(vector.shape[1:])), size, dim=1)):
            key, length = f"count/{seed}/{name}/{index}", run.shape[1]
            signs = torch.empty(length, dtype=torch.float32, device=run.device)
            _fill(signs, "rademacher", key)
            start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % size
            signed = (run * signs.to(run.dtype)).to(total)
            before = min(length, size - start)
            total[:, start : start + before] += signed[:, :before]
            total[:, : length - before] += signed[:, before:]
    return checks.finite("vectors", total)


def _span(start: int, stop: int, m: int) -> tuple[int, int]:
    start, stop = checks.count("start", start, 0), checks.count("stop", stop, 0)
    if not start <= stop <= m:
        raise ValueError(f"start, stop: expected a part of the {m} directions, got {start} to {stop}.")
    return start, stop


def _fill(values: Tensor, distribution: Distribution, key: str) -> None:
    generator = _generator(f"{distribution}/{key}", values.device)
    if distribution == "gaussian":
        values.normal_(generator=generator)
    else:
        values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _generator(key: str, device: torch.device) -> torch.Generator:
    # A hash, because neighboring seeds may give neighboring streams. torch's CPU generator takes 32 bits of it: two
    # blocks in some billions of pairs coincide, which is far below what an estimate can show.
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
