"""Tolerances within which two computations of the same numbers agree, given their rounding errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def signs(like: Tensor) -> Tensor:
    """Return fixed random signs of the shape, dtype and device of ``like``, for self-checks."""
    generator = torch.Generator(like.device).manual_seed(like.numel())
    return torch.empty(like.shape, device=like.device).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(like)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference of two derivatives above which they count as those of different functions.

    Rounding errors are far below √eps, but a rectifier whose input rounds to the other side of zero may come near it
    in single precision, for which the tolerance is therefore 1e-3.
    """
    return max(math.sqrt(torch.finfo(dtype).eps), 1e-3 if dtype == torch.float32 else 0.0)


def agrees(
    difference: Tensor, scale: Tensor, precision: torch.dtype, *, whole: Tensor | None = None, digits: float = 10
) -> Tensor:
    """Return, as a tensor, whether a difference between two computations of a derivative is a rounding error.

    ``scale`` is the norm of the derivative, and ``precision`` the coarsest dtype in the computation. ``digits`` eps of
    ``whole``, the norm of all derivatives computed together, are also allowed: a derivative that vanishes (of a bias
    before a normalization) has the rounding errors of the other terms.
    """
    allowed = tolerance(precision) * scale
    if whole is not None:
        allowed = allowed + digits * torch.finfo(precision).eps * whole.to(allowed.device)
    return difference.to(allowed.device) <= allowed


def representatives(n: int, seed: int = 0) -> list[int]:
    """Return the indices of the last, a random and the first example."""
    generator = torch.Generator().manual_seed(n + (seed << 32))
    return list(dict.fromkeys((n - 1, int(torch.randint(n, (), generator=generator, device="cpu")), 0)))


def rounding(y: Tensor, spread: Tensor, relative: float, precision: torch.dtype) -> Tensor:
    """Return the allowed difference between outputs ``(k, c)`` of the same function, in float64.

    It is the fraction ``relative`` of the spread of each output over examples, so that a large constant part hides no
    difference, plus the rounding error of the last digits in ``precision``, the coarsest dtype of the computation. The
    spread is that of the outputs ``spread`` ``(n, c)``.
    """
    y, spread = y.detach().double(), spread.detach().to(y.device).double()
    typical = spread.square().mean(0).sqrt()
    # A single example has no spread; its size replaces it.
    scale = spread.std(0) if len(spread) > 1 else typical
    return relative * scale + 4 * torch.finfo(precision).eps * (y.abs() + typical.median())
