r"""Unbiased estimators from the Gram matrix of a sketch.

The same formulas serve both sketches of Φ, because both have i.i.d. columns: the feature sketch ``z_a = Φ s_a`` with
``G = ZᵀZ``, and the probe sketch ``g_a = Φᵀω_a`` with ``G = (g_a·g_b)``. G is ``(m, m)`` and carries no 1/m. Sums over
pairs of *different* columns keep the noise of a column out of its own square:

    E G_ab² = ‖K‖_F²,  E G_aa G_bb = (tr K)²  for a ≠ b,

while E G_aa² = (tr K)² + 2‖K‖_F² for Gaussian entries, hence the upward bias of the naive ‖ZᵀZ‖_F²/m².

The columns of structured sketches (:func:`alignreg.sketches.factored`) come in blocks: columns of one block depend on
each other, and different blocks are independent. ``block`` is the number of consecutive columns in a block; a ≠ b are
then taken from different blocks, and the jackknife leaves out whole blocks. For a sketch without independent blocks,
use :func:`cross_frobenius2` of two independent sketches.

A sketch may be *deflated*: its first ``exact`` columns ΦQ are those of orthonormal directions Q, and the others ΦRs are
those of random directions s without their part in Q, R = I − QQᵀ. Then K = ΦQQᵀΦᵀ + ΦRRᵀΦᵀ, so statistics of the first
columns are summed and those of the others averaged. That is unbiased for every Q that does not depend on s:

    ‖K‖_F² = Σ_{q,q'} G_qq'² + 2 E Σ_q G_qa² + E G_ab².

For **Gaussian** columns the diagonal knows more, because the law of G does not change when the columns are rotated
among each other. The mean of an estimate over these rotations is an estimate with the same mean and less noise (Rao and
Blackwell): :func:`gaussian_frobenius2` and :func:`gaussian_trace2`.

All functions are differentiable, and compute half precision in float32. They assume that G is symmetric without
checking it, because a centered G may consist of rounding errors only. They raise ``TypeError`` for an argument that is
not a real tensor, and ``ValueError`` for one that has the wrong shape, too few columns or values that are not finite,
and for a ``block`` that does not divide m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignreg import checks


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: Tensor
    """The estimated number."""
    standard_error: Tensor
    """Its estimated standard deviation; NaN if unknown."""


def gram(columns: Mapping[str, Tensor]) -> Tensor:
    """Return the Gram matrix G_ab = g_a·g_b of m vectors in parameter space, ``(m, m)``, in float32 at least.

    Args:
        columns: the vectors ``(m, *shape)`` by parameter name, as :meth:`~alignreg.TangentFeatures.pullback` returns
            them.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.gram({"weight": torch.ones(2, 3, 4), "bias": torch.tensor([[1.0], [2.0]])})
        tensor([[13., 14.],
                [14., 16.]])
    """
    total: Tensor | None = None
    for value in checks.by_name("columns", columns).values():
        part = inner_products(value)
        total = part if total is None else total + part
    assert total is not None
    return checks.finite("columns", total)


def inner_products(columns: Tensor) -> Tensor:
    """Return the products ``(m, m)`` of m vectors ``(m, *shape)``, in float32 at least; :func:`gram` without checks."""
    flat = columns.reshape(len(columns), math.prod(columns.shape[1:]))
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return flat @ flat.T


def total(columns: Tensor, exact: int = 0) -> Tensor:
    """Estimate a number that is linear in K from its values for each column: the mean over i.i.d. columns.

    Args:
        columns: the values, ``(m,)``.
        exact: the number of leading columns whose values are summed instead.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.total(torch.tensor([5.0, 1.0, 3.0]), exact=1)
        tensor(7.)
    """
    columns = checks.values("columns", columns, integers=False)
    exact = checks.count("exact", exact, 0)
    if columns.ndim != 1 or len(columns) <= exact:
        raise ValueError(f"columns: expected (m,) with m above {exact}, got shape {tuple(columns.shape)}.")
    return columns[:exact].sum() + columns[exact:].mean()


def trace(G: Tensor, exact: int = 0) -> Tensor:
    """Estimate tr K by tr G / m, which is unbiased.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.trace(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(3.)
    """
    G, _ = _columns(G, at_least=1, exact=exact)
    return total(G.diagonal(), exact)


def frobenius2(G: Tensor, block: int = 1, exact: int = 0) -> Tensor:
    """Estimate ‖K‖_F² by Σ_{a≠b} G_ab² / (m(m−1)), which is unbiased for i.i.d. columns.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.frobenius2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(1.)
    """
    G, _ = _columns(G, at_least=2, block=block, exact=exact)
    return _mean_of_pairs(G.square(), block, exact)


def off_diagonal_mean(G: Tensor, block: int = 1, exact: int = 0) -> Tensor:
    """Return the mean over pairs of different columns of a symmetric statistic G ``(m, m)`` of two columns.

    Exact columns count as in :func:`frobenius2`.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.off_diagonal_mean(torch.tensor([[9.0, 1.0], [1.0, 9.0]]))
        tensor(1.)
    """
    G, _ = _columns(G, at_least=2, block=block, exact=exact)
    return _mean_of_pairs(G, block, exact)


def trace2(G: Tensor, block: int = 1, exact: int = 0) -> Tensor:
    """Estimate (tr K)² by Σ_{a≠b} G_aa G_bb / (m(m−1)), which is unbiased, unlike the square of :func:`trace`.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.trace2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(8.)
    """
    G, blocks = _columns(G, at_least=2, block=block, exact=exact)
    t = G.diagonal()[exact:].reshape(blocks, block).mean(1)
    known = G.diagonal()[:exact].sum()
    pairs = (t.sum().square() - t.square().sum()) / (blocks * (blocks - 1))
    return known.square() + 2 * known * t.mean() + pairs


def gaussian_frobenius2(G: Tensor, exact: int = 0) -> Tensor:
    r"""Estimate ‖K‖_F² by Σ_ab (G_ab − t δ_ab)² / ((m−1)(m+2)), t = tr G / m, which is unbiased for Gaussian columns.

    This is the mean of :func:`frobenius2` over all rotations of the columns, so it never has more noise: as little as
    the other has with (m−1)(m+2) instead of m(m−1) products. (It is the estimate of tr Σ² from a covariance matrix in
    Srivastava, "Some tests concerning the covariance matrix in high dimensional data", 2005.)

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.gaussian_frobenius2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(1.)
    """
    G, _ = _columns(G, at_least=2, exact=exact)
    return _mixed(G, exact) + _gaussian_norm2(G[exact:, exact:])


def gaussian_trace2(G: Tensor, exact: int = 0) -> Tensor:
    r"""Estimate (tr K)² by the square of :func:`trace` minus its variance 2‖K‖_F²/m, unbiased for Gaussian columns.

    This is the mean of :func:`trace2` over all rotations of the columns.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.gaussian_trace2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(8.)
    """
    G, m = _columns(G, at_least=2, exact=exact)
    return total(G.diagonal(), exact).square() - 2 * _gaussian_norm2(G[exact:, exact:]) / m


def cross_frobenius2(G12: Tensor) -> Tensor:
    """Estimate ‖K‖_F² by ‖Z₁ᵀZ₂‖_F² / (m₁m₂) from two independent sketches, unbiased for any E[SSᵀ] = m·I.

    Args:
        G12: products of the columns of one sketch with those of the other, ``(m1, m2)``.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.cross_frobenius2(torch.tensor([[1.0, 3.0]]))
        tensor(5.)
    """
    G12 = checks.real("G12", G12)
    if G12.ndim != 2 or G12.numel() == 0:
        raise ValueError(f"G12: expected a matrix (m1, m2) with entries, got shape {tuple(G12.shape)}.")
    return checks.finite("G12", G12).square().mean()


def alignment(projection: Tensor, frobenius2: Tensor) -> Tensor:
    """Return the alignment A = yᵀKy / (‖K‖_F ‖y‖²) in [0, 1], given yᵀKy/‖y‖² and ‖K‖_F² or estimates of them.

    Every kernel has ‖K‖_F ≥ yᵀKy/‖y‖², so an estimate of the norm below that bound is raised to it.

    Args:
        projection: yᵀKy/‖y‖².
        frobenius2: ‖K‖_F², of the same shape; one of the two may be a scalar.

    Returns:
        A tensor of that shape, NaN where both are zero.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.alignment(torch.tensor([1.0, 2.0]), torch.tensor([16.0, 1.0]))
        tensor([0.2500, 1.0000])
    """
    projection = checks.values("projection", projection, integers=False)
    frobenius2 = checks.values("frobenius2", frobenius2, integers=False)
    if projection.ndim and frobenius2.ndim and projection.shape != frobenius2.shape:
        raise ValueError(
            f"projection, frobenius2: expected one shape, got {tuple(projection.shape)} and {tuple(frobenius2.shape)}."
        )
    return projection / torch.maximum(frobenius2, projection.square()).sqrt()


def jackknife(leave_one_out: Tensor) -> Tensor:
    """Return the delete-one jackknife standard error √((m−1)/m · Σ_j (θ_j − mean θ)²).

    Args:
        leave_one_out: the statistic without column j, ``(m,)``. If a value is NaN, so is the error.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> x = torch.tensor([1.0, 2.0, 4.0])  # for a mean, it is the usual standard error
        >>> estimators.jackknife((x.sum() - x) / 2), x.std() / 3**0.5
        (tensor(0.8819), tensor(0.8819))
    """
    leave_one_out = checks.real("leave_one_out", leave_one_out)
    if leave_one_out.ndim != 1 or len(leave_one_out) < 2:
        raise ValueError(f"leave_one_out: expected (m,) with m of at least 2, got shape {tuple(leave_one_out.shape)}.")
    m = len(leave_one_out)
    return ((leave_one_out - leave_one_out.mean()).square().sum() * (m - 1) / m).sqrt()


def standard_error(statistic: Callable[..., Tensor], *tables: Tensor, block: int = 1, exact: int = 0) -> Tensor:
    """Return the :func:`jackknife` standard error of a statistic of m columns, leaving out each block in turn.

    Args:
        statistic: a function of the tables that returns a scalar.
        tables: numbers of each column ``(m,)`` or of each pair of columns ``(m, m)``, in at least two blocks.
        block: the number of consecutive columns that depend on each other and are left out together.
        exact: the number of leading columns that are not random, and never left out.

    Returns:
        A scalar, NaN if the statistic is NaN without some block.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> G = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> estimators.standard_error(estimators.trace, G), G.diagonal().std() / 3**0.5
        (tensor(0.8819), tensor(0.8819))
    """
    checks.function("statistic", statistic, "of the tables")
    tables = tuple(checks.values("tables", table, integers=False) for table in tables)
    shapes = [tuple(table.shape) for table in tables]
    m = shapes[0][0] if shapes and shapes[0] else 0
    if not shapes or any(shape not in ((m,), (m, m)) for shape in shapes):
        raise ValueError(f"tables: expected (m,) or (m, m) of the same m columns, got shapes {checks.shown(shapes)}.")
    if (count := _count_blocks(m, block, exact)) < 2:
        raise ValueError(f"tables: expected at least two blocks of columns, got {count}.")
    columns = torch.arange(m, device=tables[0].device)
    without = []
    for start in range(exact, m, block):
        kept = torch.cat([columns[:start], columns[start + block :]])
        value = statistic(*(table[kept] if table.ndim == 1 else table[kept][:, kept] for table in tables))
        if checks.real("statistic", value).ndim:
            raise ValueError(f"statistic: expected a scalar, got shape {tuple(value.shape)}.")
        without.append(value)
    return jackknife(torch.stack(without))


def _gaussian_norm2(G: Tensor) -> Tensor:
    m = len(G)
    # Σ G_ab² − (tr G)²/m without the rounding errors of that difference.
    deviations = G - torch.diag_embed(G.diagonal().mean().expand(m))
    return deviations.square().sum() / ((m - 1) * (m + 2))


def _mixed(G: Tensor, exact: int) -> Tensor:
    """Return the part of ‖K‖_F² that pairs with exact columns know."""
    squares = G[:exact].square()
    return squares[:, :exact].sum() + 2 * squares[:, exact:].sum(0).mean()


def _mean_of_pairs(G: Tensor, block: int, exact: int) -> Tensor:
    """Return the mean of a statistic over pairs of columns from different blocks, beside the sums of exact columns."""
    known, mixed, G = G[:exact, :exact].sum(), G[:exact, exact:].sum(0).mean(), G[exact:, exact:]
    blocks = len(G) // block
    if block > 1:
        G = G.reshape(blocks, block, blocks, block).mean((1, 3))
    return known + 2 * mixed + (G.sum() - G.diagonal().sum()) / (blocks * (blocks - 1))


def _columns(G: Tensor, *, at_least: int, block: int = 1, exact: int = 0) -> tuple[Tensor, int]:
    """Return a Gram matrix in float32 at least, and the number of independent blocks of random columns."""
    G, least = checks.real("G", G), checks.count("exact", exact, 0) + at_least * checks.count("block", block)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or G.shape[0] < least:
        raise ValueError(f"G: expected the Gram matrix (m, m) of at least {least} columns, got shape {tuple(G.shape)}.")
    return checks.finite("G", G), _count_blocks(len(G), block, exact)


def _count_blocks(m: int, block: int, exact: int) -> int:
    m -= checks.count("exact", exact, 0)
    if m % checks.count("block", block):
        raise ValueError(f"block: expected a number that divides the {m} columns, got {block!r}.")
    return m // block
