"""The gradients that a loss hands over: no longer than they may be, and computed before ``backward()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils import get_total_norm

from alignreg.checks import deferred
from alignreg.checks.deferred import Deferred
from alignreg.tangents.finite import NonFiniteGradientError, require_finite


def clipped_share(
    value: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    clip: float,
    together: Callable[[Tensor], bool],
    doubts: Deferred,
) -> float:
    """Return the part of the gradients, up to all of them, that is at most ``clip`` times as long as the parameters.

    Here the device is waited for, once: for this number and all that is in doubt.

    Args:
        value: of the loss.
        parameters: those that the gradients are of.
        gradients: by parameter.
        clip: the limit.
        together: reduces the part over the ranks that hold one gradient together, in place; returns whether there are
            several.
        doubts: what is still to be looked at.

    Raises:
        NonFiniteGradientError: if the gradients or the value are not finite, on any of these ranks.
    """
    length, limit = get_total_norm(gradients), clip * get_total_norm([p.detach() for p in parameters])
    # Weights that are all zero set no limit. What is not finite counts as less than nothing.
    share = (limit / length).float().masked_fill(~((limit > 0) & (length > limit)), 1.0)
    share = share.masked_fill(~(torch.isfinite(length) & torch.isfinite(value)), -1.0)
    several = together(share)
    found: list[float] = []
    deferred.look(share, found.extend)
    doubts.settle()
    if found[0] < 0:
        require_finite([value, *gradients])
        doubts.settle()
        if several:
            raise NonFiniteGradientError
        return float(limit.double() / get_total_norm([g.double() for g in gradients]))  # an overflow
    return found[0]


def with_gradients(value: Tensor, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a value whose gradients with respect to some leaves are known already."""
    result: Tensor = _Known.apply(value, gradients, *leaves)  # type: ignore[no-untyped-call]
    return result


@final
class _Known(torch.autograd.Function):
    """A value whose gradient with respect to some leaves is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else gradient * factor for gradient in ctx.gradients)
