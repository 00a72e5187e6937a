"""Directions in parameter space: given ones, and random ones that are drawn in blocks from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from alignreg import checks
from alignreg.sketches import random
from alignreg.sketches.random import DISTRIBUTIONS, Distribution


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
        self.tensors = directions

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """See :class:`Directions`."""
        return self.tensors[name][start:stop].to(like)


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
        checks.choice("distribution", self.distribution, DISTRIBUTIONS)

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` as :meth:`Directions.block` does."""
        start, stop = _span(start, stop, self.m)
        checks.real("like", like)
        if self.distribution == "rademacher":
            found = random.signs(f"{self.seed}/{name}", start, stop, like.numel(), like.device)
            return found.to(like.dtype).reshape(stop - start, *like.shape)
        result = torch.empty(stop - start, *like.shape, dtype=torch.float32, device=like.device)
        for row, index in zip(result, range(start, stop), strict=True):
            random.fill(row, self.distribution, f"{self.seed}/{name}/{index}")
        return result.to(like.dtype)

    def rows(self, name: str, like: Tensor, start: int, stop: int, rows: Tensor) -> Tensor:
        """Return some rows of directions ``start:stop`` for a matrix ``name``: signs are drawn for these alone.

        Args:
            name: the name of the parameter.
            like: a tensor with the shape, dtype and device of the directions, ``(r, width)``.
            start: the first direction.
            stop: one past the last direction.
            rows: indices of the rows, ``(k,)``.

        Returns:
            ``(stop - start, k, width)``.
        """
        if self.distribution == "gaussian":
            return self.block(name, like, start, stop)[:, rows]
        start, stop = _span(start, stop, self.m)
        width = checks.real("like", like).shape[1]
        found = random.signs(f"{self.seed}/{name}", start, stop, like.numel(), like.device, width=width, rows=rows)
        return found.to(like.dtype).reshape(stop - start, -1, width)


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
                random.fill(value, "gaussian", f"factors/{self.seed}/{name}/{side}/{copy}")
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


@final
class JoinedDirections:
    """Several directions one after the other."""

    def __init__(self, *parts: Directions) -> None:
        self.parts = parts
        self.m = sum(part.m for part in parts)

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` as :meth:`Directions.block` does."""
        found, before = [], 0
        for part in self.parts:
            first, last = max(start - before, 0), min(stop - before, part.m)
            if first < last:
                found.append(part.block(name, like, first, last))
            before += part.m
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else like.new_empty(0, *like.shape)


def parts_of(directions: Directions) -> tuple[Directions, ...]:
    """Return the directions that were joined, or the only ones."""
    return directions.parts if isinstance(directions, JoinedDirections) else (directions,)


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


def _span(start: int, stop: int, m: int) -> tuple[int, int]:
    start, stop = checks.count("start", start, 0), checks.count("stop", stop, 0)
    if not start <= stop <= m:
        raise ValueError(f"start, stop: expected a range within the {m} directions, got {start} to {stop}.")
    return start, stop
