r"""Moments of sketched tangent features: raw sums that add over batches, ranks and groups.

With ``z_ik = Sᵀ∇_w f_k(x_i)`` (m numbers, without a factor 1/√m) and targets y_ik, all sums are in float64 and
uncentered; centering comes last, so that ``moments(a ++ b) == moments(a) + moments(b)``.

The numerator of alignment, yᵀK_c y = ‖Φᵀ(y − ȳ)‖², needs the mean ȳ of *all* targets, which no batch knows. Each
batch b therefore contributes the exact ``a_b = Φ_bᵀ(y_b − 1π_bᵀ)`` with a guess π_b, and the rest, ``Φᵀ(ȳ − π)``, is
estimated with the sketch. With s_a = Sᵀa and s_b = Sᵀ(Φᵀ(ȳ − π)), both of which follow from sums,

    ‖Φᵀ(y − ȳ)‖² = ‖a − b‖² ≈ ‖a‖² − 2 s_a·s_b/m + ‖s_b‖²/m,

which is unbiased, and exact if π_b = ȳ. A batch of one row is its own mean, so its contribution comes only from the
sketch.

``block`` is the ``block_size`` of the sketch: the number of consecutive directions that depend on each other.

All functions raise ``TypeError`` for an argument that is not :class:`Moments`, and ``ValueError`` if the moments are
not finite or have too few directions, or if ``block`` does not divide their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignreg import checks, estimators
from alignreg.formulas import ratio_of_estimates
from alignreg.targets import ConstantTargetError


class Moments(NamedTuple):
    """Raw sums over examples i and outputs k; the text of the module defines the symbols.

    Example:
        >>> import torch
        >>> from alignreg import moments
        >>> z, y = torch.randn(6, 2, 4), torch.randn(6, 2)
        >>> whole = moments.of(z, y)
        >>> parts = moments.of(z[:2], y[:2]).merge(moments.of(z[2:], y[2:]))
        >>> torch.allclose(whole.gram, parts.gram)
        True
    """

    n: Tensor
    """The number of examples, ()."""
    features: Tensor
    """Σ_i z_ik, (c, m)."""
    gram: Tensor
    """Σ_ik z_ik z_ikᵀ, (m, m)."""
    features_targets: Tensor
    """Σ_ik z_ik y_ik, (m,)."""
    targets: Tensor
    """Σ_i y_ik, (c,)."""
    targets2: Tensor
    """Σ_ik y_ik², ()."""
    pullback: Tensor
    """a = Σ_b Φ_bᵀ(y_b − 1π_bᵀ), (P,); empty if every numerator comes from the sketch."""
    guess: Tensor
    """s_π = Σ_b Σ_k π_bk Σ_{i∈b} z_ik, (m,)."""

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both samples together; their shapes must be equal."""
        check(other, "other")
        for field, mine, theirs in zip(self._fields, self, other, strict=True):
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"moments: cannot add {field} of shapes {tuple(mine.shape)} and {tuple(theirs.shape)}. "
                    "Both must come from the same directions, outputs and parameters."
                )
        return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def add(self, z: Tensor, y: Tensor, *, pullback: Tensor | None = None, guess: Tensor | None = None) -> Moments:
        """Return the moments with a batch added; the arguments are those of :func:`of`."""
        return self.merge(of(z, y, pullback=pullback, guess=guess))

    def deflated(self, overlap: Tensor) -> Moments:
        """Return the moments of [ΦQ, ΦS − ΦQ(QᵀS)], from those of [ΦQ, ΦS]: without the part of S in Q.

        Args:
            overlap: QᵀS ``(k, m)``, for the k orthonormal directions Q of the first columns.
        """
        k, m = overlap.shape
        change = torch.eye(k + m, dtype=self.gram.dtype, device=self.gram.device)
        change[:k, k:] = -overlap.to(change)
        return self._changed(change)

    def without(self, columns: int) -> Moments:
        """Return the moments without the first columns."""
        return self._changed(torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)[:, columns:])

    def _changed(self, change: Tensor) -> Moments:
        return self._replace(
            features=self.features @ change,
            gram=change.T @ self.gram @ change,
            features_targets=self.features_targets @ change,
            guess=self.guess @ change,
        )

    def centered(self) -> Tensor:
        """Return the Gram matrix ``(m, m)`` of the centered sketch, Σ z zᵀ − n Σ_k μ_k μ_kᵀ with μ_k = Σ_i z_ik / n."""
        return self.gram - self.features.T @ self.features / self.n.clamp(min=1)


def of(z: Tensor, y: Tensor, *, pullback: Tensor | None = None, guess: Tensor | None = None) -> Moments:
    """Return the moments of one batch.

    Args:
        z: pushforward ΦS of the batch, ``(n, c, m)``.
        y: targets as values, ``(n, c)``.
        pullback: Φᵀ(y − 1πᵀ), flat ``(P,)``, for the π of ``guess``; by default the numerator of alignment comes from
            the sketch.
        guess: π, a guess of the mean of the targets, ``(c,)``; zero by default.

    Raises:
        TypeError: if an argument is not a real tensor.
        ValueError: if the shapes do not match, or values are not finite.
    """
    z, y = sample(z, y)
    s1 = z.sum(0)
    cross = torch.einsum("ikm,ik->m", z, y)
    flat = z.flatten(0, 1)
    if pullback is None:
        # There is no exact part: the guess is y itself, so a = 0.
        a, s_pi = z.new_zeros(0), cross
    else:
        a = _vector("pullback", pullback).to(z)
        pi = z.new_zeros(z.shape[1]) if guess is None else _vector("guess", guess).to(z)
        if len(pi) != z.shape[1]:
            raise ValueError(f"guess: expected (c,) for the {z.shape[1]} outputs, got shape {tuple(pi.shape)}.")
        s_pi = pi @ s1
    return Moments(
        n=torch.full((), float(len(z)), dtype=torch.float64, device=z.device),
        features=s1,
        gram=flat.T @ flat,
        features_targets=cross,
        targets=y.sum(0),
        targets2=y.square().sum(),
        pullback=a,
        guess=s_pi,
    )


