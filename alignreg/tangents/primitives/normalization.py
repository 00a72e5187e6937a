"""Normalizations, computed like torch's kernels: in float32 at least, with results in the dtype of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.primitives.precision import widened


def _standardize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # Channels are on axis 1.
    shape = (-1,) + (1,) * (x.ndim - 2)
    return _affine(x, None if weight is None else weight.reshape(shape), None if bias is None else bias.reshape(shape))


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    """Normalize over the last axes."""
    x = _standardize(widened(input), tuple(range(-len(normalized_shape), 0)), eps)
    return _affine(x, weight, bias).to(input.dtype)


def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Divide by the root mean square over the last axes."""
    eps = _default_eps(input.dtype, input.device.type) if eps is None else eps
    x = widened(input)
    x = x * (x.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True) + eps).rsqrt()
    return _affine(x, weight, None).to(input.dtype)


@cache
def _default_eps(dtype: torch.dtype, device: str) -> float:
    """Return torch's default, which for half precision is its own eps in some versions, that of float32 in others."""
    own, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if own == wide:
        return own
    normalized = F.rms_norm(torch.full((1,), 1e-3, dtype=dtype, device=device), (1,))
    return wide if float(normalized) > 0.5 else own


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    """Normalize over groups of channels and all positions."""
    groups = widened(input).reshape(input.shape[0], num_groups, -1)
    return _by_channel(_standardize(groups, (2,), eps).reshape(input.shape), weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    """Normalize over the batch and all positions; running statistics are read, never written."""
    x = widened(input)
    if training or running_mean is None or running_var is None:
        return _by_channel(_standardize(x, (0, *range(2, x.ndim)), eps), weight, bias).to(input.dtype)
    # Folding into one scale and one shift is also the fastest to differentiate.
    mean, scale = running_mean.to(x.dtype), (running_var.to(x.dtype) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(x.dtype)
    shift = -mean * scale if bias is None else bias.to(x.dtype) - mean * scale
    return _by_channel(x, scale, shift).to(input.dtype)


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    """Normalize over the positions of each channel; running statistics are read, never written."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _standardize(widened(input), tuple(range(2, input.ndim)), eps)
    return _by_channel(x, weight, bias).to(input.dtype)


def torch_order(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return :func:`batch_norm` or :func:`instance_norm` with arguments in the order of ``torch.batch_norm``."""

    def reordered(
        input: Tensor,  # noqa: A002
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return norm(input, running_mean, running_var, weight, bias, *args, **kwargs)

    return reordered


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return vectors v scaled to lengths g; ``dim`` is the axis that numbers the vectors, −1 for a single vector."""
    others = tuple(axis for axis in range(v.ndim) if axis != dim)  # all axes for dim = -1
    x = widened(v)
    return (x * (g.to(x.dtype) * x.square().sum(others, keepdim=True).rsqrt())).to(v.dtype)
