"""The module behind the wrappers that training puts around it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module behind ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    The result is the same object that the wrapper trains: nothing is copied.

    Args:
        model: a module, wrapped any number of times.

    Raises:
        TypeError: if ``model`` is no module, or its parameters are sharded (FSDP1, FSDP2): a shard has no
            tangent features of its own.

    Example:
        >>> import torch
        >>> from alignreg.distributed import unwrap
        >>> net = torch.nn.Linear(2, 1)
        >>> unwrap(torch.nn.DataParallel(net)) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    for path, kind in _sharded(model):
        raise TypeError(
            f"model: {path or 'the model itself'} is sharded by {kind}, whose parameters hold one rank's shard "
            "only. Pass a model with whole parameters: wrap it in DistributedDataParallel, or measure a gathered copy."
        )
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _sharded(model: nn.Module) -> Iterator[tuple[str, str]]:
    # Whoever shards has imported these already; importing them here would slow everybody else down.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    dtensor = sys.modules.get("torch.distributed.tensor")
    if fsdp is not None:
        for path, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                yield path, "FullyShardedDataParallel"
    if dtensor is not None:
        for path, parameter in model.named_parameters():
            if isinstance(parameter, dtensor.DTensor):
                yield path, "fully_shard or another DTensor layout"
