"""Turn targets into values, in the same way everywhere."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from alignreg import checks

IGNORED = -100
"""The label of examples that torch's losses leave out, unless they are told another."""


@final
class ConstantTargetError(ValueError):
    """All examples have the same target, for which alignment is undefined."""

    def __init__(self, name: str = "target") -> None:
        super().__init__(
            f"{name}: expected targets that differ between examples, got constant ones: alignment is undefined. "
            "Add examples of other classes."
        )


def encode(target: Tensor, num_outputs: int, n: int | None = None, *, name: str = "target") -> Tensor:
    """Return targets as values y ``(n, c)`` in float64, not centered.

    Integers ``(n,)`` with c > 1 are class indices and become one-hot rows. ``(n, c)`` are values, of any dtype. With
    c = 1, ``(n,)`` are values too, so 0/1 and ±1 labels both serve.

    Args:
        target: class indices or values.
        num_outputs: their number c.
        n: the number of examples that there must be, if known.
        name: what messages call the target.

    Raises:
        TypeError: if ``target`` is no real and dense tensor.
        ValueError: if its shape fits neither reading, its length is not ``n``, a class is outside
            [0, num_outputs), or a value is NaN or infinite.

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
                " Labels of several positions need outputs of one: pick a position of each example, in the outputs by "
                f"forward_fn=lambda model, x: model(x)[:, -1] and in the labels by {name}[:, -1]."
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
                f" {IGNORED} is the ignore_index of torch's losses: leave such examples out first, by "
                f"keep = {name} != {IGNORED}, inputs[keep], {name}[keep]."
            )
        return ValueError(f"{name}: expected class indices in [0, {c}), got {outside[0].item()}.{hint}")

    checks.require(labels, lambda found: ((found >= 0) & (found < c)).all(), error)
    # Not one_hot of torch, which reads the labels from the device to look at them itself.
    return (labels.unsqueeze(1) == torch.arange(c, device=labels.device)).to(torch.float64)
