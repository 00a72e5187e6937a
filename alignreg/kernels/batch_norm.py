"""Batch normalisation with frozen statistics."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignreg.kernels.calls import Scales
from alignreg.kernels.scales import by_channel


def batch_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales | None:
    """A = (x − μ)/√(σ² + ε) with running μ and σ²; no rule with those of the batch, which mix its examples."""
    if training:
        return None
    return by_channel(input, lambda: F.batch_norm(input, running_mean, running_var, eps=eps))


def folded(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Frozen batch normalisation as one scale and one shift, whose vectorised derivative is one product."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1,) + (1,) * (input.ndim - 2)
    return input * scale.reshape(shape) + shift.reshape(shape)
