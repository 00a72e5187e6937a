"""Modules that normalize by the statistics of the batch while they train."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from alignreg.distributed import AllReduce

Statistics = Literal["running", "training"]
"""With which statistics modules in training mode normalize: those that they predict with, or those they train with."""


def keeps_running_statistics(module: nn.Module) -> bool:
    """Say whether the module normalizes otherwise in training mode than in evaluation mode: torch's or a user's own."""
    return isinstance(module, _NormBase) or any(
        name.startswith("running_") for name, _ in module.named_buffers(recurse=False)
    )


def couples_examples(module: nn.Module) -> bool:
    """Say whether what the module makes of an example, in its present mode, may depend on the others of the batch."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # noqa: SLF001 - the class of all of them
        return False
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and keeps_running_statistics(module)


def differentiable_forward(module: nn.Module, *, over_ranks: bool) -> Any:
    """Return a forward pass of a ``SyncBatchNorm`` in training mode that is differentiated any number of times.

    torch's own is differentiated once, and runs on accelerators only.

    Args:
        module: any module.
        over_ranks: with the statistics of all ranks' examples, for which all must run, and go backward, together; else
            with those of this rank's.

    Returns:
        The function of its input; ``None`` for other modules.
    """
    if not (isinstance(module, nn.SyncBatchNorm) and module.training):
        return None
    group = None
    if over_ranks and dist.is_available() and dist.is_initialized():
        group = module.process_group or dist.group.WORLD
        group = group if dist.get_world_size(group) > 1 else None
    return partial(_sync_batch_norm, module, group)


def _sync_batch_norm(module: nn.SyncBatchNorm, group: Any, x: Tensor) -> Tensor:
    if group is None:
        return F.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)
    dims = (0, *range(2, x.ndim))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_full((1,), wide.numel() / wide.shape[1])
    sums = AllReduce.sum(torch.cat([count, wide.sum(dims)]), group)
    count, total = sums[:1], sums[1:]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    centered = wide - (total / count).reshape(shape)
    variance = AllReduce.sum(centered.square().sum(dims), group) / count
    y = centered * (variance + module.eps).rsqrt().reshape(shape)
    if module.weight is not None:
        y = y * module.weight.reshape(shape)
    if module.bias is not None:
        y = y + module.bias.reshape(shape)
    result: Tensor = y.to(x.dtype)
    return result
