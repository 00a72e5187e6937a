"""Rule for linear maps, in which the weight multiplies one input vector at every leading position."""

from __future__ import annotations

from torch import Tensor

from alignreg.tangents.kernel.calls import Maps


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Maps:  # noqa: A002, ARG001 - torch's names
    """Return the map y = x Wᵀ + b, for which a = x and d = ∂f/∂y."""
    return Maps(
        lead=input.ndim - 1,
        inputs=lambda: input[..., None, :, None],
        outputs=lambda d: d[..., None, :, None],
    )
