"""Rule for rectifiers with learned slopes, one for all entries or one for each channel."""

from __future__ import annotations

from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.normalization import by_channel, by_entry


def prelu(input: Tensor, weight: Tensor) -> Scales:  # noqa: A002 - torch's name
    """Return scales of a = min(x, 0), since y = max(x, 0) + w min(x, 0)."""
    if weight.numel() == 1:
        return by_entry(input, 0, lambda: input.clamp(max=0))
    return by_channel(input, lambda: input.clamp(max=0))
