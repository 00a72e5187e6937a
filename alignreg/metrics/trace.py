"""Trace of the tangent kernel, over a stream of batches."""

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
    Neural Feature Alignment", AISTATS 2021, section 4), there uncentered: ``centered=False``. It is a sum over examples
    and outputs; divide by n·c for the mean squared norm that :class:`~alignreg.losses.ComplexityPenalty` penalizes.

    The metric takes *inputs*, runs the live model on them by itself and accumulates over batches and ranks. With
    ``method="sketch"`` it is estimated, without bias, from m random directions, with a relative error of
    √(2/(m·r)), r the participation ratio. With ``method="exact"`` the inputs are kept and
    ``compute()`` takes the exact kernel. For the exact uncentered trace of one batch see
    :meth:`alignreg.TangentFeatures.trace`.

    Options, groups and sharing in a ``MetricCollection`` are those of :class:`TangentAlignment`, whose states it holds.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions.
    - ``target``: not needed; for metrics that share the update.
    - ``group``, with ``groups``: indices ``(n,)``.

    As output of ``forward`` and ``compute`` it returns a float64 scalar, or an
    :class:`~alignreg.estimators.Estimate` (value, standard_error) with ``return_std_error=True``; with ``groups`` a
    dict of them by group, NaN for an exact group without examples, and ``"total"``.

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
        >>> from alignreg.metrics import TangentTrace
        >>> metric = TangentTrace(torch.nn.Linear(3, 2), num_outputs=2, method="exact", centered=False)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(12., dtype=torch.float64)
    """

    higher_is_better: bool | None = None

    def _of_sketch(self, seen: Sketched) -> Tensor:
        return estimators.trace(seen.gram)

    def _of_kernel(self, seen: Kept) -> Tensor:
        return torch.einsum("ikik->", seen.kernel)
