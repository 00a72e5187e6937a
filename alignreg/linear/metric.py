r"""The metric of SuperNat, and the bound that it minimizes."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg import checks


def optimal_metric(correlations: Tensor, kappa: float = 1.0, eps: float = 1e-12) -> Tensor:
    r"""Metric that minimizes :func:`one_step_bound`: ν_j = κ/|a_j|, for any κ > 0.

    By Cauchy-Schwarz √(Σ ν_jλ_ja_j²)·√(Σ λ_j/ν_j) ≥ Σ λ_j|a_j|, with equality if and only if ν_j ∝ 1/|a_j| wherever
    λ_j a_j ≠ 0 (Baratin et al., "Implicit Regularization via Neural Feature Alignment", AISTATS 2021: the metric of
    SuperNat). |a_j| below ``eps`` times the largest counts as that; if all vanish, ν = 1.

    Args:
        correlations: a_j = u_jᵀ∇_f L, ``(r,)``.
        kappa: κ.
        eps: in (0, 1].

    Returns:
        ν, ``(r,)``.

    Raises:
        TypeError: if a is no real tensor.
        ValueError: if a is no vector of finite numbers, or ``kappa`` or ``eps`` is out of range.

    Example:
        >>> import torch
        >>> from alignreg.linear import optimal_metric
        >>> optimal_metric(torch.tensor([2.0, -0.5]))
        tensor([0.5000, 2.0000])
    """
    correlations = vector("correlations", correlations)
    kappa, eps = checks.positive("kappa", kappa), relative_limit(eps)
    size = correlations.abs()
    largest = size.max()
    return torch.where(largest > 0, kappa / torch.maximum(size, eps * largest), torch.ones_like(size))


def one_step_bound(eigenvalues: Tensor, correlations: Tensor, nu: Tensor) -> Tensor:
    r"""Complexity of one gradient step in the metric A_ν, √(Σ_j ν_jλ_ja_j²) · √(Σ_j λ_j/ν_j).

    It is ‖A_νᵀδw‖·‖A_ν⁻¹Φ‖_F for the step δw = −η∇_w L of the parametrization *before* A_ν, over η (Baratin et al.
    2021: n times a term of the Rademacher bound of a learning flow). Multiplying ν by a constant leaves it as it is.

    Args:
        eigenvalues: λ ≥ 0, ``(r,)``.
        correlations: a_j = u_jᵀ∇_f L, ``(r,)``.
        nu: ν > 0, ``(r,)``.

    Returns:
        A scalar; Σ λ_j|a_j| at the minimum, :func:`optimal_metric`.

    Raises:
        TypeError: if they are no real tensors.
        ValueError: if they are not vectors of one length and finite, or have a wrong sign.

    Example:
        >>> import torch
        >>> from alignreg.linear import one_step_bound
        >>> one_step_bound(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0]), torch.ones(2))
        tensor(5.)
        >>> one_step_bound(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([2.0, 0.5]))
        tensor(4.)
    """
    eigenvalues, correlations = vector("eigenvalues", eigenvalues), vector("correlations", correlations)
    nu = vector("nu", nu)
    for name, value in (("correlations", correlations), ("nu", nu)):
        if value.shape != eigenvalues.shape:
            raise ValueError(f"{name}: expected as many as eigenvalues, {len(eigenvalues)}, got {len(value)}.")
    checks.require(
        eigenvalues,
        lambda v: (v >= 0).all(),
        lambda: ValueError(
            f"eigenvalues: expected none below 0, got {float(eigenvalues.min()):g}. Clamp rounding errors."
        ),
    )
    checks.require(
        nu,
        lambda v: (v > 0).all(),
        lambda: ValueError(f"nu: expected positive numbers, got {float(nu.min()):g}. A metric is invertible."),
    )
    return (nu * eigenvalues * correlations.square()).sum().sqrt() * (eigenvalues / nu).sum().sqrt()


def vector(name: str, value: Tensor) -> Tensor:
    """Return a vector of finite numbers.

    Raises:
        TypeError: if it is no real tensor.
        ValueError: if it is no vector, or not finite.
    """
    found = checks.real(name, value, integers=True)
    if found.ndim != 1 or found.numel() == 0:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(found.shape)}. Flatten single outputs.")
    return checks.finite(name, found)


def relative_limit(eps: float) -> float:
    """Return a lower limit of |a_j| relative to the largest.

    Raises:
        ValueError: if it is no number in (0, 1].
    """
    hint = " It is relative to the largest |a_j|."
    return checks.number("eps", eps, "a number in (0, 1]", lambda value: 0 < value <= 1, hint)
