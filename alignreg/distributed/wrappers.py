"""Find the module inside the wrappers of training, and whether its gradients are averaged over ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

from alignreg.distributed.sharding import is_shard, is_sharded


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module behind ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    The result is the same object that the wrapper trains: nothing is copied.

    Args:
        model: a module, wrapped any number of times.

    Raises:
        TypeError: if ``model`` is no module, or its parameters are shards that nothing here gathers: of FSDP1, of
            tensor parallelism.

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
            f"model: {path or 'the model itself'} is sharded by {kind}, whose parameters hold one rank's shard only. "
            "Use fully_shard (FSDP2) or DistributedDataParallel, or pass a gathered copy."
        )
    *_, bare = _chain(model)
    return bare


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in a group, of all by default; 0 where no process group is up."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 where no process group is up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def counts_of_ranks(
    counts: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Return each of some counts on all ranks, in the order of the ranks; on one process its own."""
    if world_size() == 1:
        return [[count] for count in counts]
    mine = torch.tensor(counts, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    found: list[list[int]] = torch.stack(every, dim=1).tolist()
    return found


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of each rank's value, which can be differentiated once.

    Every rank is taken to make the same scalar of the sum. The gradient that comes out at a rank is that of its own
    value times the number of ranks, so that the *mean* of the parameters' gradients over ranks, which
    ``DistributedDataParallel`` takes, is the gradient of that scalar.

    Args:
        value: of the same shape on all ranks.
        group: of processes; all by default.
    """
    if world_size() == 1:
        return value
    total: Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def concatenate_over_ranks(value: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rows of all ranks, in the order of the ranks.

    Args:
        value: of the same shape on all ranks but for axis 0.
        sizes: how many rows each rank has.
        group: of processes; all by default.
    """
    if len(sizes) == 1:
        return value
    padded = value.new_zeros(max(sizes), *value.shape[1:])
    padded[: len(value)] = value.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@final
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None


@final
class AllReduce(torch.autograd.Function):
    """A sum over ranks, differentiable any number of times: the gradient of each part is the sum of all ranks'.

    For what each rank makes differently of the sum, where :func:`sum_over_ranks` takes all to make the same of it.
    """

    @staticmethod
    def sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum over ranks, which must all call this, and go backward through it, together."""
        total: Tensor = AllReduce.apply(value, group)  # type: ignore[no-untyped-call]
        return total

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sum."""
        ctx.group = group
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients."""
        return AllReduce.sum(gradient, ctx.group), None


def find_ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the ``DistributedDataParallel`` among the wrappers of ``model``, made ready for :func:`require_sync`."""
    for module in _chain(model):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if _note_outputs not in module._forward_hooks.values():  # noqa: SLF001 - hooks have no public list
                module.register_forward_hook(_note_outputs)
            return module
    return None


def require_sync(loss: Tensor, ddp: nn.parallel.DistributedDataParallel) -> None:
    """Make the backward pass of ``loss`` raise where DDP would not average its gradients over ranks.

    DDP averages the gradients of the backward pass that its own forward pass prepared, and of no other. What reaches
    the parameters past its forward pass, as the losses of this package do, is averaged along when both are
    differentiated in **one** backward pass; alone, or in a second one, it stays on its rank and the replicas part.

    Args:
        loss: a differentiable scalar of the bare module.
        ddp: what :func:`find_ddp` returned.
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
_UNKNOWN = -2  # no pass has this number; -1 is that of no pass


def _backward_pass() -> int:
    number: int = torch._C._current_graph_task_id()  # noqa: SLF001 - the only name that a backward pass has
    return number


# At module level, so that a model with the hook can still be pickled.
def _note_outputs(module: nn.Module, _: Any, output: Any) -> None:
    def note(_: Tensor) -> None:
        _last_backward[module] = _backward_pass()

    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]
    if not tensors and torch.is_grad_enabled():
        _last_backward[module] = _UNKNOWN  # an object that cannot be looked into: nothing to hold against it


def hooks_on_outputs(outputs: Tensor) -> bool:
    """Say whether a tensor has hooks on its gradient, besides those of :func:`find_ddp`."""
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
    # Whoever shards has imported this already; importing it here would slow everybody else down.
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
