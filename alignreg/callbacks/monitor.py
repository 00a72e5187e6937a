"""The metrics of a validation loop, for the callbacks of any package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

from alignreg import checks
from alignreg.estimators import Estimate
from alignreg.tangents.finite import NonFiniteGradientError, NonFiniteOutputError
from alignreg.targets import ConstantTargetError

MakeMetrics = Callable[[nn.Module], "Metric | MetricCollection"]
"""A function from the trained model to its metrics."""
Unpack = Callable[[Any], dict[str, Any]]
"""A function from a batch to keywords for ``metric.update``."""


def unpack_batch(batch: Any) -> dict[str, Any]:
    """Return ``inputs`` and ``target`` of a batch that is a pair, or a dict with the target under ``labels``.

    Raises:
        TypeError: if the batch is neither.

    Example:
        >>> from alignreg.callbacks.monitor import unpack_batch
        >>> unpack_batch({"pixels": 1, "mask": 2, "labels": 3})
        {'inputs': {'pixels': 1, 'mask': 2}, 'target': 3}
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {"inputs": {key: part for key, part in batch.items() if key != "labels"}, "target": batch["labels"]}
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return {"inputs": batch[0], "target": batch[1]}
    got = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise TypeError(
        f"batch: expected a pair (inputs, target), or a dict with labels, got {got}. "
        'Pass unpack=lambda batch: {"inputs": ..., "target": ...}.'
    )


@final
class Monitor:
    """The metrics of a model, over one run of a validation loop at a time.

    An undefined value is NaN on all ranks, and training continues; this happens for constant targets and for model
    outputs that are not finite. The options and errors are those of :class:`.lightning.TangentMonitor`, where
    ``metrics`` is ``make``.
    """

    def __init__(
        self, make: MakeMetrics, *, unpack: Unpack | None, max_batches: int | None, prefix: str, reset: bool
    ) -> None:
        if isinstance(make, (Metric, MetricCollection)) or not callable(make):
            raise TypeError(
                f"metrics: expected a function of the model, got a {type(make).__name__}. "
                "Pass lambda model: TangentAlignment(model, num_outputs=...)."
            )
        if unpack is not None:
            checks.function("unpack", unpack, "batch -> keywords for metric.update")
        self._make = make
        self._unpack = unpack or unpack_batch
        self._max_batches = None if max_batches is None else checks.count("max_batches", max_batches)
        self._prefix = checks.text("prefix", prefix)
        self._reset = checks.flag("reset", reset)
        self._model: nn.Module | None = None
        self._metrics: list[MetricCollection] = []
        self._failed = SumMetric()  # summed over ranks, so that all agree on which values are undefined
        self._names: list[list[str]] = []

    def start(self, model: nn.Module, loaders: int = 1) -> None:
        """Begin a run of a loop over one or more loaders."""
        if model is not self._model or loaders != len(self._metrics):
            self._metrics = [_collection(self._make(model)) for _ in range(loaders)]
            self._names = [[f"{self._prefix}/{name}" for name in metrics] for metrics in self._metrics]
            self._model = model
        elif self._reset:
            for metrics in self._metrics:
                metrics.reset()
        device = next(model.parameters()).device
        for module in (*self._metrics, self._failed):
            module.to(device)
        self._failed.reset()
        self._failed.update(0.0)

    def update(self, batch: Any, index: int, loader: int = 0) -> None:
        """Add the batch with this index to the metrics of its loader."""
        if self._max_batches is not None and index >= self._max_batches:
            return
        try:
            self._metrics[loader].update(**self._unpack(batch))
        except (NonFiniteOutputError, NonFiniteGradientError) as error:
            self._failed.update(1.0)
            self._warn(error)

    def values(self) -> list[dict[str, Tensor]]:
        """Return the values of the run by name, for each loader; all ranks must call it."""
        if self._failed.compute() > 0:
            return [dict.fromkeys(names, _undefined()) for names in self._names]
        values = [dict(self._of(metrics)) for metrics in self._metrics]
        self._names = [list(named) for named in values]
        return values

    def _of(self, metrics: MetricCollection) -> Iterator[tuple[str, Tensor]]:
        # metrics.compute() would drop the names of metrics whose values are dicts.
        for name, metric in metrics.items(copy_state=False):
            try:
                value = metric.compute()
            except (ConstantTargetError, NonFiniteOutputError, NonFiniteGradientError) as error:
                self._warn(error)
                value = _undefined()
            yield from _flat(f"{self._prefix}/{name}", value)

    def _warn(self, error: Exception) -> None:
        warnings.warn(f"{self._prefix}: logged as NaN. {error}", UserWarning, stacklevel=3)


def _collection(made: Metric | MetricCollection) -> MetricCollection:
    if isinstance(made, MetricCollection):
        return made
    if isinstance(made, Metric):
        return MetricCollection({type(made).__name__: made})
    raise TypeError(
        f"metrics: expected a function that returns a Metric or MetricCollection, got one that returns "
        f"{type(made).__name__}."
    )


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Estimate):
        yield name, value.value
        yield f"{name}/standard_error", value.standard_error
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}/{key}", part)
    else:
        yield name, torch.as_tensor(value)


def _undefined() -> Tensor:
    return torch.tensor(torch.nan, dtype=torch.float64)
