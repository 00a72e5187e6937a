"""The examples of one evaluation of a loss, and checks of its targets and outputs."""

from __future__ import annotations

from typing import Any, NamedTuple, final

from torch import Tensor

from alignreg import checks
from alignreg.tangents.batch import Batch


class Sample(NamedTuple):
    """The examples of one evaluation of a loss."""

    x: Batch
    y: Tensor | None
    """Targets as given to the loss."""
    outputs: Tensor | None
    """Outputs of the main forward pass, with their graph; ``None`` if the loss runs the model itself."""
    drawn_from: int
    """Size of the batch that the examples were drawn from."""
    draw: int
    """Number of this evaluation, which determines the random numbers."""


@final
class UndefinedLossError(Exception):
    """The loss has no value at these examples, for the reason in the message, and counts as zero."""


def check_targets(y: Any, n: int, *, required: bool) -> None:
    """Check that the targets belong to n inputs."""
    if y is None and required:
        raise ValueError("target: expected the targets of the inputs, got none. Call reg(x, y).")
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(y).__name__}. Convert it with torch.as_tensor.")
    if y is not None and (y.ndim == 0 or len(y) != n):
        raise ValueError(f"target: expected one row for each of the {n} inputs, got shape {tuple(y.shape)}.")


def check_outputs(outputs: Any, n: int) -> None:
    """Check that the outputs, if there are any, belong to n inputs."""
    if outputs is None:
        return
    checks.dense("outputs", outputs)
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(f"outputs: expected shape (n, c) for n = {n} inputs, got {tuple(outputs.shape)}.")
