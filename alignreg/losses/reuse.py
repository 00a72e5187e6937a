"""Repeated check that a loss may reuse the outputs of the main forward pass."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from alignreg.tangents import TangentFeatures
from alignreg.tangents.batch import Batch


@final
class Reuse:
    """A check of outputs against those of the features, made rarely when it needs the whole batch."""

    def __init__(self) -> None:
        self._last: tuple[Any, int] = (None, 0)

    def agree(self, features: TangentFeatures, x: Batch, outputs: Tensor) -> bool:
        """Return whether ``outputs`` may replace those of the features at ``x``, by :meth:`TangentFeatures.agree`."""
        if not features.couples_examples:
            return features.agree(x, outputs)
        # Batch statistics can only be compared on the whole batch. After one comparison, outputs of passes of the same
        # kind are compared again at the 2nd, 4th and 8th pass, and at every 8th from then on.
        modes = tuple(module.training for module in features.model.modules())
        kind = (modes, outputs.shape[1:], outputs.dtype, features.reached(outputs))
        before, count = self._last
        count = count + 1 if before == kind else 1
        if count & (count - 1) and count % 8:
            self._last = kind, count
            return features.serves(outputs)
        agreed = features.agree(x, outputs)
        self._last = (kind, count) if agreed else (None, 0)
        return agreed
