"""Per-example gradients of embeddings, which only concern the rows of the weight that were looked up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from alignreg.tangents.kernel.gradients import Sums, Vectors
from alignreg.tangents.kernel.gram import Affinity


@final
class TokenSums(Sums):
    """Gradients of embeddings; a_t is the unit vector of the token at position t, or zero.

    Args:
        tokens: ``(n, t)``; negative tokens stand for zero vectors.
        d: ``(n, c, 1, out, t)``.
        size: the number of rows of the weight.
        labels: the rows of the weight that get a gradient, sorted; by default those in ``tokens``.
    """

    bias = False

    def __init__(self, tokens: Tensor, d: Tensor, size: int, labels: Tensor | None = None) -> None:
        self.tokens, self.d, self.size = tokens, d, size
        self.labels = torch.unique(tokens[tokens >= 0]) if labels is None else labels
        self.n, self.c = d.shape[:2]

    @override
    def take(self, start: int, stop: int) -> TokenSums:
        return TokenSums(self.tokens[start:stop], self.d[start:stop], self.size, self.labels)

    @override
    def join(self, others: Sequence[TokenSums]) -> TokenSums:
        tokens, d = (torch.cat([getattr(part, name) for part in (self, *others)], dim=-1) for name in ("tokens", "d"))
        return TokenSums(tokens, d, self.size)

    @override
    def pullback(self, u: Tensor) -> dict[str, Tensor]:
        d = torch.einsum("nc,ncgot->nto", u, self.d)
        known = self.tokens >= 0
        weight = d.new_zeros(self.size, d.shape[-1]).index_add(0, self.tokens[known], d[known])
        return {"weight": weight.flatten()}

    @override
    def along(self, directions: dict[str, Tensor], limit: int) -> Tensor:
        S, step = directions["weight"], max(1, limit // max(1, self.tokens.numel() * self.d.shape[3]))
        return torch.cat([self._moved(S[start : start + step]) for start in range(0, len(S), step)], dim=-1)

    @override
    def dense(self, limit: int) -> Tensor:
        n, c, _, out, _ = self.d.shape
        rows = torch.cat(list(self.rows(limit)), dim=-1).reshape(n, c, -1, out)
        return rows.new_zeros(n, c, self.size, out).index_copy(2, self.labels, rows).flatten(2)

    @override
    def project(self, factors: dict[str, Vectors]) -> Tensor:
        left, right = factors["weight"]
        known = self.tokens >= 0
        mine = left[:, :, self.tokens.clamp(min=0)] * known.to(left)  # (copies, rank, n, t)
        return torch.einsum("runt,ncot,rvo->ncruv", mine, self.d[:, :, 0], right)

    def compact(self) -> TokenSums:
        """Return those of a weight that has only the rows ``labels``."""
        index = torch.searchsorted(self.labels, self.tokens.contiguous()).masked_fill(self.tokens < 0, -1)
        labels = torch.arange(len(self.labels), device=index.device)
        return TokenSums(index, self.d, len(self.labels), labels)

    def _width(self) -> int:
        return len(self.labels)

    def _affinity(self, other: TokenSums, group: int) -> Affinity:  # noqa: ARG002
        return lambda start, stop, first: self._same(other.tokens[first:, :, None], self.tokens[start:stop].flatten())

    def _own_affinity(self, group: int) -> Tensor:  # noqa: ARG002
        return self._same(self.tokens[:, :, None], self.tokens[:, None])

    def _same(self, left: Tensor, right: Tensor) -> Tensor:
        return ((left == right) & (left >= 0)).to(self.d)

    @override
    def _moved(self, S: Tensor) -> Tensor:
        known = self.tokens >= 0
        rows = S.reshape(len(S), self.size, -1)[:, self.tokens.clamp(min=0)] * known[..., None].to(S)
        return torch.einsum("ncot,mnto->ncm", self.d[:, :, 0], rows)

    def _weight_rows(self, limit: int) -> Iterator[Tensor]:
        yield from (rows for _, rows in self.rows_by_label(limit))

    def rows_by_label(self, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield chunks of the labels, with the gradients ``(n, c, p)`` of those rows of the weight."""
        n, c, _, out, _ = self.d.shape
        d = self.d[:, :, 0].mT  # (n, c, t, out)
        index = torch.searchsorted(self.labels, self.tokens.contiguous())
        width = max(1, limit // (n * c * out))
        for first in range(0, len(self.labels), width):
            size = min(width, len(self.labels) - first)
            here = (index - first).masked_fill(self.tokens < 0, -1)
            # Tokens outside this chunk go to an extra row, which is dropped.
            here = here.masked_fill((here < 0) | (here >= size), size)[:, None, :, None].expand_as(d)
            rows = d.new_zeros(n, c, size + 1, out).scatter_add(2, here, d)[:, :, :size].flatten(2)
            yield self.labels[first : first + size], rows
