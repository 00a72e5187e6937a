"""Instance normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales
from alignreg.tangents.kernel.rules.scales import by_channel


def instance_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales:
    """A = x, normalised over the positions of each channel, or by running statistics."""
    # Momentum 0: what the model's own call writes to running statistics is not written twice.
    return by_channel(
        input,
        lambda: F.instance_norm(
            input, running_mean, running_var, use_input_stats=use_input_stats, momentum=0.0, eps=eps
        ),
    )
