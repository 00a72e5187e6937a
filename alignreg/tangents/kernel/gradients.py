"""Per-example gradients of one layer, stored as factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import Self, override

from alignreg.tangents.kernel.gram import Affinity, position_products, rows_gram, vector_products

Vectors = tuple[Tensor, Tensor]
"""Factors of directions in parameter space: :meth:`alignreg.sketches.FactoredDirections.factors`."""
Close = Callable[[Tensor, Tensor], Tensor]
"""Products of the rows ``(n, c, p)`` within each example: :func:`norm_of_each` or :func:`gram_of_each`."""


def norm_of_each(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of corresponding rows, ``(n, c)``."""
    return (left * right).sum(-1)


def gram_of_each(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all rows of an example, ``(n, c, c)``."""
    return left @ right.mT


class Gradients(ABC):
    """Gradients ∂f_k(x_i)/∂w for the parameters w of one layer, k < c, i < n."""

    n: int
    c: int

    @abstractmethod
    def take(self, start: int, stop: int) -> Self:
        """Return the gradients of the examples ``start:stop``."""

    @abstractmethod
    def gram(self, other: Self | None, limit: int) -> Tensor:
        """Return G = ⟨rows, rows of other⟩ ``(n, c, n2, c)``, or the half of ⟨rows, rows⟩ for ``None``.

        ``limit`` is the working memory in numbers.
        """

    @abstractmethod
    def diagonal(self, close: Close, limit: int) -> Tensor:
        """Return ``close(rows, rows)``."""

    @abstractmethod
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        """Return ⟨∂f_k(x_i)/∂w, p_ru q_rvᵀ⟩ ``(n, c, copies, rank, rank)``, summed over the parameters.

        The factors p ``(copies, rank, rows)`` and q ``(copies, rank, columns)`` are by ``"weight"`` and ``"bias"``.
        """

    @abstractmethod
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        """Return ⟨∂f_k(x_i)/∂w, s⟩ ``(n, c, m)``, the sum over the parameters.

        Args:
            directions: S ``(m, numbers)``, by ``"weight"`` and ``"bias"``.
            limit: how many numbers of working memory it may use.
        """

    @abstractmethod
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        """Return Σ_ik u_ik ∂f_k(x_i)/∂w for u ``(n, c)``, flat, by ``"weight"`` and ``"bias"``."""


class Factors(Gradients, ABC):
    """Gradients from one call, or from several calls of the same kind."""

    @abstractmethod
    def join(self, others: Sequence[Self]) -> Self:
        """Return the sum of the gradients from several calls with the same parameters."""

    @abstractmethod
    def dense(self, limit: int) -> Tensor:
        """Return the gradients ``(n, c, p)`` of the weight, followed by those of the bias."""


@final
class Rows(Factors):
    """The gradients themselves ``(n, c, p)``, by ``"weight"`` and ``"bias"``, for layers with few parameters."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.n, self.c = next(iter(values.values())).shape[:2]

    @override
    def take(self, start: int, stop: int) -> Rows:
        return Rows({kind: value[start:stop] for kind, value in self.values.items()})

    @override
    def join(self, others: Sequence[Rows]) -> Rows:
        parts = [self.values, *(other.values for other in others)]
        return Rows({kind: torch.stack([part[kind] for part in parts]).sum(0) for kind in self.values})

    @override
    def dense(self, limit: int) -> Tensor:
        return torch.cat([self.values[kind] for kind in ("weight", "bias") if kind in self.values], dim=-1)

    @override
    def gram(self, other: Rows | None, limit: int) -> Tensor:
        return rows_gram((value, None if other is None else other.values[name]) for name, value in self.values.items())

    @override
    def diagonal(self, close: Close, limit: int) -> Tensor:
        return torch.stack([close(value, value) for value in self.values.values()]).sum(0)

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        parts = [project_rows(value, *factors[kind]) for kind, value in self.values.items()]
        return torch.stack(parts).sum(0)

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        return torch.stack([value @ directions[kind].T for kind, value in self.values.items()]).sum(0)

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        return {name: torch.einsum("nc,ncp->p", u, value) for name, value in self.values.items()}


def project_rows(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the products of rows ``(n, c, p)`` with directions, ``(n, c, copies, rank, rank)``."""
    matrix = rows.reshape(*rows.shape[:2], left.shape[2], right.shape[2])
    return torch.einsum("ncoi,ruo,rvi->ncruv", matrix, left, right)


class Sums(Factors, ABC):
    """Weight gradients Σ_t a_t d_tᵀ, and bias gradients Σ_t d_t if there is a bias.

    Their products are computed from sums over pairs of positions, Σ_tt' (a_t·a_t' + 1)(d_t·d_t'), or from the gradients
    themselves, whichever needs fewer multiplications.
    """

    d: Tensor
    """Gradients of the results, ``(n, c, groups, out, t)``."""
    bias: bool

    @abstractmethod
    def _width(self) -> int:
        """Return the number of different inputs of the weight gradients."""

    @abstractmethod
    def _affinity(self, other: Self, group: int) -> Affinity:
        """Return a function of (start, stop, first): a_t·a_t' + 1 of our examples start:stop and the other's first:."""

    @abstractmethod
    def _weight_rows(self, limit: int) -> Iterator[Tensor]:
        """Yield the weight gradients ``(n, c, p)`` in chunks of p."""

    @abstractmethod
    def _own_affinity(self, group: int) -> Tensor:
        """Return a_t·a_t' + 1 within each example, ``(n, t', t)``."""

    @abstractmethod
    def _moved(self, S: Tensor) -> Tensor:
        """Return Σ_t d_t·(S a_t) ``(n, c, m)`` for directions of the weight ``(m, numbers)``."""

    @override
    def gram(self, other: Self | None, limit: int) -> Tensor:
        if self._by_positions(pairs=self.n if other is None else 2 * other.n):
            parts = [self._group_products(other, group) for group in range(self.d.shape[2])]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if other is None:
            return rows_gram((rows, None) for rows in self.rows(limit))
        return rows_gram(zip(self.rows(limit), other.rows(limit), strict=True))

    def _group_products(self, other: Self | None, group: int) -> Tensor:
        affinity = self._affinity(other or self, group)
        d, d2 = self.d[:, :, group], None if other is None else other.d[:, :, group]
        if d.shape[-1] > 1:
            return position_products(affinity, d, d2)
        weights = affinity(0, self.n, 0).squeeze(1).T
        return vector_products(weights, d.squeeze(-1), None if d2 is None else d2.squeeze(-1))

    @override
    def diagonal(self, close: Close, limit: int) -> Tensor:
        total: Tensor | None = None
        for left, right in self._diagonal_factors(limit):
            value = close(left, right)
            total = value if total is None else total + value
        assert total is not None
        return total

    def _diagonal_factors(self, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._by_positions(pairs=2):
            for g in range(self.d.shape[2]):
                d = self.d[:, :, g]
                moved = torch.bmm(d.flatten(1, 2), self._own_affinity(g))
                yield d.flatten(2), moved.reshape(*d.shape[:2], -1)
        else:
            yield from ((rows, rows) for rows in self.rows(limit))

    def _by_positions(self, pairs: int) -> bool:
        _, c, groups, out, t = self.d.shape
        width = self._width()
        by_positions = groups * t * (t * width + t * c * out + c * c * out)
        by_rows = groups * c * width * out * (c + 2 * t / pairs)
        return t == 1 or by_positions < by_rows

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        S, (n, c, _, out, t) = directions["weight"], self.d.shape
        m = len(S)
        if not self.forms_rows(m):
            step = max(1, limit // max(1, n * t * out))
            total = torch.cat([self._moved(S[start : start + step]) for start in range(0, m, step)], dim=-1)
        else:
            total, start = self.d.new_zeros(n, c, m), 0
            for rows in self._weight_rows(limit):
                total += rows @ S[:, start : start + rows.shape[-1]].T
                start += rows.shape[-1]
        return total + self.d.sum(-1).flatten(2) @ directions["bias"].T if self.bias else total

    def forms_rows(self, m: int) -> bool:
        """Whether products with m directions have fewer multiplications by the rows than as Σ_t d_t·(S a_t)."""
        _, c, groups, out, t = self.d.shape
        p = groups * out * self._width()
        return c * p * (t + m) <= t * m * (p + c * out)

    def rows(self, limit: int) -> Iterator[Tensor]:
        """Yield the gradients themselves, ``(n, c, p)`` in chunks of p."""
        yield from self._weight_rows(limit)
        if self.bias:
            yield self.d.sum(-1).flatten(2)


@final
class OuterProducts(Sums):
    """Gradients of linear maps and convolutions, as outer products of a ``(n, groups, in, t)`` and d."""

    def __init__(self, a: Tensor, d: Tensor, *, bias: bool) -> None:
        self.a, self.d, self.bias = a, d, bias
        self.n, self.c = d.shape[:2]

    @override
    def take(self, start: int, stop: int) -> OuterProducts:
        return OuterProducts(self.a[start:stop], self.d[start:stop], bias=self.bias)

    @override
    def join(self, others: Sequence[OuterProducts]) -> OuterProducts:
        a, d = (torch.cat([getattr(part, name) for part in (self, *others)], dim=-1) for name in ("a", "d"))
        return OuterProducts(a, d, bias=self.bias)

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        d = torch.einsum("nc,ncgot->ngot", u, self.d)
        weight = {"weight": torch.einsum("ngot,ngit->goi", d, self.a).flatten()}
        return {**weight, "bias": d.sum((0, -1)).flatten()} if self.bias else weight

    @override
    def dense(self, limit: int) -> Tensor:
        return torch.cat(list(self.rows(limit)), dim=-1)

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        left, right = factors["weight"]
        n, c, groups, out, t = self.d.shape
        copies = left.shape[0]
        total = self.d.new_zeros(n, c, *left.shape[:2], right.shape[1])
        for g in range(groups):
            d, p = self.d[:, :, g], left[:, :, g * out : (g + 1) * out]
            a = right.flatten(0, 1) @ self.a[:, g]  # (n, copies·rank, t)
            # Multiply in the order with the smaller intermediate result.
            if t < out:
                projected = (p.flatten(0, 1) @ d).reshape(n, c, copies, -1, t)
                total += torch.einsum("ncrut,nrvt->ncruv", projected, a.reshape(n, copies, -1, t))
            else:
                mixed = (d.flatten(1, 2) @ a.mT).reshape(n, c, out, copies, -1)
                total += torch.einsum("ncorv,ruo->ncruv", mixed, p)
        if self.bias:
            total += project_rows(self.d.sum(-1).flatten(2), *factors["bias"])
        return total

    def _width(self) -> int:
        return self.a.shape[2]

    def _affinity(self, other: OuterProducts, group: int) -> Affinity:
        a = self.a[:, group]
        # Transpose once, so that all positions of all examples are rows of one matrix.
        theirs = other.a[:, group].mT.contiguous()

        def affinity(start: int, stop: int, first: int) -> Tensor:
            mine = a[start:stop].transpose(0, 1).flatten(1)
            products = (theirs[first:].flatten(0, 1) @ mine).reshape(-1, theirs.shape[1], mine.shape[1])
            return products + 1 if self.bias else products

        return affinity

    def _own_affinity(self, group: int) -> Tensor:
        a = self.a[:, group]
        return a.mT @ a + (1 if self.bias else 0)

    def _weight_rows(self, limit: int) -> Iterator[Tensor]:
        n, c, groups, out, _ = self.d.shape
        width = max(1, limit // (n * c * self._width()))  # the number of outputs that fit
        for g in range(0, groups, max(1, width // out)):
            some = slice(g, g + max(1, width // out))
            for o in range(0, out, min(width, out)):
                yield self._chunk(self.a[:, some], self.d[:, :, some, o : o + width])

    @override
    def _moved(self, S: Tensor) -> Tensor:
        n, c, groups, out, t = self.d.shape
        m, total = len(S), self.d.new_zeros(n, c, len(S))
        for g, weight in enumerate(S.reshape(m, groups, out, -1).unbind(1)):
            a = self.a[:, g].transpose(0, 1).flatten(1)  # all positions of all examples beside each other: one product
            moved = (weight.flatten(0, 1) @ a).reshape(m, out, n, t)
            total += torch.einsum("ncot,mont->ncm", self.d[:, :, g], moved)
        return total

    def some_rows(self, outputs: Tensor) -> Tensor:
        """Return the gradients ``(n, c, p)`` of some rows of the weight, if it has one group."""
        return self._chunk(self.a, self.d[:, :, :, outputs])

    @staticmethod
    def _chunk(a: Tensor, d: Tensor) -> Tensor:
        n, c, groups, out, _ = d.shape
        d = d.transpose(1, 2).reshape(n * groups, c * out, -1)
        rows = torch.bmm(d, a.flatten(0, 1).mT).reshape(n, groups, c, out, -1)
        return rows.transpose(1, 2).flatten(2)
