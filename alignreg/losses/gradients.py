"""Clip the gradients of a loss, and attach gradients to its value before ``backward()``."""

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
    """Return the factor ≤ 1 that makes the gradients at most ``clip`` times as long as the parameters.

    ``value`` is that of the loss. ``together`` replaces a factor in place by its minimum over the ranks that sum one
    gradient, and returns whether there are several. The function waits for the device once, for this factor and for the
    deferred checks ``doubts``. It raises :class:`NonFiniteGradientError` if the gradients or the value are not finite,
    on any of these ranks.
    """
    length, limit = get_total_norm(gradients), clip * get_total_norm([p.detach() for p in parameters])
    # Weights that are all zero set no limit. A factor of −1 marks values that are not finite.
    share = (limit / length).float().masked_fill(~((limit > 0) & (length > limit)), 1.0)
    share = share.masked_fill(~(torch.isfinite(length) & torch.isfinite(value)), -1.0)
    several = together(share)
    numbers: list[float] = []
    deferred.look(share, numbers.extend)
    doubts.settle()
    if numbers[0] < 0:
        require_finite([value, *gradients])
        doubts.settle()
        if several:
            raise NonFiniteGradientError
        return float(limit.double() / get_total_norm([g.double() for g in gradients]))  # the norm had overflowed
    return numbers[0]


def with_gradients(value: Tensor, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the value with the given gradients with respect to the leaves."""
    result: Tensor = _Known.apply(value, gradients, *leaves)  # type: ignore[no-untyped-call]
    return result


@final
class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else gradient * factor for gradient in ctx.gradients)
