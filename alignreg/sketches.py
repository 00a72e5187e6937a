"""Random directions in parameter space, random probes on outputs, and other draws that a seed reproduces.

Nothing here uses or changes torch's global random state. A seed is any integer; a wrong number is a ``ValueError``.
Values are drawn in float32 on the device where they are needed and then cast, so a float64 model sees the directions of
its float32 twin; CPU and CUDA draw different numbers from the same seed.
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
    """The interface of m directions in parameter space, which are drawn in blocks."""

    @property
    def m(self) -> int:
        """The number of directions."""

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` for the parameter ``name``.

        Args:
            name: the name of the parameter.
            like: a tensor with the shape, dtype and device of the directions.
            start: the first direction.
            stop: one past the last direction.

        Returns:
            ``(stop - start, *like.shape)``.
        """


@final
class GivenDirections:
    """Directions given as tensors ``(m, *shape)`` by parameter name."""

    def __init__(self, directions: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        if directions.keys() != shapes.keys():
            raise ValueError(
                f"directions: expected one tensor for each of {list(shapes)}, got unknown names "
                f"{sorted(directions.keys() - shapes.keys())} and none for {sorted(shapes.keys() - directions.keys())}."
            )
        first, *_ = (checks.values(f"directions[{name!r}]", value) for name, value in directions.items())
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
    """m i.i.d. random directions S with E[SSᵀ] = m·I, drawn in blocks and never stored.

    The numbers of a direction depend only on (seed, parameter name, direction index); chunk size, parameter filters,
    order and sharding never change them.

    Args:
        m: the number of directions.
        seed: any integer.
        distribution: the distribution of the entries, ``"gaussian"`` or ``"rademacher"``; mean 0, variance 1.
    """

    m: int
    seed: int
    distribution: Distribution = "gaussian"
    block_size = 1
    """The number of consecutive directions that depend on each other."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", checks.count("m", self.m))
        object.__setattr__(self, "seed", checks.seed(self.seed))
        checks.choice("distribution", self.distribution, _DISTRIBUTIONS)

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` as :meth:`Directions.block` does."""
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

    A weight counts as a matrix of its first axis against the others. Direction (r, u, v) of it is p_ru q_rvᵀ, with
    standard normal p_ru and q_rv drawn for each parameter, so E[ssᵀ] = I as for any sketch. The rank² directions of a
    copy depend on each other, and those of different copies are independent: statistics of two directions must use
    different copies (``block=block_size`` in :mod:`.estimators`).

    Args:
        copies: the number of copies r, at least 1.
        rank: the number of vectors u, and of vectors v, in a copy.
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
        """The number of directions."""
        return self.copies * self.block_size

    @property
    def block_size(self) -> int:
        """The number of consecutive directions that depend on each other."""
        return self.rank**2

    def factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return p ``(copies, rank, rows)`` and q ``(copies, rank, columns)`` for a parameter like ``like``."""
        checks.real("like", like)
        rows = like.shape[0] if like.ndim else 1
        factors = []
        for side, size in (("rows", rows), ("columns", like.numel() // max(1, rows))):
            values = torch.empty(self.copies, self.rank, size, dtype=torch.float32, device=like.device)
            for copy, value in enumerate(values):
                _fill(value, "gaussian", f"factors/{self.seed}/{name}/{side}/{copy}")
            factors.append(values.to(like.dtype))
        return factors[0], factors[1]

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` as :meth:`Directions.block` does."""
        start, stop = _span(start, stop, self.m)
        left, right = (factor.flatten(0, 1) for factor in self.factors(name, like))
        index = torch.arange(start, stop, device=like.device)
        copy, inside = index // self.block_size, index % self.block_size
        u, v = copy * self.rank + inside // self.rank, copy * self.rank + inside % self.rank
        return (left[u][:, :, None] * right[v][:, None]).reshape(stop - start, *like.shape)


def factored(copies: int, rank: int, seed: int) -> FactoredDirections:
    """Return copies·rank² lazy directions (:class:`FactoredDirections`), whose pushforward uses the factors of layers.

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
    """Return rows ``offset:offset + n`` of one global draw of m random probes Ω on the outputs, ``(m, n, c)``.

    The numbers of an example depend only on (seed, step, its global index). Ranks that draw their own rows, with the
    number of examples on the ranks before them as ``offset``, therefore hold one global set of probes. With equal
    probes on two ranks, the parts of the kernel between those ranks would be counted as if they were equal.

    Args:
        m: the number of probes.
        n: the number of examples.
        c: the number of outputs.
        seed: any integer.
        step: the optimizer step; another step draws other probes.
        offset: the global index of the first example.
        distribution: the distribution of the entries, ``"gaussian"`` or ``"rademacher"``; mean 0, variance 1.
        like: a tensor with the dtype and device of the probes; by default float32 on the CPU.

    Raises:
        TypeError: if ``like`` is not a real tensor.
        ValueError: if another argument is out of range.

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
        n: the number of examples.
        size: the number of indices, at most n.
        seed: any integer.
        step: the optimizer step; another step draws other indices.
        stream: a further key, with which ranks draw different indices.

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
    """Return hashes of vectors in parameter space; a hash is linear, and ‖hash‖² has the mean ‖vector‖².

    The entries of one parameter are split into runs of ``size``; each run is rotated by a random shift and multiplied
    by random signs before it is added. Two entries meet with a probability of at most 1/``size``, and then their
    product cancels on average because of the signs, so that the relative standard deviation of ‖hash‖² is at most
    √(2/size). (After Charikar et al., "Finding frequent items in data streams", 2002.)

    Args:
        vectors: r vectors ``(r, *shape)`` by parameter name.
        size: the length of a hash.
        seed: any integer; hashes with equal seeds can be added.

    Returns:
        ``(r, size)``, in float64.

    Raises:
        TypeError: if the vectors are not real tensors by name.
        ValueError: if there are no vectors, not equally many for each parameter, or values that are not finite.

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
        raise ValueError(f"start, stop: expected a range within the {m} directions, got {start} to {stop}.")
    return start, stop


def _fill(values: Tensor, distribution: Distribution, key: str) -> None:
    generator = _generator(f"{distribution}/{key}", values.device)
    if distribution == "gaussian":
        values.normal_(generator=generator)
    else:
        values.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _generator(key: str, device: torch.device) -> torch.Generator:
    # The key is hashed because adjacent seeds may give correlated streams. torch's CPU generator uses 32 bits of it, so
    # one pair of draws in some billions coincides, which no estimate can resolve.
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
