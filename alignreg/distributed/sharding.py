"""Models whose parameters are sharded over ranks by ``fully_shard``."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` (FSDP2) was applied to the model or to a part of it."""
    return any(True for _ in _sharded_modules(model))


def is_shard(parameter: Any) -> bool:
    """Return whether a parameter is a ``DTensor``, of which each rank holds a part."""
    # Code that shards has imported this module already; importing it here would slow down all other users.
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(parameter, dtensor.DTensor)


def ranks_of(model: nn.Module) -> int | None:
    """Return the number of ranks over which ``fully_shard`` sharded the parameters, or ``None``."""
    sizes = [shard.device_mesh.size() for shard in model.parameters() if is_shard(shard)]  # type: ignore[attr-defined]
    return min(sizes, default=None)


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass leaves behind, so that each rank holds only its shards."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give a sharded model whole parameters inside the ``with`` block; leave any other model unchanged.

    The parameters are tensors with a graph through which the shards receive the mean over ranks of the gradients, as
    with ``fully_shard``. All ranks must enter the block, and go backward through that graph, together.
    """
    modules = list(_sharded_modules(model))
    if not modules:
        yield
        return
    reshard(model)
    places = ("_forward_pre_hooks", "_forward_hooks")
    hooks = [(module.__dict__, place, module.__dict__[place]) for module in modules for place in places]
    owners: list[Any] = [module._parameters for module in model.modules()]  # noqa: SLF001 - as torch.func.functional_call does
    shards = [(owned, name, shard) for owned in owners for name, shard in owned.items() if is_shard(shard)]
    whole = {id(shard): _whole(shard) for _, _, shard in shards}
    try:
        for attributes, place, own in hooks:
            # The hooks of fully_shard would replace these parameters by its own.
            attributes[place] = OrderedDict((key, hook) for key, hook in own.items() if not _of_fully_shard(hook))
        for owned, name, shard in shards:
            owned[name] = whole[id(shard)]
        yield
    finally:
        for holder, name, before in (*hooks, *shards):
            holder[name] = before


def _whole(shard: Any) -> Tensor:
    partial = sys.modules["torch.distributed.tensor"].Partial()
    result: Tensor = shard.full_tensor(grad_placements=[partial] * shard.device_mesh.ndim)
    if result.requires_grad:
        result = _Averaged.apply(result, shard.device_mesh.size())  # type: ignore[no-untyped-call]
    return result


@final
class _Averaged(torch.autograd.Function):
    """An identity whose gradient is divided by the number of ranks, over which it is then summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # since torch 2.6
    if kind is not None:
        yield from (module for module in model.modules() if isinstance(module, kind))


def _of_fully_shard(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard")
