"""Rules for normalizations, which scale and shift normalized values a, by channel or by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from alignreg.tangents.kernel.calls import Scales


def batch_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales | None:
    """Return scales of a = (x − μ)/√(σ² + ε) with running μ and σ²; ``None`` for batch statistics."""
    if training:
        return None
    return by_channel(input, lambda: F.batch_norm(input, running_mean, running_var, eps=eps))


def group_norm(
    input: Tensor,  # noqa: A002 - torch's name
    num_groups: int,
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales:
    """Return scales of a, which is x normalized over groups of channels and all positions."""
    return by_channel(input, lambda: F.group_norm(input, num_groups, eps=eps))


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
    """Return scales of a, which is x normalized over the positions of each channel, or by running statistics."""
    # Momentum 0, so that running statistics are only updated by the model's own call.
    return by_channel(
        input,
        lambda: F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum=0.0, eps=eps),
    )


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # noqa: ARG001
    bias: Tensor | None = None,  # noqa: ARG001
    eps: float = 1e-5,
) -> Scales:
    """Return scales of a, which is x normalized over its last axes."""
    return by_entry(input, len(normalized_shape), lambda: F.layer_norm(input, normalized_shape, eps=eps))


def rms_norm(
    input: Tensor,  # noqa: A002 - torch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # noqa: ARG001
    eps: float | None = None,
) -> Scales:
    """Return scales of a, which is x divided by its root mean square over the last axes."""
    return by_entry(input, len(normalized_shape), lambda: F.rms_norm(input, normalized_shape, eps=eps))


def by_channel(x: Tensor, values: Callable[[], Tensor]) -> Scales:
    """Return a call that scales ``values()``, shaped like x, by channel (axis 1); the following axes are positions."""
    places = x.ndim - 2

    def flat(value: Tensor) -> Tensor:
        return value.flatten(-places) if places else value[..., None]

    return Scales(lead=1, inputs=lambda: flat(values()), outputs=flat)


def by_entry(x: Tensor, axes: int, values: Callable[[], Tensor]) -> Scales:
    """Return a call with one scale for each entry of the last ``axes`` axes of ``values()``, shaped like x.

    With 0 axes, one scale applies to all entries.
    """

    def flat(value: Tensor) -> Tensor:
        return (value.flatten(-axes) if axes else value[..., None])[..., None]

    return Scales(lead=x.ndim - axes, inputs=lambda: flat(values()), outputs=flat)
