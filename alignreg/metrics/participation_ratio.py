"""The participation ratio of the tangent kernel, over a stream of batches."""

from __future__ import annotations

from typing import final

from torch import Tensor

from alignreg import formulas
from alignreg.estimators import frobenius2, trace2
from alignreg.metrics.seen import Kept, Sketched
from alignreg.metrics.sketch import SketchMetric


@final
class TangentParticipationRatio(SketchMetric):
    r"""Participation ratio of the (centered) tangent kernel, (tr K_c)² / ‖K_c‖_F²: a rank without eigenvalues.

    It falls as the tangent features are compressed to fewer directions, like the effective rank that Baratin et al.
    ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 3.2) follow; it is another number,
    and never larger. For effective rank and trace ratios, which need eigenvalues, see :class:`TangentSpectrum`.

    The value lies in [1, n·c], and is 0 where K is zero. With ``method="sketch"``, numerator and denominator are
    estimated without bias; their ratio is consistent in m.

    The options, groups and errors are those of :class:`SketchMetric`.

    Example:
        >>> import torch
        >>> from alignreg.metrics import TangentParticipationRatio
        >>> metric = TangentParticipationRatio(torch.nn.Linear(3, 2), num_outputs=2, method="exact")
        >>> metric.update(torch.eye(3))  # after centering, each of the two outputs has two directions
        >>> round(float(metric.compute()), 4)
        4.0
    """

    higher_is_better: bool | None = None
    plot_lower_bound: float = 1.0

    def _of_sketch(self, seen: Sketched) -> Tensor:
        columns = (seen.gram, seen.block, seen.exact)
        return formulas.ratio_of_estimates(trace2(*columns), frobenius2(*columns), seen.rows)

    def _of_kernel(self, seen: Kept) -> Tensor:
        return formulas.participation_ratio(seen.kernel)
