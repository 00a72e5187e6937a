"""The examples of one evaluation of a loss, and what is expected of them."""

from __future__ import annotations

from typing import Any, NamedTuple, final

from torch import Tensor

from alignreg import checks
from alignreg.tangents.batch import Batch


class Sample(NamedTuple):
    """The examples of one evaluation of a loss."""

    x: Batch
    y: Tensor | None
    """Targets as they came; ``None`` if none did."""
    outputs: Tensor | None
    """What the main forward pass made of them, with its graph; ``None`` if it is not to be reused."""
    drawn_from: int
    """How many examples the batch had."""
    draw: int
    """The number of this evaluation, from which random numbers follow."""


@final
class UndefinedLossError(Exception):
    """A loss has no value at these examples, as the message says: it is zero there."""


def check_targets(y: Any, n: int, *, required: bool) -> None:
    """Check that targets are those of n inputs."""
    if y is None and required:
        raise ValueError("target: expected the targets of the inputs, got none. Call reg(x, y).")
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(y).__name__}. Convert it with torch.as_tensor.")
    if y is not None and (y.ndim == 0 or len(y) != n):
        raise ValueError(f"target: expected one row for each of the {n} inputs, got shape {tuple(y.shape)}.")


def check_outputs(outputs: Any, n: int) -> None:
    """Check that outputs, if there are any, are those of n inputs."""
    if outputs is None:
        return
    checks.dense("outputs", outputs)
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(f"outputs: expected shape (n, c) for n = {n} inputs, got {tuple(outputs.shape)}.")
