r"""The metric of SuperNat, and the bound that it minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.linear.checks import check_eps, check_positive, check_vector


def optimal_metric(correlations: Tensor, kappa: float = 1.0, eps: float = 1e-12) -> Tensor:
    r"""Metric that minimises :func:`one_step_bound`: ν_j = κ/|a_j|, for any κ > 0.

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
        ValueError: if a is no vector of finite numbers, or ``kappa`` or ``eps`` is out of range.

    Example:
        >>> import torch
        >>> from alignreg.linear import optimal_metric
        >>> optimal_metric(torch.tensor([2.0, -0.5]))
        tensor([0.5000, 2.0000])
    """
    check_vector("correlations", correlations)
    check_positive("kappa", kappa)
    check_eps(eps)
    size = correlations.abs()
    largest = size.max()
    return torch.where(largest > 0, kappa / torch.maximum(size, eps * largest), torch.ones_like(size))


def one_step_bound(eigenvalues: Tensor, correlations: Tensor, nu: Tensor) -> Tensor:
    r"""Complexity of one gradient step in the metric A_ν, √(Σ_j ν_jλ_ja_j²) · √(Σ_j λ_j/ν_j).

    It is ‖A_νᵀδw‖·‖A_ν⁻¹Φ‖_F for the step δw = −η∇_w L of the parametrisation *before* A_ν, over η (Baratin et al.
    2021: n times a term of the Rademacher bound of a learning flow). Multiplying ν by a constant leaves it as it is.

    Args:
        eigenvalues: λ ≥ 0, ``(r,)``.
        correlations: a_j = u_jᵀ∇_f L, ``(r,)``.
        nu: ν > 0, ``(r,)``.

    Returns:
        A scalar; Σ λ_j|a_j| at the minimum, :func:`optimal_metric`.

    Raises:
        ValueError: if they are not vectors of one length and finite, or have a wrong sign.

    Example:
        >>> import torch
        >>> from alignreg.linear import one_step_bound
        >>> one_step_bound(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0]), torch.ones(2))
        tensor(5.)
        >>> one_step_bound(torch.tensor([4.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([2.0, 0.5]))
        tensor(4.)
    """
    for name, value in (("eigenvalues", eigenvalues), ("correlations", correlations), ("nu", nu)):
        check_vector(name, value)
        if value.shape != eigenvalues.shape:
            raise ValueError(f"{name}: expected as many as eigenvalues, {len(eigenvalues)}, got {len(value)}.")
    if bool((eigenvalues < 0).any()):
        raise ValueError(
            f"eigenvalues: expected none below 0, got {float(eigenvalues.min()):g}. Clamp rounding errors."
        )
    if bool((nu <= 0).any()):
        raise ValueError(f"nu: expected positive numbers, got {float(nu.min()):g}. A metric is invertible.")
    return (nu * eigenvalues * correlations.square()).sum().sqrt() * (eigenvalues / nu).sum().sqrt()
