"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.scales import by_entry


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales:
    """A = x, normalised over its last axes."""
    return by_entry(input, len(normalized_shape), lambda: F.layer_norm(input, normalized_shape, eps=eps))
