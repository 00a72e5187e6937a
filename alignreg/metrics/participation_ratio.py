"""Participation ratio of the tangent kernel, over a stream of batches."""

from __future__ import annotations

from typing import final

from torch import Tensor

from alignreg import formulas
from alignreg.estimators import frobenius2, trace2
from alignreg.metrics.seen import Kept, Sketched
from alignreg.metrics.sketch import SketchMetric


@final
class TangentParticipationRatio(SketchMetric):
    r"""Participation ratio of the (centered) tangent kernel, (tr K_c)² / ‖K_c‖_F²: a rank that needs no eigenvalues.

    It falls as tangent features are compressed to fewer directions, as the effective rank does that Baratin et al.
    ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 3.2) follow; it is another number,
    never above it. For effective rank and trace ratios, which need eigenvalues, see :class:`TangentSpectrum`.

    The metric takes *inputs*, runs the live model on them by itself and accumulates over batches and ranks. With
    ``method="sketch"`` numerator and denominator are estimated without bias from m random directions; their ratio is
    consistent in m. With ``method="exact"`` the inputs are kept and ``compute()`` takes the exact kernel.

    Options, groups and sharing in a ``MetricCollection`` are those of :class:`TangentAlignment`, whose states it holds.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions.
    - ``target``: not needed; for metrics that share the update.
    - ``group``, with ``groups``: indices ``(n,)``.

    As output of ``forward`` and ``compute`` it returns a float64 scalar in [1, n·c], 0 where K is zero, or an
    :class:`~alignreg.estimators.Estimate` (value, standard_error) with ``return_std_error=True``; with ``groups`` a
    dict of them by group, and ``"total"``.

    Args:
        model: the model, possibly wrapped; never registered, copied or changed.
        num_outputs: their number c.
        sketch_dim: m ≥ 3 directions.
        sketch: ``"gaussian"``, ``"factored"`` or ``"auto"``, as for :class:`TangentAlignment`.
        seed: of the directions.
        centered: center the kernel over the examples, each group by itself; ``False`` leaves it as it is.
        target_mean: as for :class:`TangentAlignment`, to share with it.
        groups: how many groups of examples there are, or their names.
        method: ``"sketch"`` or ``"exact"``.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, inputs) -> (n, c)`` for models with another output.
        return_std_error: return the standard error beside the value.
        metric_kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the model is sharded otherwise than by ``fully_shard``, or at all with ``method="exact"``.
        ValueError: if an argument is out of range, or nothing is trainable.

    Example:
        >>> import torch
        >>> from alignreg.metrics import TangentParticipationRatio
        >>> metric = TangentParticipationRatio(torch.nn.Linear(3, 2), num_outputs=2, method="exact")
        >>> metric.update(torch.eye(3))  # centered: two directions for each of two outputs
        >>> round(float(metric.compute()), 4)
        4.0
    """

    higher_is_better: bool | None = None
    plot_lower_bound: float = 1.0

    def _of_sketch(self, seen: Sketched) -> Tensor:
        return formulas.ratio_of_estimates(trace2(seen.gram, seen.block), frobenius2(seen.gram, seen.block), seen.rows)

    def _of_kernel(self, seen: Kept) -> Tensor:
        return formulas.participation_ratio(seen.kernel)
