"""Watch a validation loop, whoever runs it."""

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
"""Makes what to measure, of the model that is trained."""
Unpack = Callable[[Any], dict[str, Any]]
"""Makes keywords for ``metric.update`` of a batch."""


def unpack_batch(batch: Any) -> dict[str, Any]:
    """Return ``inputs`` and ``target`` of a batch: a pair of them, or a dict that has the target under ``labels``.

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
    """Hold the metrics of a model and compute them over one run of a validation loop at a time.

    Where a value is undefined it is NaN, on all ranks alike, and training goes on: for constant targets, and where the
    model's outputs are not finite.

    Args:
        make: model → metric or ``MetricCollection``; called once for each loader of the loop.
        unpack: batch → keywords for ``metric.update``.
        max_batches: of each loader and rank; ``None`` for all.
        prefix: of the names of values, ``PREFIX/NAME``.
        reset: forget the last run before the next; ``False`` for what is followed along training.

    Raises:
        TypeError: if ``make`` or ``unpack`` is no function.
        ValueError: if ``max_batches`` is no positive integer, or ``reset`` no flag.
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
        self._failed = SumMetric()  # summed over ranks, so that all of them agree on what is undefined
        self._names: list[list[str]] = []

    def start(self, model: nn.Module, loaders: int = 1) -> None:
        """Begin a run, of a loop over so many loaders."""
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
        """Add the batch with this index."""
        if self._max_batches is not None and index >= self._max_batches:
            return
        try:
            self._metrics[loader].update(**self._unpack(batch))
        except (NonFiniteOutputError, NonFiniteGradientError) as error:
            self._failed.update(1.0)
            self._warn(error)

    def values(self) -> list[dict[str, Tensor]]:
        """Return the values of the run by name, of each loader; all ranks must call it."""
        if self._failed.compute() > 0:
            return [dict.fromkeys(names, _undefined()) for names in self._names]
        values = [dict(self._of(metrics)) for metrics in self._metrics]
        self._names = [list(found) for found in values]
        return values

    def _of(self, metrics: MetricCollection) -> Iterator[tuple[str, Tensor]]:
        # Not metrics.compute(), which drops the names of metrics whose values are dicts.
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
        f"metrics: expected a function that returns a Metric or MetricCollection, it returned a {type(made).__name__}."
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
