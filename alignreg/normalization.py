"""Normalisations from primitive operations, for derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@final
class PrimitiveNormalization(TorchFunctionMode):
    """Compute layer, group, instance, batch, RMS and weight normalisation from primitives inside the block.

    The fused kernels hand mean and scale to their derivative formulas as constants. A first derivative accounts for
    what depends on them; a derivative *of* a forward-mode or vectorised derivative silently misses it. That of a plain
    backward pass misses it in weight normalisation alone.

    Args:
        backward_only: for derivatives of plain backward passes. Checkpointed modules are recomputed outside the block,
            with the fused kernels, and must have been run with them.
    """

    def __init__(self, *, backward_only: bool = False) -> None:
        super().__init__()
        self._replacements = _WEIGHT_NORM if backward_only else _REPLACEMENTS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the normalisations and run anything else as it is."""
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


def _normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    return x * (x.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scale(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # Channels are on axis 1.
    shape = (-1,) + (1,) * (x.ndim - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Tensor:
    x = _normalise(input, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    x = input * (input.square().mean(tuple(range(-len(normalized_shape), 0)), keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def _group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _scale(_normalise(groups, (2,), eps).reshape(input.shape), weight, bias)


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation from primitives; running statistics are read, never written."""
    if training or running_mean is None or running_var is None:
        return _scale(_normalise(input, (0, *range(2, input.ndim)), eps), weight, bias)
    # Folded to one scale and one shift, which is also the quickest to differentiate.
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return _scale(input, scale, -running_mean * scale if bias is None else bias - running_mean * scale)


def _instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scale(_normalise(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _torch_batch_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001
) -> Tensor:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = tuple(axis for axis in range(v.ndim) if axis != dim)  # dim = -1 leaves them all
    return v * (g * v.square().sum(others, keepdim=True).rsqrt())


_WEIGHT_NORM: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,  # noqa: SLF001 - what both weight_norm of torch.nn.utils call
}
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
    torch.group_norm: _group_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.instance_norm: _torch_instance_norm,
    **_WEIGHT_NORM,
}
