"""Modules that normalize by batch statistics in training mode."""

from __future__ import annotations

from abc import ABC
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from typing_extensions import override

from alignreg.distributed.wrappers import AllReduce

Statistics = Literal["running", "training"]
"""The statistics by which modules in training mode normalize: those of predictions, or those of the batch."""


def keeps_running_statistics(module: nn.Module) -> bool:
    """Return whether the module, torch's or a user's own, normalizes differently in training and evaluation mode."""
    names = module._buffers.keys()  # noqa: SLF001 - named_buffers() is slow, and scripted modules lack an iterator
    return isinstance(module, _NormBase) or any(name.startswith("running_") for name in names)


def couples_examples(module: nn.Module) -> bool:
    """Return whether the module's output for an example, in its present mode, may depend on the other examples."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # noqa: SLF001 - the class of all of them
        return False
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and keeps_running_statistics(module)


class _Synced(nn.SyncBatchNorm, ABC):
    """Torch's class with a forward pass that is differentiable any number of times, and runs on CPUs too."""

    ranks: dist.ProcessGroup | None
    """The ranks whose examples the statistics come from; ``None`` for this rank only."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.ranks is None:
            return F.batch_norm(input, None, None, self.weight, self.bias, training=True, eps=self.eps)
        dims = (0, *range(2, input.ndim))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        sums = AllReduce.sum(torch.cat([count, wide.sum(dims)]), self.ranks)
        count, total = sums[:1], sums[1:]
        shape = (1, -1) + (1,) * (input.ndim - 2)
        centered = wide - (total / count).reshape(shape)
        variance = AllReduce.sum(centered.square().sum(dims), self.ranks) / count
        y = centered * (variance + self.eps).rsqrt().reshape(shape)
        if self.weight is not None:
            y = y * self.weight.reshape(shape)
        if self.bias is not None:
            y = y + self.bias.reshape(shape)
        result: Tensor = y.to(input.dtype)
        return result


@cache
def differentiable(own: type) -> type[nn.SyncBatchNorm]:
    """Return a class like ``own``, torch's or one derived from it, with the forward pass of :class:`_Synced`."""
    # Insert _Synced between a derived class and torch's, so that the code of the derived class still runs.
    return type(own.__name__, (_Synced,) if own is nn.SyncBatchNorm else (own, _Synced), {})


def ranks_of(module: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """Return the ranks that share the module's statistics, and must run forward and backward passes together."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
