"""The module inside the wrappers of training, and communication with the other ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from alignreg.distributed.sharding import is_shard, is_sharded


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    The result is the object that the wrapper trains; nothing is copied.

    Args:
        model: a module, wrapped any number of times.

    Raises:
        TypeError: if ``model`` is not a module, or if its parameters are shards that cannot be gathered (of FSDP1 or of
            tensor parallelism).

    Example:
        >>> import torch
        >>> from alignreg.distributed.wrappers import unwrap
        >>> net = torch.nn.Linear(2, 1)
        >>> unwrap(torch.nn.DataParallel(net)) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    for path, kind in _out_of_reach(model):
        raise TypeError(
            f"model: {path or 'the model itself'} is sharded by {kind}, so its parameters hold only one rank's shard. "
            "Use fully_shard (FSDP2) or DistributedDataParallel, or pass a gathered copy."
        )
    *_, bare = _chain(model)
    return bare


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in a group (by default of all processes); 0 without a process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the tensor that the first rank of a group has, on all its ranks."""
    value = value.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(value, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return value


def counts_of_ranks(
    counts: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Return each of the counts on all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [[count] for count in counts]
    mine = torch.tensor(counts, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    result: list[list[int]] = torch.stack(every, dim=1).tolist()
    return result


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of the ranks' values, which can be differentiated once.

    All ranks are assumed to compute the same scalar from the sum. The gradient at a rank is that of its own value times
    the number of ranks. The *mean* over ranks of the parameters' gradients, as ``DistributedDataParallel`` computes it,
    is then the gradient of that scalar.

    Args:
        value: a tensor of the same shape on all ranks.
        group: the process group; by default all processes.
    """
    if world_size() == 1:
        return value
    total: Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def concatenate_over_ranks(value: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks.

    Args:
        value: a tensor of the same shape on all ranks except for axis 0.
        sizes: the number of rows of each rank.
        group: the process group; by default all processes.
    """
    if len(sizes) == 1:
        return value
    padded = value.new_zeros(max(sizes), *value.shape[1:])
    padded[: len(value)] = value.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _all_reduce(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@final
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        return _all_reduce(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None


@final
class AllReduce(torch.autograd.Function):
    """A sum over ranks that is differentiable any number of times: the gradient of each part is the sum over all ranks.

    Use it if each rank computes something different from the sum; :func:`sum_over_ranks` assumes the same result.
    """

    @staticmethod
    def sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum over ranks. All ranks must call this, and go backward through it, together."""
        total: Tensor = AllReduce.apply(value, group)  # type: ignore[no-untyped-call]
        return total

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduce(value, group)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return AllReduce.sum(gradient, ctx.group), None


def find_ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the ``DistributedDataParallel`` among the wrappers of ``model``, prepared for :func:`require_sync`."""
    for module in _chain(model):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if _note_outputs not in module._forward_hooks.values():  # noqa: SLF001 - hooks have no public list
                module.register_forward_hook(_note_outputs)
            return module
    return None


def require_sync(loss: Tensor, ddp: nn.parallel.DistributedDataParallel) -> None:
    """Make the backward pass of ``loss`` raise if DDP would not average its gradients over ranks.

    DDP averages the gradients of the backward pass that its own forward pass prepared, and of no other. The losses of
    this package reach the parameters without that forward pass. Their gradients are averaged if both losses are
    differentiated in **one** backward pass; otherwise they stay on their rank, and the replicas diverge.

    Args:
        loss: a differentiable scalar of the bare module.
        ddp: the result of :func:`find_ddp`.
    """
    if not loss.requires_grad or ddp.process_group.size() == 1:
        return

    def at_the_end(_: Tensor) -> None:
        task = _backward_pass()

        def check() -> None:
            if ddp.require_backward_grad_sync and _last_backward.get(ddp) not in (task, _UNKNOWN):
                raise RuntimeError(
                    "a loss on tangent features was differentiated without the output of the DistributedDataParallel "
                    "model, so its gradients were not averaged over ranks: the replicas now differ. Add both losses "
                    "and call backward() once, as in (task_loss(model(x), y) + reg(x, y)).backward(); or call "
                    "reg(x, y).backward() first, under model.no_sync(), and then that of the task's loss."
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)  # noqa: SLF001 - as DDP does

    loss.register_hook(at_the_end)  # type: ignore[no-untyped-call]


_last_backward: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_UNKNOWN = -2  # not the number of a backward pass; outside a backward pass, torch gives -1


def _backward_pass() -> int:
    number: int = torch._C._current_graph_task_id()  # noqa: SLF001 - the only identity of a backward pass
    return number


# The hook is defined at module level, so that a model with it can be pickled.
def _note_outputs(module: nn.Module, _: Any, output: Any) -> None:
    def note(_: Tensor) -> None:
        _last_backward[module] = _backward_pass()

    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]
    if not tensors and torch.is_grad_enabled():
        _last_backward[module] = _UNKNOWN  # without tensors in the output, nothing can be checked


def hooks_on_outputs(outputs: Tensor) -> bool:
    """Return whether a tensor has hooks on its gradient other than those of :func:`find_ddp`."""
    hooks = outputs._backward_hooks or {}  # noqa: SLF001 - they have no public list
    return any(getattr(hook, "__module__", None) != __name__ for hook in hooks.values())


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    while True:
        yield model
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return


def _out_of_reach(model: nn.Module) -> Iterator[tuple[str, str]]:
    # Code that shards has imported this module already; importing it here would slow down all other users.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for path, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                yield path, "FullyShardedDataParallel"
    for path, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ()) if is_shard(parameter) else ()
        if sum(not placed.is_replicate() for placed in placements) > 1:
            yield path, "tensor parallelism"
    if not is_sharded(model):
        yield from ((path, "a DTensor layout") for path, p in model.named_parameters() if is_shard(p))
