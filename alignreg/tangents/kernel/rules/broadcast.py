"""Rules for products and sums of a tensor with a parameter that broadcasts to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales

# Rules get the place of the parameter among the tensors, its shape, the result, and the arguments of the function.


def product(place: int, shape: torch.Size, result: Tensor, input: Tensor, other: Tensor) -> Scales | None:  # noqa: A002
    """Return scales of a = x, since y = x ∘ w."""
    x = (input, other)[1 - place]
    return broadcast(shape, result, lambda: x)


def quotient(
    place: int,
    shape: torch.Size,
    result: Tensor,
    input: Tensor,  # noqa: A002, ARG001
    other: Tensor,
    rounding_mode: str | None = None,
) -> Scales | None:
    """Return scales of a = 1 / x for y = w / x, and of a = −y / w for y = x / w."""
    if rounding_mode is not None:
        return None
    return broadcast(shape, result, (lambda: 1 / other) if place == 0 else (lambda: -result / other))


def total(
    place: int,
    shape: torch.Size,
    result: Tensor,
    input: Tensor,  # noqa: A002
    other: Tensor,  # noqa: ARG001
    alpha: float = 1,
) -> Scales | None:
    """Return scales of a = α for y = x + α w, and of a = 1 for y = w + α x."""
    return broadcast(shape, result, lambda: input.new_full((), alpha if place == 1 else 1.0))


def difference(
    place: int,
    shape: torch.Size,
    result: Tensor,
    input: Tensor,  # noqa: A002
    other: Tensor,  # noqa: ARG001
    alpha: float = 1,
) -> Scales | None:
    """Return scales of a = −α for y = x − α w, and of a = 1 for y = w − α x."""
    return broadcast(shape, result, lambda: input.new_full((), -alpha if place == 1 else 1.0))


def choice(
    place: int,
    shape: torch.Size,
    result: Tensor,
    condition: Tensor,
    input: Tensor,  # noqa: A002, ARG001
    other: Tensor,  # noqa: ARG001
) -> Scales | None:
    """Return scales of a = 1 where w is chosen, and a = 0 elsewhere."""
    return broadcast(shape, result, lambda: (condition if place == 1 else ~condition).to(result.dtype))


def joined(
    place: int,
    shape: torch.Size,
    result: Tensor,
    tensors: Sequence[Tensor],
    dim: int = 0,
) -> Scales | None:
    """Return scales of a = 1 in the part of the result that w is in."""
    dim = dim % result.ndim - result.ndim
    start = sum(x.shape[dim] for x in tensors[:place])
    size = tensors[place].shape[dim]
    return broadcast(shape, result, None, lambda y: y.narrow(dim, start, size))


def expanded(place: int, shape: torch.Size, result: Tensor, *_: Any, **__: Any) -> Scales | None:  # noqa: ARG001
    """Return scales of a = 1 along the new axes."""
    return broadcast(shape, result, None)


def repeated(place: int, shape: torch.Size, result: Tensor, *_: Any, **__: Any) -> Scales | None:  # noqa: ARG001
    """Return scales of a = 1 along the repetitions, each of which is an axis before that of w."""
    own = (1,) * (result.ndim - len(shape)) + tuple(shape)
    sizes = [n for size, whole in zip(own, result.shape, strict=True) for n in (whole // max(1, size), size)]
    parted = tuple(n for size in own for n in (1, size))
    return broadcast(torch.Size(parted), result, None, lambda y: y.reshape(*y.shape[: y.ndim - len(own)], *sizes))


def _whole(y: Tensor) -> Tensor:
    return y


def broadcast(
    shape: torch.Size,
    result: Tensor,
    values: Callable[[], Tensor] | None,
    part: Callable[[Tensor], Tensor] = _whole,
) -> Scales | None:
    """Return a call that scales ``values()`` by a parameter; ``None`` if the parameter broadcasts along no axis.

    Args:
        shape: the shape of the parameter, which broadcasts to that of the part.
        result: the result of the function.
        values: returns the factors of the parameter, which broadcast to the part; ``None`` for ones.
        part: selects the part of the result that the parameter is in, also with axes before those of the result.
    """
    some = part(result)
    own = (1,) * (some.ndim - len(shape)) + tuple(shape)
    kept = [axis - some.ndim for axis, size in enumerate(own) if size != 1]
    lead = some.ndim - len(kept)
    if lead == 0:
        return None
    whole, like = some.shape, some.detach()[(0,) * some.ndim] if some.numel() else some.detach()

    def region(y: Tensor) -> Tensor:
        return part(y).movedim(kept, tuple(range(-len(kept), 0))) if kept else part(y)

    def flat(y: Tensor) -> Tensor:
        return (y.flatten(-len(kept)) if kept else y[..., None])[..., None]

    def inputs() -> Tensor:
        a = like.new_ones(()) if values is None else values()
        a = a.expand(whole)
        return flat(a.movedim(kept, tuple(range(-len(kept), 0))) if kept else a)

    return Scales(lead=lead, inputs=inputs, outputs=flat, region=region)
