"""The conversion of targets to values."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from alignreg import checks

IGNORED = -100
"""The label of examples that torch's losses ignore by default."""


@final
class ConstantTargetError(ValueError):
    """The error for examples with equal targets, for which alignment is undefined."""

    def __init__(self, name: str = "target") -> None:
        super().__init__(
            f"{name}: expected targets that differ between examples, got constant ones: alignment is undefined. "
            "Add examples of other classes."
        )


def encode(target: Tensor, num_outputs: int, n: int | None = None, *, name: str = "target") -> Tensor:
    """Return targets as values y ``(n, c)`` in float64, uncentered.

    With c > 1, integers ``(n,)`` are class indices and become one-hot rows. A tensor ``(n, c)`` of any dtype holds
    values. With c = 1, a tensor ``(n,)`` also holds values, such as labels 0/1 or ±1.

    Args:
        target: class indices or values.
        num_outputs: the number c of outputs.
        n: the required number of examples, if known.
        name: the name of the target in error messages.

    Raises:
        TypeError: if ``target`` is not a real and dense tensor.
        ValueError: if its shape is neither of these, its length is not ``n``, a class is outside [0, num_outputs), or a
            value is NaN or infinite.

    Example:
        >>> import torch
        >>> from alignreg.targets import encode
        >>> encode(torch.tensor([2, 0]), num_outputs=3)
        tensor([[0., 0., 1.],
                [1., 0., 0.]], dtype=torch.float64)
        >>> encode(torch.tensor([1, -1]), num_outputs=1).T
        tensor([[ 1., -1.]], dtype=torch.float64)
    """
    c = checks.count("num_outputs", num_outputs)
    target = checks.dense(name, target).detach()
    if target.is_complex():
        raise TypeError(f"{name}: expected a real tensor, got {target.dtype}.")
    if n is not None and (target.ndim == 0 or len(target) != n):
        raise ValueError(f"{name}: expected one row for each of the {n} inputs, got shape {tuple(target.shape)}.")
    if target.ndim == 1 and c > 1:
        return _one_hot(target, c, name)
    if target.ndim == 1:
        target = target.unsqueeze(1)
    if target.ndim != 2 or target.shape[1] != c:
        hint = ""
        if target.ndim > 1 and c > 1 and not target.is_floating_point():
            hint = (
                " If each example has several positions, select one: in the outputs with "
                f"forward_fn=lambda model, x: model(x)[:, -1], and in the labels with {name}[:, -1]."
            )
        raise ValueError(
            f"{name}: expected values (n, {c}){' or class indices (n,)' if c > 1 else ' or (n,)'}, "
            f"got shape {tuple(target.shape)}.{hint}"
        )
    return checks.finite(name, checks.real(name, target, integers=True).to(torch.float64))


def _one_hot(labels: Tensor, c: int, name: str) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected integer class indices (n,) or values (n, {c}) for {c} outputs, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}. Convert labels with .long()."
        )
    labels = labels.long()

    def error() -> ValueError:
        outside = labels[(labels < 0) | (labels >= c)]
        hint = ""
        if bool((outside == IGNORED).any()):
            hint = (
                f" {IGNORED} is the ignore_index of torch's losses. Remove these examples first: "
                f"keep = {name} != {IGNORED}, inputs[keep], {name}[keep]."
            )
        return ValueError(f"{name}: expected class indices in [0, {c}), got {outside[0].item()}.{hint}")

    checks.require(labels, lambda v: ((v >= 0) & (v < c)).all(), error)
    # torch's one_hot would wait for the device to check the labels again.
    return (labels.unsqueeze(1) == torch.arange(c, device=labels.device)).to(torch.float64)