def sample(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features ``(n, c, m)`` and targets ``(n, c)`` of a batch, checked as for :func:`of`, in float64."""
    z, y = checks.real("z", z).detach(), checks.real("y", y, integers=True).detach()
    if z.ndim != 3 or z.shape[:2] != y.shape:
        raise ValueError(f"z, y: expected (n, c, m) and (n, c), got {tuple(z.shape)} and {tuple(y.shape)}.")
    return checks.finite("z", z).to(torch.float64), checks.finite("y", y).to(z.device, torch.float64)


def zeros(c: int, m: int, p: int) -> Moments:
    """Return the moments of no examples, for c ≥ 1 outputs, m ≥ 1 directions and p ≥ 0 parameters."""
    c, m, p = checks.count("c", c), checks.count("m", m), checks.count("p", p, 0)
    shapes = ((), (c, m), (m, m), (m,), (c,), (), (p,), (m,))
    return Moments(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def trace(moments: Moments, *, centered: bool = True, exact: int = 0) -> Tensor:
    """Estimate tr K_c (or tr K) without bias."""
    return estimators.trace(_gram(moments, centered=centered), exact)


def frobenius2(moments: Moments, *, centered: bool = True, block: int = 1, exact: int = 0) -> Tensor:
    """Estimate ‖K_c‖_F² (or ‖K‖_F²) without bias, by a number ≥ 0."""
    return estimators.frobenius2(_gram(moments, centered=centered), block, exact)


def participation_ratio(moments: Moments, *, centered: bool = True, block: int = 1, exact: int = 0) -> Tensor:
    """Estimate (tr K)² / ‖K‖_F² as the ratio of two unbiased estimates, in [1, n·c]; 0 for K = 0."""
    gram = _gram(moments, centered=centered)
    rows = moments.n * len(moments.targets)
    return ratio_of_estimates(estimators.trace2(gram, block, exact), estimators.frobenius2(gram, block, exact), rows)


def numerators(moments: Moments, exact: int = 0) -> Tensor:
    """Estimate yᵀK_c y from each direction, ``(m,)``; :func:`.estimators.total` of them is unbiased.

    They are equal if the numerator is exact. The first ``exact`` ones are the parts of the exact columns in it.
    """
    mean = check(moments).targets / moments.n.clamp(min=1)
    s_a = moments.features_targets - moments.guess
    s_b = mean @ moments.features - moments.guess
    random = torch.arange(len(s_a), device=s_a.device) >= exact
    return random * moments.pullback.square().sum() - 2 * (s_a * s_b) + s_b.square()


def numerator(moments: Moments, exact: int = 0) -> Tensor:
    """Estimate yᵀK_c y = ‖Φᵀ(y − ȳ)‖² ≥ 0, exact for one batch and otherwise unbiased up to the clamp at zero."""
    return estimators.total(numerators(moments, exact), exact).clamp(min=0)


def alignment(moments: Moments, *, centered: bool = True, block: int = 1, exact: int = 0) -> Tensor:
    r"""Estimate the alignment A = yᵀK_c y / (‖K_c‖_F ‖y − ȳ‖²), in [0, 1].

    The numerator is :func:`numerator`; the norm is the square root of an unbiased estimate. The ratio is consistent in
    m rather than unbiased, and :func:`alignreg.estimators.alignment` keeps it in its range.

    Raises:
        ConstantTargetError: if the targets of all examples are equal.
        ValueError: if there are no examples.
    """
    variance = require_different_targets(moments)
    norm2 = frobenius2(moments, centered=centered, block=block, exact=exact)
    return estimators.alignment(numerator(moments, exact) / variance, norm2)


def check(moments: Moments, name: str = "moments") -> Moments:
    """Return the moments after checking that they are :class:`Moments`, and finite."""
    if not isinstance(moments, Moments):
        raise TypeError(f"{name}: expected Moments, got {type(moments).__name__}. Create them with moments.of.")
    sums = [checks.real(f"{name}.{field}", value).sum() for field, value in moments._asdict().items()]
    checks.finite(name, torch.stack(sums))
    return moments


def _vector(name: str, value: Tensor) -> Tensor:
    value = checks.values(name, value).detach()
    if value.ndim != 1:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(value.shape)}.")
    return value


def _gram(moments: Moments, *, centered: bool) -> Tensor:
    check(moments)
    return moments.centered() if checks.flag("centered", centered) else moments.gram


def require_different_targets(moments: Moments) -> Tensor:
    """Return ‖y − ȳ‖², with the errors of :func:`alignment`."""
    if not float(check(moments).n) > 0:
        raise ValueError("alignment: no examples have been added.")
    variance = moments.targets2 - moments.targets.square().sum() / moments.n
    # The variance of a constant target is the rounding error of a difference of two sums.
    if float(variance) <= 1e-12 * float(moments.targets2):
        raise ConstantTargetError
    return variance
