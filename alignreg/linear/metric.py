"""The metric of SuperNat, and the bound that it minimizes."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg import checks


def optimal_metric(correlations: Tensor, kappa: float = 1.0, eps: float = 1e-12) -> Tensor:
    r"""Return the metric ν_j = κ/\|a_j| ``(r,)``, which minimizes :func:`one_step_bound` for any κ > 0.

    By the Cauchy–Schwarz inequality, √(Σ ν_jλ_ja_j²)·√(Σ λ_j/ν_j) ≥ Σ λ_j|a_j|, with equality if and only if
    ν_j ∝ 1/\|a_j| wherever λ_j a_j ≠ 0 (Baratin et al., "Implicit Regularization via Neural Feature Alignment",
    AISTATS 2021: the metric of SuperNat). An \|a_j| below ``eps`` times the largest is raised to that value. If all
    a_j vanish, ν = 1.

    Args:
        correlations: a_j = u_jᵀ∇_f L, ``(r,)``.
        kappa: κ.
        eps: a number in (0, 1].

    Raises:
        TypeError: if ``correlations`` is no real tensor.
        ValueError: if it is no vector of finite numbers, or ``kappa`` or ``eps`` is out of range.

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
    r"""Return the complexity of one gradient step in the metric A_ν, √(Σ_j ν_jλ_ja_j²) · √(Σ_j λ_j/ν_j), a scalar.

    It is ‖A_νᵀδw‖·‖A_ν⁻¹Φ‖_F, over η, for the step δw = −η∇_w L of the parametrization *before* A_ν (Baratin et al.
    2021: n times a term of the Rademacher bound of a learning flow). Scaling ν by a constant does not change it. The
    minimum, at :func:`optimal_metric`, is Σ λ_j|a_j|.

    Args:
        eigenvalues: λ ≥ 0, ``(r,)``.
        correlations: a_j = u_jᵀ∇_f L, ``(r,)``.
        nu: ν > 0, ``(r,)``.

    Raises:
        TypeError: if an argument is no real tensor.
        ValueError: if they are not finite vectors of the same length, or have a wrong sign.

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
            raise ValueError(f"{name}: expected one for each of {len(eigenvalues)} eigenvalues, got {len(value)}.")
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
    """Return ``value``, which must be a vector of finite real numbers, in floating point."""
    numbers = checks.real(name, value, integers=True)
    if numbers.ndim != 1 or numbers.numel() == 0:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(numbers.shape)}. Flatten single outputs.")
    return checks.finite(name, numbers)


def relative_limit(eps: float) -> float:
    """Return ``eps``, the lower limit of |a_j| relative to the largest, which must be a number in (0, 1]."""
    hint = " It is relative to the largest |a_j|."
    return checks.number("eps", eps, "a number in (0, 1]", lambda value: 0 < value <= 1, hint)
