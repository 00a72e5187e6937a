"""Activations and similar functions whose backward passes have no derivative, or one that is NaN."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.primitives.precision import widened


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002 - torch's name
    """Return relu6(x + 3) / 6."""
    y = (F.relu6(widened(input) + 3) / 6).to(input.dtype)
    return input.copy_(y) if inplace else y


def logcumsumexp(input: Tensor, dim: int) -> Tensor:  # noqa: A002
    """Return the logarithms of the sums of exponentials up to each place, computed separately at quadratic cost."""
    if input.ndim == 0:
        return input.clone()
    x = input.movedim(dim, -1)
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    y: Tensor = x[..., None, :].masked_fill(later, -math.inf).logsumexp(-1)
    return y.movedim(-1, dim)
