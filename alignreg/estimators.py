r"""Unbiased estimators from the Gram matrix of a sketch.

One set of formulas serves both sketches of Φ, since both have i.i.d. columns: the feature sketch ``z_a = Φ s_a`` with
``G = ZᵀZ``, and the probe sketch ``g_a = Φᵀω_a`` with ``G = (g_a·g_b)``. G is ``(m, m)`` and carries no 1/m. Sums over
pairs of *different* columns keep the noise of a column out of its own square:

    E G_ab² = ‖K‖_F²,  E G_aa G_bb = (tr K)²  for a ≠ b,

while E G_aa² = (tr K)² + 2‖K‖_F² for Gaussian entries, hence the upward bias of the naive ‖ZᵀZ‖_F²/m².
Columns of structured sketches (:func:`alignreg.sketches.factored`) come in independent blocks of dependent ones: with
``block``, their size, a ≠ b are taken from different blocks, and the jackknife leaves out blocks. For a sketch without
such copies, :func:`cross_frobenius2` of two independent ones is right.
All functions are differentiable. Half precision is computed in float32. That G is symmetric is taken for granted: what
centering leaves of it may be rounding errors alone.
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
    """The estimate."""
    standard_error: Tensor
    """Its standard deviation, as far as that is known."""


def gram(columns: Mapping[str, Tensor]) -> Tensor:
    """Return the Gram matrix G_ab = g_a·g_b of m vectors in parameter space.

    Args:
        columns: the vectors by parameter name, ``(m, *shape)`` each, as
            :meth:`~alignreg.TangentFeatures.pullback` returns them.

    Returns:
        ``(m, m)``, in float32 at least.

    Raises:
        TypeError: if they are no real tensors by name.
        ValueError: if there are none, not equally many of each parameter, or their products are not finite.

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
    """Return the products ``(m, m)`` of m vectors ``(m, *shape)``, in float32 at least: :func:`gram` unchecked.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.inner_products(torch.ones(2, 3, 4))
        tensor([[12., 12.],
                [12., 12.]])
    """
    flat = columns.reshape(len(columns), math.prod(columns.shape[1:]))
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return flat @ flat.T


def trace(G: Tensor) -> Tensor:
    """Estimate tr K by tr G / m, unbiased.

    Args:
        G: Gram matrix of m i.i.d. columns, ``(m, m)``.

    Raises:
        TypeError: if G is no real tensor.
        ValueError: if G is not a finite square matrix of at least one column.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.trace(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(3.)
    """
    G, m = _columns(G, at_least=1)
    return G.diagonal().sum() / m


def frobenius2(G: Tensor, block: int = 1) -> Tensor:
    """Estimate ‖K‖_F² by Σ_{a≠b} G_ab² / (m(m−1)), unbiased for i.i.d. columns.

    Args:
        G: Gram matrix of m i.i.d. columns, ``(m, m)``.
        block: how many columns in a row depend on each other.

    Raises:
        TypeError: if G is no real tensor.
        ValueError: if G is not a finite square matrix of at least two columns.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.frobenius2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(1.)
    """
    G, _ = _columns(G, at_least=2, block=block)
    return _mean_of_pairs(_of_blocks(G.square(), block))


def off_diagonal_mean(G: Tensor, block: int = 1) -> Tensor:
    """Return the mean over pairs of different columns, of a symmetric statistic of two columns.

    Args:
        G: the statistic of each pair, ``(m, m)``.
        block: how many columns in a row depend on each other.

    Raises:
        TypeError: if G is no real tensor.
        ValueError: if G is not a finite square matrix of at least two columns.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.off_diagonal_mean(torch.tensor([[9.0, 1.0], [1.0, 9.0]]))
        tensor(1.)
    """
    G, _ = _columns(G, at_least=2, block=block)
    return _mean_of_pairs(_of_blocks(G, block))


def trace2(G: Tensor, block: int = 1) -> Tensor:
    """Estimate (tr K)² by Σ_{a≠b} G_aa G_bb / (m(m−1)), unbiased; the square of :func:`trace` is not.

    Args:
        G: Gram matrix of m i.i.d. columns, ``(m, m)``.
        block: how many columns in a row depend on each other.

    Raises:
        TypeError: if G is no real tensor.
        ValueError: if G is not a finite square matrix of at least two columns.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> estimators.trace2(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))
        tensor(8.)
    """
    t = _traces(G, block, at_least=2)
    m = len(t)
    return (t.sum().square() - t.square().sum()) / (m * (m - 1))


