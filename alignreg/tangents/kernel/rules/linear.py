"""Rules for linear maps, and for convolutions of any dimension, which are linear maps of patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Maps

Sizes = int | Sequence[int]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Maps:  # noqa: A002, ARG001 - torch's names
    """Return the map y = x Wᵀ + b, for which a = x and d = ∂f/∂y."""
    return Maps(
        lead=input.ndim - 1,
        inputs=lambda: input[..., None, :, None],
        outputs=lambda d: d[..., None, :, None],
    )


def convolution(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Maps:
    """Return the linear map of every patch; a are the patches and t the output positions."""
    kernel = weight.shape[2:]
    spatial = len(kernel)
    step, spread = _sizes(stride, spatial), _sizes(dilation, spatial)

    def patches() -> Tensor:
        x = F.pad(input, _padding(padding, kernel, spread))
        lead = x.ndim - spatial  # the number of axes before the spatial ones, including channels
        for axis in range(spatial):
            reach = spread[axis] * (kernel[axis] - 1) + 1
            x = x.unfold(lead + axis, reach, step[axis])[..., :: spread[axis]]
        # (*lead, channels, *positions, *kernel) -> (*lead, groups, channels of a group · kernel, positions)
        positions, windows = range(lead, lead + spatial), range(lead + spatial, lead + 2 * spatial)
        x = x.permute(*range(lead), *windows, *positions).flatten(-spatial)
        return x.reshape(*x.shape[: lead - 1], groups, -1, x.shape[-1])

    return Maps(
        lead=input.ndim - 1 - spatial,
        inputs=patches,
        outputs=lambda d: d.reshape(*d.shape[: -spatial - 1], groups, d.shape[-spatial - 1] // groups, -1),
    )


def _sizes(value: Sizes, spatial: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def _padding(padding: Sizes | str, kernel: torch.Size, spread: tuple[int, ...]) -> list[int]:
    """Return the padding before and after each axis in the order of ``F.pad``: the last axis first."""
    if padding == "same":
        # If the total is odd, torch puts the larger half after.
        totals = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sizes = (0,) * len(kernel) if isinstance(padding, str) else _sizes(padding, len(kernel))
        sides = [(size, size) for size in sizes]
    return [amount for side in reversed(sides) for amount in side]
