"""Gram matrices of per-example gradients that are given as rows or as factors.

Rows are (example, output), example first. The Gram matrix G of rows with themselves is symmetric, so only its *half* H
with G = H + Hᵀ is computed: H is zero below the squares on the diagonal, and half of G in these squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

STRIPS = 6
"""Number of strips of rows of a symmetric product; (1 + 1/6)/2 of all pairs are then computed."""

Affinity = Callable[[int, int, int], Tensor]


def fill(n: int, part: Callable[[int, int, int], Tensor], *, symmetric: bool, step: int) -> Tensor:
    """Assemble a product of rows of n examples, or its half if ``symmetric``, from strips of ``step`` examples.

    ``part`` maps (start, stop, first) to the products ``(stop - start, c, rest, c)`` of the examples ``start:stop``
    with those from ``first`` on.
    """
    ranges = [(start, min(start + step, n)) for start in range(0, n, step)]
    if not symmetric:
        return torch.cat([part(start, stop, 0) for start, stop in ranges])
    first_strip = part(*ranges[0], 0)
    result = first_strip.new_empty(n, *first_strip.shape[1:])
    for start, stop in ranges:
        strip = part(start, stop, start) if start else first_strip
        result[start:stop, :, :start] = 0
        result[start:stop, :, stop:] = strip[:, :, stop - start :]
        result[start:stop, :, start:stop] = strip[:, :, : stop - start] / 2
    return result


def rows_gram(chunks: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the products of rows from chunks of columns: pairs of ``(n, c, p)`` and ``(n2, c, p)`` or ``None``."""
    total: Tensor | None = None
    for left, right in chunks:
        value = _row_products(left, right)
        if total is None:
            total = value
        elif value.requires_grad:
            total = total + value
        else:
            total += value
    assert total is not None
    return total


def _row_products(left: Tensor, right: Tensor | None) -> Tensor:
    n, c, width = left.shape
    other = left if right is None else right

    def part(start: int, stop: int, first: int) -> Tensor:
        products = left[start:stop].reshape(-1, width) @ other[first:].reshape(-1, width).T
        return products.reshape(stop - start, c, -1, c)

    symmetric = right is None
    return fill(n, part, symmetric=symmetric, step=-(-n // STRIPS) if symmetric else n)


def position_products(affinity: Affinity, d: Tensor, d2: Tensor | None) -> Tensor:
    """Return Σ_tt' B_ij[t, t'] (d_ik[t] · d_jl[t']) for output gradients d ``(n, c, out, t)`` of rows and columns.

    ``affinity`` maps (start, stop, first) to the transposed B_ij of the examples i in ``start:stop`` and j from
    ``first`` on, ``(j, t', i t)``. B is multiplied with one side first, so that a pair needs c t² instead of c² t²
    numbers.
    """
    n, c, out, t = d.shape
    other = (d if d2 is None else d2).reshape(-1, c * out, t)

    def part(start: int, stop: int, first: int) -> Tensor:  # one example at a time
        moved = torch.bmm(other[first:], affinity(start, stop, first)).reshape(-1, out * t)
        return (d[start].reshape(c, -1) @ moved.T).reshape(1, c, -1, c)

    return fill(n, part, symmetric=d2 is None, step=1)


def vector_products(weights: Tensor, d: Tensor, d2: Tensor | None) -> Tensor:
    """Return B_ij (d_ik · d_jl) for B ``(n, n2)`` and d ``(n, c, out)``, with one position each."""
    n, c, out = d.shape
    other = d if d2 is None else d2

    def part(start: int, stop: int, first: int) -> Tensor:
        products = d[start:stop].reshape(-1, out) @ other[first:].reshape(-1, out).T
        scales = weights[start:stop, None, first:].repeat_interleave(c, -1)
        return (products.reshape(stop - start, c, -1) * scales).reshape(stop - start, c, -1, c)

    symmetric = d2 is None
    return fill(n, part, symmetric=symmetric, step=-(-n // STRIPS) if symmetric else n)
