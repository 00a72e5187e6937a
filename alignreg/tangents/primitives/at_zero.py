"""Functions whose gradient at zeros is finite, and whose second derivatives there are NaN in torch's formulas.

Each is torch's function away from zero, where zeros are replaced before it and put back after it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from alignreg.tangents.primitives.norms import root


def std(*args: Any, **kwargs: Any) -> Tensor:
    """Standard deviation, whose gradient at numbers that are all the same is zero."""
    return root(torch.var(*args, **kwargs))


def std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean."""
    var, mean = torch.var_mean(*args, **kwargs)
    return root(var), mean


def atan2(input: Tensor, other: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """Angle of (other, input), whose gradient at the origin is zero."""
    origin = (input == 0) & (other == 0)
    away = torch.atan2(input, other.masked_fill(origin, 1))
    return torch.where(origin, torch.atan2(input.detach(), other.detach()), away)


def copysign(input: Tensor, other: Any) -> Tensor:  # noqa: A002
    """Size of one and sign of the other, whose gradient at size zero is zero."""
    zero = input == 0
    return torch.where(zero, torch.copysign(input.detach(), other), torch.copysign(input.masked_fill(zero, 1), other))


def sinc(input: Tensor) -> Tensor:  # noqa: A002
    """The function sin(πx)/(πx), by its series at zero."""
    zero = input == 0
    return torch.where(zero, 1 - (math.pi * input).square() / 6, torch.sinc(input.masked_fill(zero, 1)))
