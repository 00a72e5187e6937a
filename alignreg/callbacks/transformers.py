"""Metrics and losses in the Trainer of transformers; this module needs the package transformers.

This module subclasses the Trainer instead of defining a callback: the Trainer calls its callbacks only after it has
logged an evaluation, and shows them no batch. The subclass adds its values to the metrics of the evaluation before they
are logged.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any, final

from torch import nn
from typing_extensions import override

from alignreg import checks
from alignreg.callbacks.monitor import MakeMetrics, Monitor, Unpack, unpack_batch
from alignreg.losses.base import TangentLoss

try:
    from accelerate.utils import find_batch_size, slice_tensors
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "alignreg.callbacks.transformers: expected the packages transformers and accelerate. "
        "Install them: pip install transformers accelerate."
    ) from error


class TangentMixin(Trainer, ABC):
    """A mixin for other Trainers: ``class Mine(TangentMixin, Seq2SeqTrainer)`` does what :class:`TangentTrainer` does.

    It adds the arguments of :class:`TangentTrainer` to those of the other Trainer.
    """

    def __init__(
        self,
        *args: Any,
        metrics: MakeMetrics | None = None,
        regularizer: Callable[[nn.Module], TangentLoss] | None = None,
        unpack: Unpack | None = None,
        max_batches: int | None = None,
        prefix: str = "tangent",
        reset: bool = True,
        **kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {"unpack": unpack, "max_batches": max_batches, "prefix": prefix, "reset": reset}
        self._monitor = None if metrics is None else Monitor(metrics, **options)
        if isinstance(regularizer, TangentLoss) or not (regularizer is None or callable(regularizer)):
            raise TypeError(
                f"regularizer: expected a function of the wrapped model, got a {type(regularizer).__name__}. "
                "Pass lambda model: AlignmentLoss(model)."
            )
        if unpack is not None:
            checks.function("unpack", unpack, "batch -> keywords for metric.update")
        self._make_loss = regularizer
        self._unpack = unpack or unpack_batch
        self._batches: int | None = None  # the number of batches of this evaluation so far; None outside one
        self._regularized: tuple[nn.Module, TangentLoss] | None = None
        self._last = (-1, 0)  # the optimizer step and the micro-batch within it
        super().__init__(*args, **kwargs)

    @override
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        monitor = None if description == "Prediction" else self._monitor
        if monitor is not None:
            monitor.start(self.model)
            self._batches = 0
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._batches = None
        if monitor is not None:
            (values,) = monitor.values()
            output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in values.items()})
        return output

    @override
    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._monitor is not None and self._batches is not None:
            rows = self._rows(find_batch_size(inputs))
            if rows > 0:
                batch = slice_tensors(self._prepare_inputs(inputs), slice(rows))
                self._monitor.update(batch, self._batches)
            self._batches += 1
        return super().prediction_step(model, inputs, *args, **kwargs)

    @override
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self._make_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        batch = self._unpack(inputs)  # before the Trainer, which may remove the labels
        regularizer = self._loss_of(model, self._make_loss)  # before the forward pass of the wrapper, which it watches
        task, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        extra = regularizer(batch["inputs"], batch.get("target"))
        loss = task + extra / self._divisor(kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def _rows(self, n: int) -> int:
        """Return how many examples of this rank's batch count; Accelerate pads the last batches with other examples."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return n
        rows: int = min(n, state.remainder - n * self.accelerator.process_index)
        return rows

    def _loss_of(self, model: nn.Module, make: Callable[[nn.Module], TangentLoss]) -> TangentLoss:
        """Return the loss of the model as it is wrapped now, at the Trainer's step, which checkpoints restore."""
        if self._regularized is None:
            self._regularized = model, make(model)
        bound, loss = self._regularized
        if bound is not model:
            loss.bind(model)
            self._regularized, self._last = (model, loss), (-1, 0)
        step, micro = self._last
        self._last = self.state.global_step, (micro + 1 if step == self.state.global_step else 0)
        loss.gradient_accumulation_steps = self.args.gradient_accumulation_steps
        loss.step.fill_(self._last[0] * loss.gradient_accumulation_steps + self._last[1])
        return loss

    def _divisor(self, num_items_in_batch: Any) -> int:
        """Return the divisor for the mean over micro-batches, which is 1 if ``training_step`` divides."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        return int(self.current_gradient_accumulation_steps) if scaled else 1


@final
class TangentTrainer(TangentMixin):
    """A Trainer with metrics of each evaluation and a regularizer.

    The metrics are updated with each batch of each evaluation, without the examples that Accelerate repeats to make
    batches equal on all ranks. Their values are added to the result of ``evaluate()``, to ``state.log_history`` and to
    the logs under ``eval_PREFIX/NAME``, those of a metric that returns a dict under ``eval_PREFIX/NAME/KEY``, and a
    standard error under ``.../standard_error``; ``metric_for_best_model`` can name them. Under DDP the metrics sync by
    themselves. An undefined value is NaN, with a warning. ``predict()`` measures nothing.

    The regularizer is created from the wrapped model and added to the Trainer's loss. It follows the Trainer's scaling
    for gradient accumulation: an optimizer step uses the mean over micro-batches and ranks. It counts the Trainer's
    optimizer steps, also after resuming from a checkpoint; its ``gradient_accumulation_steps`` is set to the Trainer's.
    The training loss in the logs is the sum of both.

    Args:
        args: arguments of the Trainer.
        metrics: model → metric or ``MetricCollection``, called with the bare model.
        regularizer: model → loss, called with the wrapped model.
        unpack: batch → keywords for ``metric.update``, of which the loss receives ``inputs`` and ``target``; by default
            ``labels`` are the target, and everything else the model's inputs.
        max_batches: how many batches of an evaluation to use for the metrics, on each rank; ``None`` for all.
        prefix: prefix of the names.
        reset: reset the metrics before each evaluation; ``False`` for ``PathComplexity``.
        kwargs: options of the Trainer.

    Raises:
        TypeError: if ``metrics``, ``regularizer`` or ``unpack`` is not a function.
        ValueError: if ``max_batches`` is not a positive integer.

    Example:
        >>> from alignreg.callbacks.transformers import TangentTrainer
        >>> from alignreg.losses import ComplexityPenalty
        >>> from alignreg.metrics import TangentAlignment
        >>> def logits(model, inputs):
        ...     return model(**inputs).logits
        >>> tangents = {
        ...     "metrics": lambda model: TangentAlignment(model, num_outputs=10, forward_fn=logits),
        ...     "regularizer": lambda model: ComplexityPenalty(model, weight=0.016, forward_fn=logits),
        ... }  # trainer = TangentTrainer(model, args, train_dataset=..., eval_dataset=..., **tangents)
    """
