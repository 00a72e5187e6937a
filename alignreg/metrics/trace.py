"""The trace of the tangent kernel, over a stream of batches."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from alignreg import estimators
from alignreg.metrics.seen import Kept, Sketched
from alignreg.metrics.sketch import SketchMetric


@final
class TangentTrace(SketchMetric):
    r"""Trace of the (centered) tangent kernel, tr K_c = Σ_ik ‖Φ_ik − mean_i Φ_ik‖²: the size of the tangent features.

    √tr K is the ‖Φ‖_F of the complexity measure Σ_t ‖δw_t‖‖Φ_t‖_F of Baratin et al. ("Implicit Regularization via
    Neural Feature Alignment", AISTATS 2021, section 4), where it is uncentered: ``centered=False``. The trace is a sum
    over examples and outputs; divide it by n·c for the mean squared norm that
    :class:`~alignreg.losses.ComplexityPenalty` penalizes.

    With ``method="sketch"`` it is estimated without bias, with a relative error of √(2/(m·r)), where r is the
    participation ratio. For the exact uncentered trace of one batch see :meth:`alignreg.TangentFeatures.trace`.

    The options, groups and errors are those of :class:`SketchMetric`.

    Example:
        >>> import torch
        >>> from alignreg.metrics import TangentTrace
        >>> metric = TangentTrace(torch.nn.Linear(3, 2), num_outputs=2, method="exact", centered=False)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(12., dtype=torch.float64)
    """

    higher_is_better: bool | None = None

    def _of_sketch(self, seen: Sketched) -> Tensor:
        return estimators.trace(seen.gram, seen.exact)

    def _of_kernel(self, seen: Kept) -> Tensor:
        return torch.einsum("ikik->", seen.kernel)
