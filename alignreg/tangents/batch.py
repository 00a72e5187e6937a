"""Batches: a tensor, or a tuple or dict of tensors, with the examples on axis 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignreg import checks

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def as_batch(x: Any) -> Batch:
    """Return a tensor, or a sequence or mapping of dense tensors with equally many examples, as tensor, tuple or dict.

    Anything else, and an empty batch, raises a ``TypeError`` or ``ValueError``.
    """
    batch: Batch
    if isinstance(x, Tensor):
        batch = x
    elif isinstance(x, Mapping):
        batch = dict(x)
    elif isinstance(x, Sequence) and not isinstance(x, str):
        batch = tuple(x)
    else:
        raise TypeError(
            f"inputs: expected a tensor, or a tuple or dict of tensors, got {type(x).__name__}. "
            "Convert arrays with torch.as_tensor."
        )
    parts = tensors(batch)
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"inputs: every part must be a tensor with the examples on axis 0, got a {type(part).__name__}. "
                "Pass other objects through forward_fn."
            )
        checks.dense("inputs", part)
        if part.is_meta:
            raise ValueError("inputs: expected values, got a tensor on the meta device.")
        if part.ndim == 0:
            raise ValueError("inputs: expected the examples on axis 0, got a tensor without axes.")
    sizes = {part.shape[0] for part in parts}
    if len(sizes) != 1:
        raise ValueError(f"inputs: every part must hold the same number of examples on axis 0, got {sorted(sizes)}.")
    if sizes == {0}:
        raise ValueError("inputs: expected at least one example, got an empty batch. Skip empty batches.")
    return batch


def as_inputs(x: Any) -> Batch:
    """Return ``x`` like :func:`as_batch`; raise a ``ValueError`` if it has a gradient history, as predictions do."""
    batch = as_batch(x)
    if any(part.grad_fn is not None for part in tensors(batch)):
        raise ValueError(
            "inputs: expected the model's inputs, got a tensor with a grad_fn, probably predictions. Pass the inputs "
            "of the model: metric.update(x, y), reg(x, y). In a MetricCollection use keywords: "
            "update(inputs=x, preds=p, target=y)."
        )
    return batch


def tensors(x: Batch) -> list[Tensor]:
    """Return the tensors of ``x``, in order."""
    if isinstance(x, Tensor):
        return [x]
    return list(x.values()) if isinstance(x, dict) else list(x)


def map_tensors(fn: Callable[[Tensor], Tensor], x: Batch) -> Batch:
    """Apply ``fn`` to each tensor of ``x``."""
    if isinstance(x, Tensor):
        return fn(x)
    if isinstance(x, dict):
        return {name: fn(part) for name, part in x.items()}
    return tuple(fn(part) for part in x)


def slice_examples(x: Batch, start: int, stop: int) -> Batch:
    """Return the examples ``start:stop``."""
    return map_tensors(lambda t: t[start:stop], x)


def take(x: Batch, rows: Tensor) -> Batch:
    """Return the examples with the indices ``rows``."""
    return map_tensors(lambda t: t[on(rows, t.device)], x)


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the operations queued there."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def size(x: Batch) -> int:
    """Return the number of examples n."""
    return tensors(x)[0].shape[0]


def shapes(x: Batch) -> tuple[Any, ...]:
    """Return the properties that batches to be joined must share: structure, shapes of an example, dtypes."""
    keys = tuple(x) if isinstance(x, dict) else isinstance(x, Tensor)
    return keys, *((t.shape[1:], t.dtype) for t in tensors(x))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join batches of the same structure along axis 0."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))  # type: ignore[arg-type]
    columns = [torch.cat(parts) for parts in zip(*(tensors(batch) for batch in batches), strict=True)]
    return dict(zip(first, columns, strict=True)) if isinstance(first, dict) else tuple(columns)


def call(model: nn.Module, x: Batch) -> Any:
    """Call the model: ``model(x)``, ``model(*x)`` for a tuple, ``model(**x)`` for a dict."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, dict) else model(*x)


def flat(value: Tensor, keep: int = 1) -> Tensor:
    """Flatten all axes after the first ``keep`` (adds one if there are none)."""
    return value.reshape(*value.shape[:keep], math.prod(value.shape[keep:]))
