"""The quantities that a run logs about the live network; they are the same on any number of processes.

Each quantity is a function that builds its metrics once and returns a function that measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alignreg import TangentFeatures, complexity, functional
from alignreg.metrics import LayerwiseAlignment, PathComplexity, TangentAlignment
from data.examples import Data

EIGENVALUES = 10
"""The number of largest eigenvalues that ``spectrum`` logs."""
RATIOS = (1, 10, 20, 40)
Values = dict[str, float]
Measure = Callable[[Path, int], Values]
"""Measures at a step, on all processes together; the main process writes arrays to the folder."""


@final
class Seen(NamedTuple):
    """The network and the data that are measured."""

    accelerator: Accelerator
    model: nn.Module
    """The bare network: processes have different numbers of batches, and DDP would wait for the others in each."""
    data: Data
    config: Any
    """It has the flags ``sketch_dim``, ``seed``, ``probe_size`` and ``kernel_size``."""

    def loader(self, x: Tensor, y: Tensor) -> Any:
        """Return batches of examples, shared among the processes."""
        return self.accelerator.prepare(DataLoader(TensorDataset(x, y), 100))

    def loaders(self, size: int | None) -> dict[str, Any]:
        """Return batches of the first training and test examples, shared among the processes."""
        data = self.data
        parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
        return {part: self.loader(x[:size], y[:size]) for part, (x, y) in parts.items()}

    def few(self, part: str = "train") -> tuple[Tensor, Tensor]:
        """Return ``kernel_size`` examples and their labels."""
        x, y = getattr(self.data, f"{part}_x"), getattr(self.data, f"{part}_y")
        size, device = self.config.kernel_size, self.accelerator.device
        return x[:size].to(device), y[:size].to(device)

    def alone(self, measure: Callable[..., Values]) -> Measure:
        """Return ``measure`` for the main process alone: exact kernels of a few examples need no collective."""
        return measure if self.accelerator.is_main_process else lambda *_: {}


def accuracy(seen: Seen) -> Measure:
    """Log loss and accuracy over all training, test and validation examples."""
    device = seen.accelerator.device
    right = MulticlassAccuracy(seen.data.num_classes, average="micro").to(device)
    loss = MeanMetric(nan_strategy="disable").to(device)  # logs a NaN loss as it is
    examples = seen.loaders(None)
    if len(seen.data.val_x):
        examples["val"] = seen.loader(seen.data.val_x, seen.data.val_y)

    def measure(*_: object) -> Values:
        values = {}
        for part, loader in examples.items():
            right.reset()
            loss.reset()
            with torch.no_grad():
                for x, y in loader:
                    logits = seen.model(x)
                    right.update(logits, y)
                    loss.update(cross_entropy(logits, y), len(y))
            values[f"{part}/loss"] = float(loss.compute())
            values[f"{part}/accuracy"] = float(right.compute())
        return values

    return measure


def alignment(seen: Seen) -> Measure:
    """Log the sketched alignment with the labels and its standard error, on ``probe_size`` examples of each split."""
    options = {"sketch_dim": seen.config.sketch_dim, "seed": seen.config.seed, "return_std_error": True}
    metric = TangentAlignment(seen.model, seen.data.num_classes, **options).to(seen.accelerator.device)
    loaders = seen.loaders(seen.config.probe_size)

    def measure(*_: object) -> Values:
        values = {}
        for part, loader in loaders.items():
            metric.reset()
            for x, y in loader:
                metric.update(x, y)
            estimate = metric.compute()
            values[f"{part}/alignment"] = float(estimate.value)
            values[f"{part}/alignment_std_error"] = float(estimate.standard_error)
        return values

    return measure


def held_out(seen: Seen) -> Measure:
    """Log the exact alignment with the labels, on ``kernel_size`` examples of each split."""
    features = TangentFeatures(seen.model)

    def measure(*_: object) -> Values:
        few = {part: seen.few(part) for part in ("train", "test")}
        kernels = {part: features.kernel(x).double() for part, (x, _) in few.items()}
        return {f"{part}/kernel_alignment": float(functional.alignment(kernels[part], few[part][1])) for part in few}

    return seen.alone(measure)


@final
class PathSoFar:
    """Logs the complexity of the path so far, from the trace of the kernel on ``kernel_size`` training examples."""

    def __init__(self, seen: Seen) -> None:
        self.metric = PathComplexity(seen.model).to(seen.accelerator.device)
        self.metric.persistent(True)
        self.share = seen.few()[0][seen.accelerator.process_index :: seen.accelerator.num_processes]

    def __call__(self, *_: object) -> Values:
        """Add the current network to the path and measure."""
        if len(self.share):
            self.metric.update(self.share)
        return {"train/path_complexity": float(self.metric.compute())}


def ranks(seen: Seen) -> Measure:
    """Log effective rank and participation ratio of the centered kernel of ``kernel_size`` training examples."""
    features = TangentFeatures(seen.model)

    def measure(*_: object) -> Values:
        kernel = functional.center(features.kernel(seen.few()[0])).double()
        return {
            "train/effective_rank": float(functional.effective_rank(kernel)),
            "train/participation_ratio": float(functional.participation_ratio(kernel)),
        }

    return seen.alone(measure)


def spectrum(seen: Seen) -> Measure:
    """Log trace ratios and the largest eigenvalues of the same kernel."""
    features = TangentFeatures(seen.model)

    def measure(*_: object) -> Values:
        eigenvalues = functional.spectrum(functional.center(features.kernel(seen.few()[0])).double())
        ratios = {f"train/{key}": float(value) for key, value in functional.summary(eigenvalues, RATIOS).items()}
        largest = {f"train/eigenvalue_{j + 1}": float(value) for j, value in enumerate(eigenvalues[:EIGENVALUES])}
        return {**ratios, **largest}

    return seen.alone(measure)


def layers(seen: Seen) -> Measure:
    """Log the alignment of each layer's own kernel with the labels, on the same examples."""
    options = {"max_examples": seen.config.kernel_size, "sync_on_compute": False}
    metric = LayerwiseAlignment(seen.model, seen.data.num_classes, **options).to(seen.accelerator.device)

    def measure(*_: object) -> Values:
        metric.reset()
        metric.update(*seen.few())
        return {f"layer/{name}": float(value) for name, value in metric.compute().items()}

    return seen.alone(measure)


