"""Formulas that several modules share: eigenvalues and alignment of a kernel, and means over different examples.

Alignment sums over the kernel in float64, a few examples at a time. It needs no copy of the kernel, and keeps the
digits of one in lower precision.

Centering a kernel that is nearly constant over the examples leaves rounding errors, which need be neither symmetric nor
positive. The functions here compute with such a kernel as with any other; :mod:`.functional` rejects it, because a
tensor from the user may not be a kernel at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignreg import checks

_BLOCK = 2**20
"""How many numbers of a kernel are in float64 at a time, unless those of one example are more."""


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


def alignment(K: Tensor, y: Tensor, *, centered: bool) -> Tensor:
    """Return yᵀK_c y / (‖K_c‖_F ‖y‖²) in float64, from a kernel ``(n, c, n, c)`` and centered values ``(n, c)``.

    It is NaN if nothing but rounding errors of K is left of (centered) K.
    """
    y = y.to(K.device, torch.float64)
    left, above = _means(K) if centered else (None, None)
    numerators, squares, whole = [], [], []
    for some, part in _blocks(K):
        whole.append(part.detach().square().sum())
        # A difference of large sums, as in ‖K‖² − 2‖K1‖²/n + ..., would lose the digits that centering leaves.
        block = part if left is None or above is None else (part - above).sub_(left[some])
        numerators.append(_form(y[some], block, y))
        squares.append(block.square().sum())
    norm2 = torch.stack(squares).sum()
    rounding = 10 * torch.finfo(K.dtype).eps
    vanishes = norm2.detach() <= rounding**2 * torch.stack(whole).sum()
    value = torch.stack(numerators).sum() / (norm2.masked_fill(vanishes, 1.0).sqrt() * y.square().sum())
    return value.masked_fill(vanishes, torch.nan)


def unbiased_alignment(K: Tensor, y: Tensor) -> Tensor:
    """Return :func:`.population.alignment` from the exact kernel ``(n, c, n, c)`` and targets as values ``(n, c)``.

    Raises:
        TypeError: if they are not real tensors.
        ValueError: if the shapes do not match, or values are not finite.
    """
    K, y = checks.real("K", K), checks.real("y", y, integers=True)
    if K.ndim != 4 or y.ndim != 2 or K.shape != (*y.shape, *y.shape) or K.numel() == 0:
        raise ValueError(f"K, y: expected (n, c, n, c) and (n, c), got {tuple(K.shape)} and {tuple(y.shape)}.")
    K, y = checks.finite("K", K), checks.finite("y", y).to(K.device, torch.float64)
    n, y = len(K), y - y.mean(0)
    # The sums over all pairs of examples: of ⟨K_ij, L_ij⟩, ⟨K_ij, L_ijᵀ⟩, and the same of K with itself.
    sums, rows = [], []
    for some, block in _blocks(K):
        turned = block.transpose(1, 3)
        forms = [_form(y[some], block, y), _form(y[some], turned, y)]
        sums.append(torch.stack([*forms, block.square().sum(), (block * turned).sum()]))
        rows.append(block.sum(2))
    pairs, turned_pairs, squares, turned_squares = torch.stack(sums).sum(0)
    own = torch.diagonal(K, dim1=0, dim2=2).permute(2, 0, 1).to(torch.float64)  # K_ii, (n, c, c)
    rest, outer = torch.cat(rows) - own, torch.einsum("ik,il->ikl", y, y)
    self_products = (own * outer).sum()
    across = (rest * outer).sum()
    products = mean_of_different(
        pairs - self_products,
        turned_pairs - self_products,
        -(rest.sum(0) * outer.sum(0)).sum(),
        -across,
        -across,
        n,
    )
    norm2 = mean_of_different(
        squares - own.square().sum(),
        turned_squares - (own * own.mT).sum(),
        rest.sum(0).square().sum(),
        rest.square().sum(),
        (rest * rest.mT).sum(),
        n,
    )
    return quotient(products, norm2, norm2_of_targets(outer.sum(0), y.square().sum(1).square().sum(), n)).to(K.dtype)


def _blocks(K: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield K[i] ``(b, c, n, c)`` in float64 for b examples i at a time."""
    step = max(1, _BLOCK // K[0].numel())
    start = 0
    for part in torch.split(K, step):  # slices would each have a gradient as large as K
        yield slice(start, start + len(part)), part.to(torch.float64)
        start += len(part)


def _means(K: Tensor) -> tuple[Tensor, Tensor]:
    """Return what centering subtracts: over j, ``(n, c, 1, c)``, and over i of what is left, ``(c, n, c)``."""
    over_j, over_i = [], []
    for _, block in _blocks(K):
        over_j.append(block.mean(2, keepdim=True))
        over_i.append(block.sum(0))
    left, above = torch.cat(over_j), torch.stack(over_i).sum(0) / len(K)
    return left, above - left.mean(0)


def _form(left: Tensor, K: Tensor, right: Tensor) -> Tensor:
    """Return Σ left_ik K_ikjl right_jl."""
    return left.flatten() @ (K.reshape(left.numel(), right.numel()) @ right.flatten())


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
