"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.scales import by_entry


def rms_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # noqa: ARG001
    eps: float | None = None,
) -> Scales:
    """A = x, divided by its root mean square over the last axes."""
    return by_entry(input, len(normalized_shape), lambda: F.rms_norm(input, normalized_shape, eps=eps))
