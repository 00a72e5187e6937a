"""Functions with a finite gradient at zero whose second derivatives there are NaN in torch's formulas.

Each calls torch's function on numbers in which zeros are replaced, and restores the values at zero afterwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from alignreg.tangents.primitives.norms import root


def std(*args: Any, **kwargs: Any) -> Tensor:
    """Return the standard deviation; its gradient is zero if all numbers are equal."""
    return root(torch.var(*args, **kwargs))


def std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the standard deviation, like :func:`std`, and the mean."""
    var, mean = torch.var_mean(*args, **kwargs)
    return root(var), mean


def atan2(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """Return the angle of (other, input); its gradient at the origin is zero."""
    origin = (input == 0) & (other == 0)
    away = torch.atan2(input, other.masked_fill(origin, 1))
    return torch.where(origin, torch.atan2(input.detach(), other.detach()), away)


def copysign(input: Tensor, other: Any) -> Tensor:  # noqa: A002
    """Return numbers with the size of ``input`` and the sign of ``other``; the gradient at size zero is zero."""
    zero = input == 0
    return torch.where(zero, torch.copysign(input.detach(), other), torch.copysign(input.masked_fill(zero, 1), other))


def sinc(input: Tensor) -> Tensor:  # noqa: A002
    """Return sin(πx)/(πx), by its series at zero."""
    zero = input == 0
    return torch.where(zero, 1 - (math.pi * input).square() / 6, torch.sinc(input.masked_fill(zero, 1)))
