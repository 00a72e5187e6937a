"""Activations, sums and losses whose backward passes have no derivative, or one that is NaN."""

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


def multi_margin_loss(
    input: Tensor,  # noqa: A002 - torch's name
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the mean over the other classes of max(0, margin − x_target + x)^p."""
    if size_average is not None or reduce is not None:
        return F.multi_margin_loss(input, target, p, margin, weight, size_average, reduce, reduction)
    x, labels = (input, target) if input.ndim == 2 else (input[None], target.reshape(1))
    own = labels[:, None]
    short = (margin - x.gather(1, own) + x).clamp_min(0).pow(p).scatter(1, own, 0.0)
    short = short if weight is None else short * weight[own]
    losses = short.sum(1) / x.shape[1]
    if reduction == "none":
        return losses if input.ndim == 2 else losses[0]
    return losses.mean() if reduction == "mean" else losses.sum()
