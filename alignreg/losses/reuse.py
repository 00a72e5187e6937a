"""Whether the outputs of the main forward pass serve a loss, step after step."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from alignreg.tangents import TangentFeatures
from alignreg.tangents.batch import Batch


@final
class Reuse:
    """Compares outputs with those of the features, rarely where this takes the whole batch."""

    def __init__(self) -> None:
        self._last: tuple[Any, int] = (None, 0)

    def agree(self, features: TangentFeatures, x: Batch, outputs: Tensor) -> bool:
        """Say whether ``outputs`` can stand for those at ``x``: :meth:`TangentFeatures.agree`."""
        if not features.couples_examples:
            return features.agree(x, outputs)
        # Statistics of the batch can only be compared on the whole of it. Once compared, outputs of passes that are
        # alike are looked at again at the 2nd, 4th and 8th of them, and every 8th from then on.
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
