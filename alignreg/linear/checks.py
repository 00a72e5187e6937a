"""What linear models and their metrics expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_matrix(features: Tensor, width: int | None = None) -> None:
    """Refuse what is no matrix of finite numbers, of a given width."""
    if features.ndim != 2 or features.numel() == 0 or width not in {None, features.shape[1]}:
        wanted = "(n, P)" if width is None else f"(m, {width})"
        raise ValueError(f"features: expected a matrix {wanted}, got shape {tuple(features.shape)}.")
    _check_finite("features", features)


def check_vector(name: str, value: Tensor) -> None:
    """Refuse what is no vector of finite numbers."""
    if value.ndim != 1 or value.numel() == 0:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(value.shape)}. Flatten single outputs.")
    _check_finite(name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if value.is_complex() or not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected real and finite numbers, got others. Look for missing values.")


def check_positive(name: str, value: float) -> None:
    """Refuse what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}.")


def check_eps(eps: float) -> None:
    """Refuse what is no relative lower limit of |a_j|."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps <= 1:
        raise ValueError(f"eps: expected a number in (0, 1], got {eps!r}. It is relative to the largest |a_j|.")
