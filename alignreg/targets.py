"""What a target means, the same everywhere."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


@final
class ConstantTargetError(ValueError):
    """All examples have the same target, for which alignment is undefined."""

    def __init__(self) -> None:
        super().__init__(
            "target: expected targets that differ between examples, got constant ones: alignment is undefined. "
            "Add examples of other classes."
        )


def encode(target: Tensor, num_outputs: int, n: int | None = None) -> Tensor:
    """Return targets as values y ``(n, c)`` in float64, not centred.

    Integers ``(n,)`` with c > 1 are class indices and become one-hot rows. ``(n, c)`` are values, of any dtype. With
    c = 1, ``(n,)`` are values too, so 0/1 and ±1 labels both serve.

    Args:
        target: class indices or values.
        num_outputs: their number c.
        n: the number of examples that there must be, if known.

    Raises:
        TypeError: if ``target`` is no real tensor.
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
    c = num_outputs
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}. Convert it with torch.as_tensor.")
    if target.is_complex():
        raise TypeError(f"target: expected a real tensor, got {target.dtype}.")
    target = target.detach()
    if n is not None and (target.ndim == 0 or len(target) != n):
        raise ValueError(f"target: expected one row for each of the {n} inputs, got shape {tuple(target.shape)}.")
    if target.ndim == 1 and c > 1:
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                f"target: expected integer class indices (n,) or values (n, {c}) for {c} outputs, "
                f"got {target.dtype} of shape {tuple(target.shape)}. Convert labels with .long()."
            )
        outside = target[(target < 0) | (target >= c)]
        if len(outside):
            raise ValueError(f"target: expected class indices in [0, {c}), got {outside[0].item()}.")
        return torch.nn.functional.one_hot(target.long(), c).to(torch.float64)
    if target.ndim == 1 and c == 1:
        target = target.unsqueeze(1)
    if target.ndim != 2 or target.shape[1] != c:
        raise ValueError(
            f"target: expected values (n, {c}){' or class indices (n,)' if c > 1 else ' or (n,)'}, "
            f"got shape {tuple(target.shape)}."
        )
    values = target.to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("target: expected finite values, got NaN or inf.")
    return values