def groups(seen: Seen) -> Measure:
    """Log the alignment within ``kernel_size`` easy and as many difficult training examples, each centered alone."""
    features, data, size = TangentFeatures(seen.model), seen.data, seen.config.kernel_size
    marks = {"easy": ~data.difficult, "difficult": data.difficult}
    rows = {name: mark.nonzero()[:size, 0] for name, mark in marks.items()}
    short = [name for name, chosen in rows.items() if len(chosen) < size]
    if short:
        raise ValueError(
            f"--measure: expected {size} easy and {size} difficult examples for groups, got fewer {short[0]} "
            "ones. Raise --label_noise or --mix_size, or lower --kernel_size."
        )

    def measure(*_: object) -> Values:
        values, device = {}, seen.accelerator.device
        for name, chosen in rows.items():
            x, y = data.train_x[chosen].to(device), data.train_y[chosen].to(device)
            values[f"{name}/alignment"] = float(functional.alignment(features.kernel(x).double(), y))
            with torch.no_grad():
                values[f"{name}/accuracy"] = float((seen.model(x).argmax(1) == y).double().mean())
        return values

    return seen.alone(measure)


def plane(seen: Seen, grid: Tensor | None = None) -> Measure:
    """Log kernel eigenfunctions and gradient norms of the difference of the two outputs, over a square of inputs."""
    if seen.data.train_x.shape[1:] != (2,):
        raise ValueError("--measure: expected a data set of points for plane, such as --dataset disk, got another one.")
    features = TangentFeatures(seen.model, forward_fn=_difference)
    side = torch.linspace(-1, 1, 41, device=seen.accelerator.device)
    points = torch.cartesian_prod(side, side) if grid is None else grid

    def measure(folder: Path, step: int) -> Values:
        x, y = seen.few()
        n = len(x)
        kernel = features.kernel(x).double().reshape(n, n)
        eigenvalues, vectors = torch.linalg.eigh(kernel)
        eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
        # u(x) = Σ_i k(x, x_i) u_i / λ extends the eigenvector u to the whole plane.
        across = features.kernel(points, x).double().reshape(len(points), n)
        functions = across @ vectors[:, :EIGENVALUES] / eigenvalues[:EIGENVALUES] * n**0.5
        inputs = points.clone().requires_grad_()
        with torch.enable_grad():
            outputs = _difference(seen.model, inputs)
            slopes = torch.autograd.grad(outputs.sum(), inputs)[0].norm(dim=1)
        arrays = {
            "eigenfunctions": functions.float(),
            "eigenvalues": eigenvalues,
            "outputs": outputs.detach()[:, 0],
            "input_gradient": slopes,
            "tangent_norm": features.diagonal(points).reshape(-1).sqrt(),
        }
        arrays = {key: value.contiguous().cpu() for key, value in arrays.items()}
        save_file(arrays, folder / f"plane-{step}.safetensors")
        whole = kernel.reshape(n, 1, n, 1)
        centered = functional.spectrum(functional.center(whole))
        last = min(19, n - 1)
        return {
            "plane/ratio_20": float(eigenvalues[last] / eigenvalues[0]),
            "plane/ratio_20_centered": float(centered[last] / centered[0]),
            "plane/alignment": float(functional.alignment(whole, 2.0 * y[:, None].double() - 1)),
        }

    return seen.alone(measure)


