r"""The alignment of the population, estimated without bias from a sample by sums over different examples.

The alignment of n examples with their labels depends on n, because in ‖K_c‖_F² and yᵀK_c y every example is also paired
with itself. With the kernels K_ij = φ_iφ_jᵀ and L_ij = y_iy_jᵀ of two examples, ``(c, c)``, the mean over all i, j, q,
r that differ,

    h(K, L) = mean ⟨K_ij, L_ij⟩ − 2⟨K_ij, L_iq⟩ + ⟨K_ij, L_qr⟩,

has the expectation E⟨k̃(x, x'), ỹỹ'ᵀ⟩ over independent x, x', with features and targets centered by their true means.
(For c = 1 it is the HSIC_1 of Song et al., "Feature selection via dependence maximization", JMLR 2012.) The corrected
alignment is h(K, L) / √(h(K, K) h(L, L)). Such sums over different examples are sums over all examples minus the terms
with equal indices. With R_i = Σ_{j≠i} K_ij and S = Σ_i R_i, and R'_i and S' for L,

    n(n−1)(n−2)(n−3) h = (n²−3n+1) Σ_{i≠j}⟨K_ij, L_ij⟩ + Σ_{i≠j}⟨K_ij, L_ijᵀ⟩ + ⟨S, S'⟩
                         − 2(n−2) Σ_i⟨R_i, R'_i⟩ − 2 Σ_i⟨R_iᵀ, R'_i⟩.

A constant added to features or targets does not change h. Targets are centered here, so R'_i = −ỹ_iỹ_iᵀ.

A sketch adds its own bias: each of its columns z_a defines a kernel of rank one, and h(K, K) is quadratic in K. The
mean over pairs of *different* columns removes both biases (compare Chun et al., arXiv 2502.15104). Everything is
computed from raw sums over examples, :class:`PairSums`.

The functions raise ``TypeError`` for sums that are not :class:`.Moments` or pairs that are not :class:`PairSums`, and
``ValueError`` if a sum is not finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignreg import checks, estimators, moments
from alignreg.formulas import mean_of_different, norm2_of_targets, quotient
from alignreg.moments import Moments


class PairSums(NamedTuple):
    """Raw sums over examples i of features z_ik ``(m,)`` and targets y_i ``(c,)``, in addition to :class:`.Moments`."""

    outer: Tensor
    """Σ_i z_ika z_ilb, (c, m, c, m)."""
    squares: Tensor
    """Σ_i g_ab² with g_ab = Σ_k z_ika z_ikb, (m, m)."""
    cubes: Tensor
    """Σ_i g_ab z_ikb, (m, m, c)."""
    crossed: Tensor
    """Σ_i z_ika y_il, (c, c, m)."""
    weighted: Tensor
    """Σ_i u_ia z_ika with u_ia = Σ_k y_ik z_ika, (c, m)."""
    targets_weighted: Tensor
    """Σ_i u_ia y_il, (c, m)."""
    weights2: Tensor
    """Σ_i u_ia², (m,)."""
    targets_outer: Tensor
    """Σ_i y_iy_iᵀ, (c, c)."""
    targets3: Tensor
    """Σ_i ‖y_i‖² y_i, (c,)."""
    targets4: Tensor
    """Σ_i ‖y_i‖⁴, ()."""


class Columns(NamedTuple):
    """h by columns of a sketch; for fewer than four examples it is zero, and the alignment is NaN."""

    products: Tensor
    """h of the kernel of each column with that of the targets, (m,)."""
    squares: Tensor
    """h of the kernels of two columns, (m, m)."""
    targets: Tensor
    """h of the kernel of the targets with itself, ()."""

    def alignment(self, block: int = 1, exact: int = 0) -> Tensor:
        """Return the alignment of the population, as :func:`.population.alignment` does."""
        return quotient(
            estimators.total(self.products, exact),
            estimators.off_diagonal_mean(self.squares, block, exact),
            self.targets,
        )


def of(z: Tensor, y: Tensor) -> PairSums:
    """Return the sums of a batch with pushforward z ``(n, c, m)`` and targets as values y ``(n, c)``."""
    z, y = moments.sample(z, y)
    g = torch.einsum("ika,ikb->iab", z, z)
    u = torch.einsum("ik,ika->ia", y, z)
    norms2, flat = y.square().sum(1), z.flatten(1)
    return PairSums(
        outer=(flat.T @ flat).reshape(*z.shape[1:], *z.shape[1:]),
        squares=g.square().sum(0),
        cubes=torch.einsum("iab,ikb->abk", g, z),
        crossed=torch.einsum("ika,il->kla", z, y),
        weighted=torch.einsum("ia,ika->ka", u, z),
        targets_weighted=torch.einsum("ia,il->la", u, y),
        weights2=u.square().sum(0),
        targets_outer=y.T @ y,
        targets3=norms2 @ y,
        targets4=norms2.square().sum(),
    )


def zeros(c: int, m: int) -> PairSums:
    """Return the sums of no examples, for c ≥ 1 outputs and m ≥ 1 directions."""
    c, m = checks.count("c", c), checks.count("m", m)
    shapes = ((c, m, c, m), (m, m), (m, m, c), (c, c, m), (c, m), (c, m), (m,), (c, c), (c,), ())
    return PairSums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def alignment(sums: Moments, pairs: PairSums, *, block: int = 1, exact: int = 0) -> Tensor:
    """Estimate the alignment of the population, which may lie outside [0, 1].

    It is NaN where the estimate of its norm is not positive, and for fewer than four examples.

    Raises:
        ConstantTargetError: if the targets of all examples are equal.
        ValueError: if there are no examples.
    """
    return columns(sums, pairs, exact).alignment(block, exact)


def columns(sums: Moments, pairs: PairSums, exact: int = 0) -> Columns:
    """Return h by columns, which the jackknife of :func:`alignment` leaves out; the errors are the same."""
    moments.require_different_targets(sums)
    if not isinstance(pairs, PairSums):
        raise TypeError(f"pairs: expected PairSums, got {type(pairs).__name__}. Create them with population.of.")
    each = [checks.real(f"pairs.{field}", value).sum() for field, value in pairs._asdict().items()]
    checks.finite("pairs", torch.stack(each))
    tables = _products(sums, pairs, exact), _squares(sums, pairs), _norm2_of_targets(sums, pairs)
    return Columns(*(tables if float(sums.n) >= 4 else map(torch.zeros_like, tables)))


def _products(sums: Moments, pairs: PairSums, exact: int = 0) -> Tensor:
    """Return h of the kernel of each column with the targets, ``(m,)``."""
    f, n, mean = sums.features, sums.n, sums.targets / sums.n
    diagonal = _diagonal(pairs)
    own = pairs.weights2 - 2 * mean @ pairs.weighted + torch.einsum("k,l,kla->a", mean, mean, diagonal)
    weighted = pairs.targets_weighted - torch.einsum("k,kla->la", mean, pairs.crossed)
    weighted = weighted + mean[:, None] * (mean @ f - sums.features_targets)
    crossed = pairs.crossed - f[:, None] * mean[:, None]
    total = torch.einsum("ka,la->kla", f, f) - diagonal
    rows = own - (f * weighted).sum(0)
    return mean_of_different(
        moments.numerators(sums, exact) - own,
        torch.einsum("kla,lka->a", crossed, crossed) - own,
        -torch.einsum("kla,kl->a", total, _centered_outer(sums, pairs)),
        rows,
        rows,
        n,
    )


def _squares(sums: Moments, pairs: PairSums) -> Tensor:
    """Return h of the kernels of two columns, ``(m, m)``."""
    f, diagonal, N = sums.features, _diagonal(pairs), pairs.outer
    totals = f.T @ f
    inner = torch.einsum("ka,klb,la->ab", f, diagonal, f)
    through = torch.einsum("ka,abk->ab", f, pairs.cubes)  # Σ_i g_ab f_a·z_ib
    met = pairs.squares - through - through.T
    return mean_of_different(
        sums.gram.square() - pairs.squares,
        torch.einsum("kalb,lakb->ab", N, N) - pairs.squares,
        totals.square() - inner - inner.T + torch.einsum("kla,klb->ab", diagonal, diagonal),
        sums.gram * totals + met,
        torch.einsum("ka,lb,lakb->ab", f, f, N) + met,
        sums.n,
    )


def _diagonal(pairs: PairSums) -> Tensor:
    """Return Σ_i z_ika z_ila, ``(c, c, m)``."""
    return torch.diagonal(pairs.outer, dim1=1, dim2=3)


def _norm2_of_targets(sums: Moments, pairs: PairSums) -> Tensor:
    mean, n, outer = sums.targets / sums.n, sums.n, pairs.targets_outer
    square = mean.square().sum()
    fourth = pairs.targets4 + 4 * mean @ outer @ mean - 4 * pairs.targets3 @ mean
    fourth = fourth + 2 * square * outer.trace() - 3 * n * square.square()
    return norm2_of_targets(_centered_outer(sums, pairs), fourth, n)


def _centered_outer(sums: Moments, pairs: PairSums) -> Tensor:
    return pairs.targets_outer - torch.outer(sums.targets, sums.targets) / sums.n