def cross_frobenius2(G12: Tensor) -> Tensor:
    """Estimate ‖K‖_F² by ‖Z₁ᵀZ₂‖_F² / (m₁m₂) from two independent sketches, unbiased for any E[SSᵀ] = m·I.

    Args:
        G12: products of the columns of one sketch with those of the other, ``(m1, m2)``.

    Raises:
        TypeError: if G12 is no real tensor.
        ValueError: if G12 is not a finite matrix of at least one entry.

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

    No kernel has ‖K‖_F < yᵀKy/‖y‖², so an estimate of the norm below that bound is raised to it.

    Args:
        projection: yᵀKy/‖y‖².
        frobenius2: ‖K‖_F², of the same shape; a scalar serves for all.

    Returns:
        Of that shape; NaN where both are zero.

    Raises:
        TypeError: if they are no real tensors.
        ValueError: if they are not finite or not of one shape.

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
        leave_one_out: the statistic without column j, ``(m,)``; NaN where it is undefined, as the error is then.

    Raises:
        TypeError: if that is no real tensor.
        ValueError: if it is no vector of at least two.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> x = torch.tensor([1.0, 2.0, 4.0])  # of a mean, it is the usual standard error
        >>> estimators.jackknife((x.sum() - x) / 2), x.std() / 3**0.5
        (tensor(0.8819), tensor(0.8819))
    """
    leave_one_out = checks.real("leave_one_out", leave_one_out)
    if leave_one_out.ndim != 1 or len(leave_one_out) < 2:
        raise ValueError(f"leave_one_out: expected (m,) with m of at least 2, got shape {tuple(leave_one_out.shape)}.")
    m = len(leave_one_out)
    return ((leave_one_out - leave_one_out.mean()).square().sum() * (m - 1) / m).sqrt()


def standard_error(statistic: Callable[..., Tensor], *tables: Tensor, block: int = 1) -> Tensor:
    """Return the :func:`jackknife` standard error of a statistic of m columns, each block of them left out in turn.

    Args:
        statistic: a function of the tables that returns a scalar.
        tables: numbers of each column ``(m,)``, or of each pair of columns ``(m, m)``.
        block: how many columns in a row depend on each other, and are left out together.

    Returns:
        A scalar, NaN where the statistic is NaN without some block.

    Raises:
        TypeError: if the tables are no real tensors, or the statistic no function that returns a tensor.
        ValueError: if the tables are not finite, or not of the same columns in at least two blocks; or if the
            statistic returns no scalar.

    Example:
        >>> import torch
        >>> from alignreg import estimators
        >>> G = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> estimators.standard_error(estimators.trace, G), G.diagonal().std() / 3**0.5
        (tensor(0.8819), tensor(0.8819))
    """
    checks.function("statistic", statistic, "of the tables")
    some = [checks.values("tables", table, integers=False) for table in tables]
    shapes = [tuple(table.shape) for table in some]
    m = shapes[0][0] if shapes and shapes[0] else 0
    if not shapes or any(shape not in ((m,), (m, m)) for shape in shapes):
        raise ValueError(f"tables: expected (m,) or (m, m) of the same m columns, got shapes {checks.shown(shapes)}.")
    if (count := _count_blocks(m, block)) < 2:
        raise ValueError(f"tables: expected those of at least two blocks of columns, got {count}.")
    columns = torch.arange(m, device=some[0].device)
    without = []
    for start in range(0, m, block):
        kept = torch.cat([columns[:start], columns[start + block :]])
        value = statistic(*(table[kept] if table.ndim == 1 else table[kept][:, kept] for table in some))
        if checks.real("statistic", value).ndim:
            raise ValueError(f"statistic: expected a scalar, got shape {tuple(value.shape)}.")
        without.append(value)
    return jackknife(torch.stack(without))


def _mean_of_pairs(G: Tensor) -> Tensor:
    m = len(G)
    return (G.sum() - G.diagonal().sum()) / (m * (m - 1))


def _of_blocks(G: Tensor, block: int) -> Tensor:
    """Return the means over pairs of blocks of a statistic of two columns, ``(m / block, m / block)``."""
    count = len(G) // block
    return G if block == 1 else G.reshape(count, block, count, block).mean((1, 3))


def _traces(G: Tensor, block: int, *, at_least: int) -> Tensor:
    """Return the mean of the diagonal in each block."""
    G, count = _columns(G, at_least=at_least, block=block)
    return G.diagonal().reshape(count, block).mean(1)


def _columns(G: Tensor, *, at_least: int, block: int = 1) -> tuple[Tensor, int]:
    """Return a Gram matrix in float32 at least, and how many independent blocks of columns there are."""
    G, block = checks.real("G", G), checks.count("block", block)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or G.shape[0] < at_least * block:
        raise ValueError(
            f"G: expected the Gram matrix (m, m) of at least {at_least * block} columns, got shape {tuple(G.shape)}."
        )
    return checks.finite("G", G), _count_blocks(len(G), block)


def _count_blocks(m: int, block: int) -> int:
    block = checks.count("block", block)
    if m % block:
        raise ValueError(f"block: expected a number that divides the {m} columns, got {block!r}.")
    return m // block
