"""Rectifiers with a slope that is learned, for all entries or by channel."""

from __future__ import annotations

from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.normalization import by_channel, by_entry


def prelu(input: Tensor, weight: Tensor) -> Scales:  # noqa: A002 - torch's name
    """Y = max(x, 0) + w min(x, 0), so a = min(x, 0)."""
    if weight.numel() == 1:
        return by_entry(input, 0, lambda: input.clamp(max=0))
    return by_channel(input, lambda: input.clamp(max=0))
