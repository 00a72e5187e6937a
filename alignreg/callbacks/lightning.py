"""Metrics in Lightning's validation loop; this module needs the package lightning or pytorch-lightning."""

from __future__ import annotations

from typing import Any, final

from typing_extensions import override

from alignreg.callbacks.monitor import MakeMetrics, Monitor, Unpack

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "alignreg.callbacks.lightning: expected the package lightning. Install it: pip install lightning."
        ) from error


@final
class TangentMonitor(Callback):
    """A callback that updates metrics with each batch of a validation, and logs their values as the module would.

    Values go to the loggers and to ``trainer.callback_metrics`` under ``PREFIX/NAME``. A metric that returns a dict is
    logged under ``PREFIX/NAME/KEY``, and a standard error under ``.../standard_error``. With several validation loaders
    each has its own values, with Lightning's ``/dataloader_idx_I`` after the name. The sanity check is not counted.
    Under DDP the metrics sync by themselves. An undefined value is logged as NaN, with a warning.

    Args:
        metrics: model → metric or ``MetricCollection``; called once for each validation loader, with the
            ``LightningModule``.
        unpack: batch → keywords for ``metric.update``; by default :func:`.monitor.unpack_batch`, for pairs
            (inputs, target) and for dicts with ``labels``.
        max_batches: how many batches of a validation to use, on each rank; ``None`` for all.
        prefix: prefix of the names.
        reset: reset the metrics before each validation; ``False`` for ``PathComplexity``.

    Raises:
        TypeError: if ``metrics`` or ``unpack`` is not a function.
        ValueError: if ``max_batches`` is not a positive integer.

    Example:
        >>> from alignreg.callbacks.lightning import TangentMonitor
        >>> from alignreg.metrics import TangentAlignment
        >>> monitor = TangentMonitor(lambda module: TangentAlignment(module, num_outputs=10), max_batches=10)
    """

    def __init__(
        self,
        metrics: MakeMetrics,
        *,
        unpack: Unpack | None = None,
        max_batches: int | None = None,
        prefix: str = "tangent",
        reset: bool = True,
    ) -> None:
        super().__init__()
        self._monitor = Monitor(metrics, unpack=unpack, max_batches=max_batches, prefix=prefix, reset=reset)

    @override
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._monitor.start(pl_module, loaders=len(trainer.num_val_batches))

    @override
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._monitor.update(batch, batch_idx, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        values = self._monitor.values()
        for loader, named in enumerate(values):
            suffix = f"/dataloader_idx_{loader}" if len(values) > 1 else ""
            for name, value in named.items():
                # The value is already over all ranks and batches: there is nothing to sync or to weight.
                pl_module.log(f"{name}{suffix}", value, sync_dist=False, batch_size=1, add_dataloader_idx=False)
