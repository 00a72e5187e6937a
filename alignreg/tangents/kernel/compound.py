"""Per-example gradients of a parameter that is used through views, in parts, or in calls of two kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from alignreg.tangents.kernel.gradients import Close, Gradients, OuterProducts, Vectors, project_rows
from alignreg.tangents.kernel.gram import rows_gram
from alignreg.tangents.kernel.tokens import TokenSums


@final
class Behind(Gradients):
    """Gradients through a value whose derivative J has J Jᵀ = 1, so that gradients of the value have the same products.

    Args:
        inner: the gradients of the value.
        back: returns Jᵀ times flat rows ``(m, p)``.
        dense: returns the gradients of the value ``(n, c, p)``.
    """

    def __init__(
        self, inner: Gradients, back: Callable[[Tensor], Tensor], dense: Callable[[Gradients], Tensor]
    ) -> None:
        self.inner, self._back, self._dense = inner, back, dense
        self.n, self.c = inner.n, inner.c

    @override
    def take(self, start: int, stop: int) -> Behind:
        return Behind(self.inner.take(start, stop), self._back, self._dense)

    @override
    def gram(self, other: Behind | None, limit: int) -> Tensor:
        return self.inner.gram(None if other is None else other.inner, limit)

    @override
    def diagonal(self, close: Close, limit: int) -> Tensor:
        return self.inner.diagonal(close, limit)

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        rows = self._back(self._dense(self.inner).flatten(0, 1))
        return project_rows(rows.reshape(self.n, self.c, -1), *factors["weight"])

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        rows = self._back(self._dense(self.inner).flatten(0, 1))
        return (rows @ directions["weight"].T).reshape(self.n, self.c, -1)

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        (value,) = self.inner.pullback(u).values()
        return {"weight": self._back(value[None])[0]}


@final
class Parts(Gradients):
    """Gradients of disjoint parts of a parameter, which are orthogonal."""

    def __init__(self, parts: Sequence[Gradients]) -> None:
        self.parts = parts
        self.n, self.c = parts[0].n, parts[0].c

    @override
    def take(self, start: int, stop: int) -> Parts:
        return Parts([part.take(start, stop) for part in self.parts])

    @override
    def gram(self, other: Parts | None, limit: int) -> Tensor:
        others = [None] * len(self.parts) if other is None else other.parts
        return _sum([part.gram(theirs, limit) for part, theirs in zip(self.parts, others, strict=True)])

    @override
    def diagonal(self, close: Close, limit: int) -> Tensor:
        return _sum([part.diagonal(close, limit) for part in self.parts])

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        return _sum([part.project(factors) for part in self.parts])

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        return _sum([part.along(directions, limit) for part in self.parts])

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        return {"weight": _sum([part.pullback(u)["weight"] for part in self.parts])}


@final
class Tied(Gradients):
    """Gradients of the weight of an embedding, E = Σ_t e_token(t) δ_tᵀ, and of a linear map, M = Σ_s d_s a_sᵀ.

    Their products ⟨E, M⟩ = Σ_token E[token] · M[token] only need those rows of M that are tokens.
    """

    def __init__(self, tokens: TokenSums, maps: OuterProducts) -> None:
        self.tokens, self.maps = tokens, maps
        self.n, self.c = tokens.n, tokens.c

    @override
    def take(self, start: int, stop: int) -> Tied:
        return Tied(self.tokens.take(start, stop), self.maps.take(start, stop))

    @override
    def gram(self, other: Tied | None, limit: int) -> Tensor:
        alone = self.tokens.gram(None if other is None else other.tokens, limit)
        alone = alone + self.maps.gram(None if other is None else other.maps, limit)
        crossed = rows_gram(_pairs(self.tokens, (other or self).maps, limit))
        if other is None:  # the transpose is in the other half
            return alone + crossed
        return alone + crossed + rows_gram(_pairs(other.tokens, self.maps, limit)).permute(2, 3, 0, 1)

    @override
    def diagonal(self, close: Close, limit: int) -> Tensor:
        crossed = [close(one, two) + close(two, one) for one, two in _pairs(self.tokens, self.maps, limit)]
        return _sum([self.tokens.diagonal(close, limit), self.maps.diagonal(close, limit), *crossed])

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        return self.tokens.project(factors) + self.maps.project(factors)

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        return self.tokens.along(directions, limit) + self.maps.along(directions, limit)

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        return {"weight": self.tokens.pullback(u)["weight"] + self.maps.pullback(u)["weight"]}


def _pairs(tokens: TokenSums, maps: OuterProducts, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    for labels, rows in tokens.rows_by_label(limit):
        yield rows, maps.some_rows(labels)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0) if len(values) > 1 else values[0]
