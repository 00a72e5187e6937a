"""Alignment of the tangent kernel with the targets, over a stream of batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, final

from torch import Tensor, nn

from alignreg import checks, estimators, functional
from alignreg.metrics.seen import Kept, Sketched
from alignreg.metrics.sketch import SketchMetric
from alignreg.tangents.linearization import ForwardFn


@final
class TangentAlignment(SketchMetric):
    r"""Alignment of the tangent kernel with the targets, A = yᵀK_c y / (‖K_c‖_F ‖y − ȳ‖²), in [0, 1].

    It measures how far the gradient features of the network point along the task (Baratin et al., "Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 3.3). It takes *inputs*, runs the live model
    on them by itself and accumulates over batches and ranks; the result belongs to all examples together, whatever
    the batches. Evaluate it at one moment of training, and ``reset()`` before the next.

    With ``method="sketch"`` the features are pushed forward along m random directions that stay the same for all
    batches and ranks. The state is m² + P numbers, however many examples come. The numerator is exact up to the
    difference of label means between batches, ‖K_c‖_F² is estimated without bias, and :meth:`standard_error`
    says how far off A may be: about 5 % of A for m = 64 on small image classifiers. An update costs about m
    forward and backward passes. With ``method="exact"`` the inputs are kept and ``compute()`` takes the exact kernel:
    for up to a few thousand rows n·c.

    With ``groups``, ``update(inputs, target, group)`` also gives the alignment within each group (easy and difficult
    examples, domains), with its own centering, from the same pushforward. A group costs m² + P numbers, and a backward
    pass for each batch in which some but not all examples belong to it. Groups of unlike size are not comparable:
    alignment depends on the number of examples.

    The alignment of a sample is not that of the population it is from: it grows as the sample gets smaller. With
    ``unbiased=True`` numerator and norms are estimated without this bias, and without that of the sketch
    (:mod:`alignreg.population`); their quotient may then lie outside [0, 1]. This takes (m·c)² + m²·c numbers more, and
    at least four examples.

    In a ``MetricCollection``, :class:`TangentAlignment`, :class:`TangentTrace` and :class:`TangentParticipationRatio`
    of equal options share one pushforward from their second update on. ``forward`` does not share: each metric runs
    its own.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``inputs``: tensor, or tuple or dict of tensors, with the examples on axis 0: the *model's inputs*, not its
      predictions. In a ``MetricCollection`` use keywords, ``update(inputs=x, preds=p, target=y)``.
    - ``target``: class indices ``(n,)``, or values ``(n, c)``; with one output, values ``(n,)``.
    - ``group``, with ``groups``: indices ``(n,)``.

    As output of ``forward`` and ``compute`` it returns a float64 scalar, or an
    :class:`~alignreg.estimators.Estimate` (value, standard_error) with ``return_std_error=True``; with ``groups`` a
    dict of them by group, and ``"total"``. It is NaN where K is zero, or an unbiased norm not positive, and for a group
    without two different targets; ``forward`` also returns NaN for a batch of one class.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or
            changed. Clones of the metric watch the same live model.
        num_outputs: their number c.
        unbiased: estimate the alignment of the population rather than that of the sample.
        sketch_dim: m ≥ 3 directions; the error falls like 1/√m.
        sketch: ``"gaussian"``: independent directions. ``"factored"``: for each weight, products of 2m random vectors
            on either side, 4 by 4, of about the same error; one backward pass for each output serves all of them. The
            state then has (8m)² + P numbers. ``"auto"``: factored for up to m/64 outputs, where it is several times
            cheaper. The attribute ``sketch`` says which it is.
        seed: of the directions. Nothing is drawn from torch's global random state.
        centered: center the kernel over the examples; ``False`` leaves it as it is. Targets are always centered.
        target_mean: expected mean of the targets ``(c,)``, if known; each batch's own mean otherwise. It changes the
            error alone, and little.
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
        >>> from alignreg.metrics import TangentAlignment
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> metric = TangentAlignment(net, num_outputs=3, groups=("easy", "difficult"))
        >>> for _ in range(2):
        ...     metric.update(torch.randn(20, 4), torch.randint(3, (20,)), group=torch.arange(20) % 2)
        >>> {name: bool(0 <= value <= 1) for name, value in metric.compute().items()}
        {'easy': True, 'difficult': True, 'total': True}
    """

    higher_is_better: bool = True
    plot_upper_bound: float = 1.0
    _needs_targets: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        *,
        unbiased: bool = False,
        sketch_dim: int = 64,
        sketch: Literal["gaussian", "factored", "auto"] = "gaussian",
        seed: int = 0,
        centered: bool = True,
        target_mean: Tensor | Sequence[float] | None = None,
        groups: int | Sequence[str] | None = None,
        method: Literal["sketch", "exact"] = "sketch",
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
        return_std_error: bool = False,
        **metric_kwargs: Any,
    ) -> None:
        if checks.flag("unbiased", unbiased) and not checks.flag("centered", centered):
            raise ValueError("unbiased: expected the centered kernel with it. Leave centered out, or unbiased.")
        super().__init__(
            model,
            num_outputs,
            sketch_dim=sketch_dim,
            sketch=sketch,
            seed=seed,
            centered=centered,
            target_mean=target_mean,
            groups=groups,
            method=method,
            params=params,
            forward_fn=forward_fn,
            return_std_error=return_std_error,
            pairs=unbiased,
            **metric_kwargs,
        )
        self.unbiased = unbiased

    @property
    def _bounds(self) -> tuple[float | None, float | None]:
        return (None, None) if self.unbiased else super()._bounds

    def _of_sketch(self, seen: Sketched) -> Tensor:
        if seen.pairs is not None:
            return seen.pairs.alignment(seen.block)
        return estimators.alignment(seen.projection, estimators.frobenius2(seen.gram, seen.block))

    def _of_kernel(self, seen: Kept) -> Tensor:
        return functional.alignment(seen.K, seen.y, seen.centered, unbiased=self.unbiased)
