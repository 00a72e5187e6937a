"""Metrics in Lightning's validation loop; this module needs the package lightning or pytorch-lightning."""

from __future__ import annotations

from typing import Any, final

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
    """Shows metrics each batch of each validation, and logs their values as the module logs its own.

    Values go to the loggers and to ``trainer.callback_metrics`` under ``PREFIX/NAME``, those of a metric that returns a
    dict under ``PREFIX/NAME/KEY``, standard errors, where the metric returns them, under ``.../standard_error``; with
    several validation loaders each has its own, with Lightning's ``/dataloader_idx_I`` after the name. The sanity check
    is not counted. Under DDP the metrics sync by themselves. What is undefined is logged as NaN, with a warning.

    Args:
        metrics: module → metric or ``MetricCollection``; called once for each validation loader, with the
            ``LightningModule``.
        unpack: batch → keywords for ``metric.update``; by default of pairs (inputs, target), and of dicts with
            ``labels``.
        max_batches: how many batches of a validation to show, on each rank; ``None`` for all.
        prefix: of the names.
        reset: forget the last validation before the next; ``False`` for ``PathComplexity``.

    Raises:
        TypeError: if ``metrics`` is no function.
        ValueError: if ``max_batches`` is no positive integer.

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

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        if not trainer.sanity_checking:
            self._monitor.start(pl_module, loaders=len(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,  # noqa: ARG002 - Lightning's signature
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        if not trainer.sanity_checking:
            self._monitor.update(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        if trainer.sanity_checking:
            return
        values = self._monitor.values()
        for loader, found in enumerate(values):
            suffix = f"/dataloader_idx_{loader}" if len(values) > 1 else ""
            for name, value in found.items():
                # Of all ranks and batches already: nothing to sync, nothing to weight.
                pl_module.log(f"{name}{suffix}", value, sync_dist=False, batch_size=1, add_dataloader_idx=False)
