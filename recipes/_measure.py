"""What a run logs about the live model; the same on any number of processes."""

from __future__ import annotations

import _data
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alignreg import TangentFeatures, functional
from alignreg.metrics import PathComplexity, TangentAlignment


class Measurements:
    """Loss, accuracy, alignment, ranks, and the complexity of the path so far."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        data: _data.Data,
        *,
        sketch_dim: int,
        seed: int,
        probe_size: int,
        kernel_size: int,
    ) -> None:
        self.accelerator = accelerator
        # The bare network: the ranks' numbers of batches differ, and DDP would wait in each for the others.
        self.model = accelerator.unwrap_model(model)
        self.features = TangentFeatures(self.model)
        device = accelerator.device
        self.kernel_x = data.train_x[:kernel_size].to(device)
        self.alignment = TangentAlignment(
            model, data.num_classes, sketch_dim=sketch_dim, seed=seed, return_std_error=True
        ).to(device)
        self.path = PathComplexity(model).to(device)
        self.path.persistent(True)
        self.accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(device)
        self.loss = MeanMetric().to(device)
        parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
        self.loaders = {
            part: [
                accelerator.prepare(DataLoader(TensorDataset(x, y), 100)),
                accelerator.prepare(DataLoader(TensorDataset(x[:probe_size], y[:probe_size]), 100)),
            ]
            for part, (x, y) in parts.items()
        }

    def __call__(self) -> dict[str, float]:
        """Measure now; the network is in evaluation mode."""
        values: dict[str, float] = {}
        for part, (everything, probes) in self.loaders.items():
            for metric in (self.alignment, self.accuracy, self.loss):
                metric.reset()
            with torch.no_grad():
                for x, y in everything:
                    logits = self.model(x)
                    self.accuracy.update(logits, y)
                    self.loss.update(cross_entropy(logits, y), len(y))
            for x, y in probes:
                self.alignment.update(x, y)
            alignment = self.alignment.compute()
            values[f"{part}/loss"] = float(self.loss.compute())
            values[f"{part}/accuracy"] = float(self.accuracy.compute())
            values[f"{part}/alignment"] = float(alignment.value)
            values[f"{part}/alignment_std_error"] = float(alignment.standard_error)
        share = self.kernel_x[self.accelerator.process_index :: self.accelerator.num_processes]
        if len(share):
            self.path.update(share)
        values["train/path_complexity"] = float(self.path.compute())
        if self.accelerator.is_main_process:  # no collective below
            kernel = functional.center(self.features.kernel(self.kernel_x)).double()
            values["train/effective_rank"] = float(functional.effective_rank(kernel))
            values["train/participation_ratio"] = float(functional.participation_ratio(kernel))
        return values
