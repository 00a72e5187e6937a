"""Formulas that several modules share: eigenvalues of a kernel, and means over different examples.

Centering a kernel that is nearly constant over the examples leaves rounding errors, which need be neither symmetric nor
positive. The functions here compute with such a kernel as with any other; :mod:`.functional` rejects it, because a
tensor from the user may not be a kernel at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg import checks


def matrix(K: Tensor) -> Tensor:
    """Return a kernel ``(n, c, n, c)`` as a matrix ``(n·c, n·c)``."""
    rows = K.shape[0] * K.shape[1]
    return K.reshape(rows, rows)


def symmetric(K: Tensor) -> Tensor:
    """Return the symmetric part of a kernel, as a matrix."""
    rows = matrix(K)
    return (rows + rows.T) / 2


def eigenvalues(K: Tensor) -> Tensor:
    """Return all eigenvalues of a kernel in descending order; rounding can make some negative."""
    ascending: Tensor = torch.linalg.eigvalsh(symmetric(K))
    return ascending.flip(0)


def effective_rank(values: Tensor) -> Tensor:
    """Return exp(−Σ_j μ_j log μ_j), μ_j = λ_j / Σλ, over the positive eigenvalues; 0 if there are none."""
    values = values[values > 0]
    if len(values) == 0:
        return values.sum()
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()


def participation_ratio(K: Tensor) -> Tensor:
    """Return (tr K)² / ‖K‖_F² of a kernel; 0 for K = 0."""
    rows = matrix(K)
    return ratio(rows.diagonal().sum(), rows.square().sum())


def ratio(trace: Tensor, squares: Tensor) -> Tensor:
    """Return trace² / squares; 0 where both are zero."""
    return trace.square() / torch.where(squares > 0, squares, torch.ones_like(squares))


def ratio_of_estimates(trace2: Tensor, frobenius2: Tensor, rows: Tensor) -> Tensor:
    """Return (tr K)² / ‖K‖_F² from estimates of both, in [1, n·c] with ``rows`` = n·c; 0 for K = 0."""
    # Any kernel has (tr K)²/(n·c) ≤ ‖K‖_F² ≤ (tr K)², which noisy estimates can violate.
    norm2 = torch.minimum(torch.maximum(frobenius2, trace2 / rows), trace2)
    return torch.where(trace2 > 0, trace2 / norm2, torch.zeros_like(trace2))


def unbiased_alignment(K: Tensor, y: Tensor) -> Tensor:
    """Return :func:`.population.alignment` from the exact kernel ``(n, c, n, c)`` and targets as values ``(n, c)``.

    Raises:
        TypeError: if they are not real tensors.
        ValueError: if the shapes do not match, or values are not finite.
    """
    K, y = checks.real("K", K), checks.real("y", y, integers=True)
    if K.ndim != 4 or y.ndim != 2 or K.shape != (*y.shape, *y.shape) or K.numel() == 0:
        raise ValueError(f"K, y: expected (n, c, n, c) and (n, c), got {tuple(K.shape)} and {tuple(y.shape)}.")
    K, y = checks.finite("K", K), checks.finite("y", y).to(K)
    n, y = len(K), y - y.mean(0)
    own = torch.diagonal(K, dim1=0, dim2=2).permute(2, 0, 1)  # K_ii, (n, c, c)
    rows, outer = K.sum(2) - own, torch.einsum("ik,il->ikl", y, y)
    self_products = (own * outer).sum()
    across = (rows * outer).sum()
    products = mean_of_different(
        torch.einsum("ik,ikjl,jl->", y, K, y) - self_products,
        torch.einsum("il,ikjl,jk->", y, K, y) - self_products,
        -(rows.sum(0) * outer.sum(0)).sum(),
        -across,
        -across,
        n,
    )
    squares = mean_of_different(
        K.square().sum() - own.square().sum(),
        (K * K.transpose(1, 3)).sum() - (own * own.mT).sum(),
        rows.sum(0).square().sum(),
        rows.square().sum(),
        (rows * rows.mT).sum(),
        n,
    )
    return quotient(products, squares, norm2_of_targets(outer.sum(0), y.square().sum(1).square().sum(), n))


def mean_of_different(
    pairs: Tensor, turned: Tensor, total: Tensor, rows: Tensor, turned_rows: Tensor, n: Tensor | int
) -> Tensor:
    """Return h, from the five sums of :mod:`.population` in their order."""
    weighted = (n * n - 3 * n + 1) * pairs + turned + total - 2 * (n - 2) * rows - 2 * turned_rows
    return weighted / (n * (n - 1) * (n - 2) * (n - 3))


def quotient(product: Tensor, norm2: Tensor, target_norm2: Tensor) -> Tensor:
    """Return the alignment; NaN where it is undefined, as for fewer than four examples."""
    defined = (norm2 > 0) & (target_norm2 > 0) & product.isfinite()
    return torch.where(defined, product / torch.where(defined, norm2 * target_norm2, 1.0).sqrt(), torch.nan)


def norm2_of_targets(outer: Tensor, fourth: Tensor, n: Tensor | int) -> Tensor:
    """Return h of the targets with themselves (:mod:`.population`), from Σ ỹỹᵀ and Σ ‖ỹ‖⁴."""
    square = outer.square().sum()
    return mean_of_different(outer.trace().square() - fourth, square - fourth, square, fourth, fourth, n)
