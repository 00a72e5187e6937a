"""Modules that normalize by the statistics of the batch while they train."""

from __future__ import annotations

from abc import ABC
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from alignreg.distributed.wrappers import AllReduce

Statistics = Literal["running", "training"]
"""With which statistics modules in training mode normalize: those that they predict with, or those they train with."""


def keeps_running_statistics(module: nn.Module) -> bool:
    """Say whether the module normalizes otherwise in training mode than in evaluation mode: torch's or a user's own."""
    names = module._buffers.keys()  # noqa: SLF001 - named_buffers() is slow, and those of scripted modules have no iterator
    return isinstance(module, _NormBase) or any(name.startswith("running_") for name in names)


def couples_examples(module: nn.Module) -> bool:
    """Say whether what the module makes of an example, in its present mode, may depend on the others of the batch."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # noqa: SLF001 - the class of all of them
        return False
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and keeps_running_statistics(module)


class _Synced(nn.SyncBatchNorm, ABC):
    """Torch's class with a forward pass that is differentiated any number of times, and runs on CPUs too."""

    ranks: dist.ProcessGroup | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalize by the statistics of the examples of :attr:`ranks`, or of this rank's for ``None``."""
        return _sync_batch_norm(self, self.ranks, input)


@cache
def differentiable(own: type) -> type[nn.SyncBatchNorm]:
    """Return a class like ``own``, torch's or one derived from it, with the forward pass of :class:`_Synced`."""
    # Between a derived class and torch's, so that what the derived one does before and after is done.
    return type(own.__name__, (_Synced,) if own is nn.SyncBatchNorm else (own, _Synced), {})


def ranks_of(module: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """Return the ranks over which the module takes its statistics, which must run, and go backward, together."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


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
