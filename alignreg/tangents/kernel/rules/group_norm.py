"""Group normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.scales import by_channel


def group_norm(
    input: Tensor,  # noqa: A002 - torch's name
    num_groups: int,
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales:
    """A = x, normalised over groups of channels and all positions."""
    return by_channel(input, lambda: F.group_norm(input, num_groups, eps=eps))
