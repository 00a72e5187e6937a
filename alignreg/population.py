r"""Sums over different examples alone: the alignment of the population, from a sample of it, without bias.

The alignment of n examples with their labels depends on n, since in ‖K_c‖_F² and yᵀK_c y every example also meets
itself. With the block kernels K_ij = φ_iφ_jᵀ and L_ij = y_iy_jᵀ, ``(c, c)``, the mean over all i, j, q, r that differ,

    h(K, L) = mean ⟨K_ij, L_ij⟩ − 2⟨K_ij, L_iq⟩ + ⟨K_ij, L_qr⟩,

has for its expectation E⟨k̃(x, x'), ỹỹ'ᵀ⟩ over independent x, x', features and targets centered by their true means.
(For c = 1 it is the HSIC_1 of Song et al., "Feature selection via dependence maximization", JMLR 2012.) The corrected
alignment is h(K, L) / √(h(K, K) h(L, L)). Such sums follow from sums over all examples less those that meet: with
R_i = Σ_{j≠i} K_ij and S = Σ_i R_i, those of L with a prime,

    n(n−1)(n−2)(n−3) h = (n²−3n+1) Σ_{i≠j}⟨K_ij, L_ij⟩ + Σ_{i≠j}⟨K_ij, L_ijᵀ⟩ + ⟨S, S'⟩
                         − 2(n−2) Σ_i⟨R_i, R'_i⟩ − 2 Σ_i⟨R_iᵀ, R'_i⟩.

A constant added to features or targets changes nothing; targets are centered here, so R'_i = −ỹ_iỹ_iᵀ.

A sketch has a bias of its own: each of its columns z_a makes a kernel of rank one, and h(K, K) is quadratic in K. Its
mean over pairs of *different* columns is unbiased in both respects (compare Chun et al., arXiv 2502.15104). All comes
from raw sums over examples, :class:`PairSums`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignreg import checks, estimators, moments
from alignreg.formulas import mean_of_different, norm2_of_targets, quotient
from alignreg.moments import Moments


class PairSums(NamedTuple):
    """Raw sums over examples i, of features z_ik ``(m,)`` and targets y_i ``(c,)``, beside :class:`.Moments`."""

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
    """h by columns of a sketch; zero, of which no alignment is made, for fewer than four examples."""

    products: Tensor
    """Of the kernel of each column with that of the targets, (m,)."""
    squares: Tensor
    """Of the kernels of two columns, (m, m)."""
    targets: Tensor
    """Of the kernel of the targets with itself, ()."""

    def alignment(self, block: int = 1) -> Tensor:
        """Return :func:`.population.alignment`."""
        return quotient(self.products.mean(), estimators.off_diagonal_mean(self.squares, block), self.targets)


def of(z: Tensor, y: Tensor) -> PairSums:
    """Return the sums of a batch.

    Args:
        z: pushforward ΦS of the batch, ``(n, c, m)``.
        y: targets as values, ``(n, c)``.

    Raises:
        TypeError: if they are no real tensors.
        ValueError: if the shapes do not fit, or values are not finite.
    """
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
    """Return the sums of no examples, for c outputs and m directions.

    Raises:
        ValueError: if a number is no positive integer.
    """
    c, m = checks.count("c", c), checks.count("m", m)
    shapes = ((c, m, c, m), (m, m), (m, m, c), (c, c, m), (c, m), (c, m), (m,), (c, c), (c,), ())
    return PairSums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def alignment(sums: Moments, pairs: PairSums, *, block: int = 1) -> Tensor:
    """Estimate the alignment of the population; it may lie outside [0, 1], and is NaN where its norm is not positive.

    NaN as well for fewer than four examples.

    Raises:
        ConstantTargetError: if the targets of all examples are equal.
        TypeError: if the sums are no :class:`.Moments`, or the pairs no :class:`PairSums`.
        ValueError: if there are no examples, or a sum is not finite.
    """
    return columns(sums, pairs).alignment(block)


def columns(sums: Moments, pairs: PairSums) -> Columns:
    """Return h by columns, of which the jackknife of :func:`alignment` leaves some out.

    Raises:
        ConstantTargetError: as :func:`alignment`.
        TypeError: as :func:`alignment`.
        ValueError: as :func:`alignment`.
    """
    moments.require_different_targets(sums)
    if not isinstance(pairs, PairSums):
        raise TypeError(f"pairs: expected PairSums, got {type(pairs).__name__}. Make them with population.of.")
    each = [checks.real(f"pairs.{field}", value).sum() for field, value in pairs._asdict().items()]
    checks.finite("pairs", torch.stack(each))
    found = _products(sums, pairs), _squares(sums, pairs), _norm2_of_targets(sums, pairs)
    return Columns(*(found if float(sums.n) >= 4 else map(torch.zeros_like, found)))


def _products(sums: Moments, pairs: PairSums) -> Tensor:
    """Return h of the kernel of each column with the targets, ``(m,)``."""
    f, n, mean = sums.features, sums.n, sums.targets / sums.n
    blocks = _blocks(pairs)
    own = pairs.weights2 - 2 * mean @ pairs.weighted + torch.einsum("k,l,kla->a", mean, mean, blocks)
    weighted = pairs.targets_weighted - torch.einsum("k,kla->la", mean, pairs.crossed)
    weighted = weighted + mean[:, None] * (mean @ f - sums.features_targets)
    crossed = pairs.crossed - f[:, None] * mean[:, None]
    total = torch.einsum("ka,la->kla", f, f) - blocks
    rows = own - (f * weighted).sum(0)
    return mean_of_different(
        moments.numerators(sums) - own,
        torch.einsum("kla,lka->a", crossed, crossed) - own,
        -torch.einsum("kla,kl->a", total, _centered_outer(sums, pairs)),
        rows,
        rows,
        n,
    )


def _squares(sums: Moments, pairs: PairSums) -> Tensor:
    """Return h of the kernels of two columns, ``(m, m)``."""
    f, blocks, N = sums.features, _blocks(pairs), pairs.outer
    totals = f.T @ f
    inner = torch.einsum("ka,klb,la->ab", f, blocks, f)
    through = torch.einsum("ka,abk->ab", f, pairs.cubes)  # Σ_i g_ab f_a·z_ib
    met = pairs.squares - through - through.T
    return mean_of_different(
        sums.gram.square() - pairs.squares,
        torch.einsum("kalb,lakb->ab", N, N) - pairs.squares,
        totals.square() - inner - inner.T + torch.einsum("kla,klb->ab", blocks, blocks),
        sums.gram * totals + met,
        torch.einsum("ka,lb,lakb->ab", f, f, N) + met,
        sums.n,
    )


def _blocks(pairs: PairSums) -> Tensor:
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
