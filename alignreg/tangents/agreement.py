"""When two ways to the same numbers agree: how far apart rounding alone may take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def signs(like: Tensor) -> Tensor:
    """Return fixed random signs of the shape, dtype and device of ``like``: the u of self-checks."""
    generator = torch.Generator(like.device).manual_seed(like.numel())
    return torch.empty(like.shape, device=like.device).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).to(like)


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference at which two ways to the same derivative count as different functions.

    Rounding alone stays far below √eps; a rectifier whose input rounds to the other side of zero may come near it
    in single precision, hence 1e-3 there.
    """
    return max(math.sqrt(torch.finfo(dtype).eps), 1e-3 if dtype == torch.float32 else 0.0)


def agrees(
    difference: Tensor, scale: Tensor, precision: torch.dtype, *, whole: Tensor | None = None, digits: float = 10
) -> Tensor:
    """Say, without reading it, whether a difference between two ways to a derivative is no more than rounding.

    Args:
        difference: by how much they differ.
        scale: the norm of what was computed.
        precision: the coarsest dtype on the way.
        whole: the norm of all that was computed along with it. Where a derivative vanishes (a bias before a
            normalization), what is left is rounding of the other terms.
        digits: how many eps of the whole may be left.
    """
    allowed = tolerance(precision) * scale
    if whole is not None:
        allowed = allowed + digits * torch.finfo(precision).eps * whole.to(allowed.device)
    return difference.to(allowed.device) <= allowed


def representatives(n: int, seed: int = 0) -> list[int]:
    """Return the indices of the last example, of a random one and of the first."""
    generator = torch.Generator().manual_seed(n + (seed << 32))
    return list(dict.fromkeys((n - 1, int(torch.randint(n, (), generator=generator, device="cpu")), 0)))


def rounding(y: Tensor, spread: Tensor, relative: float, precision: torch.dtype) -> Tensor:
    """Return by how much outputs ``(k, c)`` of the same function may differ, in float64.

    The bound is relative to the spread of each output over the examples, so that a large constant part hides nothing,
    and never below what the last digits leave.

    Args:
        y: the outputs.
        spread: outputs ``(n, c)`` of the same kind, from which the spread is taken.
        relative: the fraction of the spread that is allowed.
        precision: the coarsest dtype on the way to them.
    """
    y, spread = y.detach().double(), spread.detach().to(y.device).double()
    typical = spread.square().mean(0).sqrt()
    # A single example has no spread; its size takes the place of it.
    scale = spread.std(0) if len(spread) > 1 else typical
    return relative * scale + 4 * torch.finfo(precision).eps * (y.abs() + typical.median())
