"""What normalisations share: a scale and a shift of what they normalise, by channel or by entry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alignreg.tangents.kernel.calls import Scales


def by_channel(x: Tensor, normalise: Callable[[], Tensor]) -> Scales:
    """One scale a channel, on axis 1; positions are whatever follows."""
    places = x.ndim - 2

    def flat(value: Tensor) -> Tensor:
        return value.flatten(-places) if places else value[..., None]

    return Scales(lead=1, inputs=lambda: flat(normalise()), outputs=flat)


def by_entry(x: Tensor, axes: int, normalise: Callable[[], Tensor]) -> Scales:
    """One scale an entry of the last ``axes`` axes."""

    def flat(value: Tensor) -> Tensor:
        return value.flatten(-axes)[..., None]

    return Scales(lead=x.ndim - axes, inputs=lambda: flat(normalise()), outputs=flat)