def _difference(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return (logits[:, 1] - logits[:, 0])[:, None]


def norms(seen: Seen) -> Measure:
    """Log norm-based measures, alone and over the margin (the tenth percentile of the training examples)."""
    x, y = seen.data.train_x, seen.data.train_y
    initial = {name: tensor.detach().cpu().clone() for name, tensor in seen.model.state_dict().items()}
    measures: dict[str, Callable[..., Tensor]] = {
        "Frobenius product": complexity.frobenius_product,
        "spectral product": complexity.spectral_product,
        "path norm": partial(complexity.path_norm, shape=tuple(x.shape[1:])),
        "distance": partial(complexity.distance, initial=initial),
        "Bartlett 2017": partial(complexity.bartlett2017, initial=initial),
        "Neyshabur 2018": partial(complexity.neyshabur2018, initial=initial),
    }

    def measure(*_: object) -> Values:
        with torch.no_grad():
            outputs = torch.cat([seen.model(part.to(seen.accelerator.device)).cpu() for part in x.split(500)])
        gap = float(complexity.margin(outputs, y, 0.1))
        values = {"train/margin": gap}
        for name, norm in measures.items():
            values[f"norm/{name}"] = float(norm(seen.model))
            # The measure is defined for a positive margin alone.
            values[f"norm/{name}, margin"] = float(norm(seen.model, margin=gap)) if gap > 0 else math.nan
        return values

    return seen.alone(measure)


QUANTITIES: dict[str, Callable[[Seen], Measure]] = {
    "alignment": alignment,
    "held_out": held_out,
    "path": PathSoFar,
    "ranks": ranks,
    "spectrum": spectrum,
    "layers": layers,
    "groups": groups,
    "plane": plane,
    "norms": norms,
}


@final
class Measurements:
    """The measurements of loss, accuracy, and the named quantities."""

    def __init__(self, seen: Seen, names: tuple[str, ...]) -> None:
        kinds = [accuracy, *(kind for name, kind in QUANTITIES.items() if name in names)]
        self.measures = [kind(seen) for kind in kinds]
        self.path = next((measure.metric for measure in self.measures if isinstance(measure, PathSoFar)), None)

    def __call__(self, folder: Path, step: int) -> Values:
        """Measure now; the network must be in evaluation mode."""
        return {key: value for measure in self.measures for key, value in measure(folder, step).items()}
