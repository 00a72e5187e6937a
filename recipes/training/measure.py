"""What a run logs about the live network; the same on any number of processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, final

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
from data import examples

EIGENVALUES = 10
"""How many of the largest ``spectrum`` logs."""
RATIOS = (1, 10, 20, 40)


class Measure(ABC):
    """Some values of the network as it is now.

    Args:
        accelerator: of the run.
        model: the bare network: the ranks' numbers of batches differ, and DDP would wait in each for the others.
        data: what it is trained on.
        config: the flags ``sketch_dim``, ``seed``, ``probe_size`` and ``kernel_size``.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, data: examples.Data, config: Any) -> None:
        self.accelerator, self.model, self.data, self.config = accelerator, model, data, config
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Make the metrics."""

    @abstractmethod
    def __call__(self, folder: Path, step: int) -> dict[str, float]:
        """Measure, on all processes together; on the main one, ``folder`` takes what is no number."""

    def loaders(self, size: int | None) -> dict[str, Any]:
        """Return the first training and test examples, in shares of the processes."""
        data = self.data
        parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
        return {part: self.loader(x[:size], y[:size]) for part, (x, y) in parts.items()}

    def loader(self, x: Tensor, y: Tensor) -> Any:
        """Return examples in shares of the processes."""
        return self.accelerator.prepare(DataLoader(TensorDataset(x, y), 100))


@final
class Accuracy(Measure):
    """Loss and accuracy over all training and test examples, and those held out for validation."""

    def start(self) -> None:
        """See the base class."""
        device = self.accelerator.device
        self.accuracy = MulticlassAccuracy(self.data.num_classes, average="micro").to(device)
        self.loss = MeanMetric(nan_strategy="disable").to(device)  # a loss that is no number is logged as such
        self.examples = self.loaders(None)
        if len(self.data.val_x):
            self.examples["val"] = self.loader(self.data.val_x, self.data.val_y)

    def __call__(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        values = {}
        for part, loader in self.examples.items():
            self.accuracy.reset()
            self.loss.reset()
            with torch.no_grad():
                for x, y in loader:
                    logits = self.model(x)
                    self.accuracy.update(logits, y)
                    self.loss.update(cross_entropy(logits, y), len(y))
            values[f"{part}/loss"] = float(self.loss.compute())
            values[f"{part}/accuracy"] = float(self.accuracy.compute())
        return values


@final
class Alignment(Measure):
    """Alignment with the labels, sketched, with its standard error, on ``probe_size`` examples of each split."""

    def start(self) -> None:
        """See the base class."""
        self.alignment = TangentAlignment(
            self.model,
            self.data.num_classes,
            sketch_dim=self.config.sketch_dim,
            seed=self.config.seed,
            return_std_error=True,
        ).to(self.accelerator.device)
        self.probes = self.loaders(self.config.probe_size)

    def __call__(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        values = {}
        for part, loader in self.probes.items():
            self.alignment.reset()
            for x, y in loader:
                self.alignment.update(x, y)
            alignment = self.alignment.compute()
            values[f"{part}/alignment"] = float(alignment.value)
            values[f"{part}/alignment_std_error"] = float(alignment.standard_error)
        return values


@final
class PathSoFar(Measure):
    """Complexity of the path so far, from the trace of the kernel on ``kernel_size`` training examples."""

    def start(self) -> None:
        """See the base class."""
        self.metric = PathComplexity(self.model).to(self.accelerator.device)
        self.metric.persistent(True)
        self.x = self.data.train_x[: self.config.kernel_size].to(self.accelerator.device)

    def __call__(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        share = self.x[self.accelerator.process_index :: self.accelerator.num_processes]
        if len(share):
            self.metric.update(share)
        return {"train/path_complexity": float(self.metric.compute())}


class Exact(Measure):
    """From exact kernels of a few examples, on the main process alone: no collective inside."""

    def start(self) -> None:
        """See the base class."""
        self.features = TangentFeatures(self.model)

    @final
    def __call__(self, folder: Path, step: int) -> dict[str, float]:
        """See the base class."""
        return self.values(folder, step) if self.accelerator.is_main_process else {}

    @abstractmethod
    def values(self, folder: Path, step: int) -> dict[str, float]:
        """Measure on this process."""

    def few(self) -> tuple[Tensor, Tensor]:
        """Return ``kernel_size`` training examples and their labels."""
        size, device = self.config.kernel_size, self.accelerator.device
        return self.data.train_x[:size].to(device), self.data.train_y[:size].to(device)

    def centred(self) -> Tensor:
        """Return their kernel, centred."""
        return functional.center(self.features.kernel(self.few()[0])).double()


@final
class HeldOut(Exact):
    """Alignment of the kernels of ``kernel_size`` training and as many test examples, each with their labels."""

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        size, device = self.config.kernel_size, self.accelerator.device
        test = self.data.test_x[:size].to(device), self.data.test_y[:size].to(device)
        return {
            f"{part}/kernel_alignment": float(functional.alignment(self.features.kernel(x).double(), y))
            for part, (x, y) in {"train": self.few(), "test": test}.items()
        }


@final
class Ranks(Exact):
    """Effective rank and participation ratio of the centred kernel of ``kernel_size`` training examples."""

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        kernel = self.centred()
        return {
            "train/effective_rank": float(functional.effective_rank(kernel)),
            "train/participation_ratio": float(functional.participation_ratio(kernel)),
        }


@final
class Spectrum(Exact):
    """Trace ratios and the largest eigenvalues of the same kernel."""

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        eigenvalues = functional.spectrum(self.centred())
        found = {f"train/{key}": float(value) for key, value in functional.summary(eigenvalues, RATIOS).items()}
        largest = {f"train/eigenvalue_{j + 1}": float(value) for j, value in enumerate(eigenvalues[:EIGENVALUES])}
        return {**found, **largest}


@final
class Layers(Exact):
    """Alignment of each layer's own kernel with the labels, on the same examples."""

    def start(self) -> None:
        """See the base class."""
        self.metric = LayerwiseAlignment(
            self.model, self.data.num_classes, max_examples=self.config.kernel_size, sync_on_compute=False
        ).to(self.accelerator.device)

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        self.metric.reset()
        self.metric.update(*self.few())
        return {f"layer/{name}": float(value) for name, value in self.metric.compute().items()}


@final
class Groups(Exact):
    """Alignment within ``kernel_size`` easy and as many difficult training examples, each with its own centring."""

    def start(self) -> None:
        """See the base class."""
        super().start()
        size = self.config.kernel_size
        marks = {"easy": ~self.data.difficult, "difficult": self.data.difficult}
        self.rows = {name: mark.nonzero()[:size, 0] for name, mark in marks.items()}
        short = [name for name, rows in self.rows.items() if len(rows) < size]
        if short:
            raise ValueError(
                f"--measure: expected {size} easy and as many difficult examples for groups, got fewer {short[0]} "
                "ones. Raise --label_noise or --mix_size, or lower --kernel_size."
            )

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        values, device = {}, self.accelerator.device
        for name, rows in self.rows.items():
            x, y = self.data.train_x[rows].to(device), self.data.train_y[rows].to(device)
            values[f"{name}/alignment"] = float(functional.alignment(self.features.kernel(x).double(), y))
            with torch.no_grad():
                values[f"{name}/accuracy"] = float((self.model(x).argmax(1) == y).double().mean())
        return values


@final
class Plane(Exact):
    """Of the difference of two outputs over a square: eigenfunctions of its kernel, and the norms of its gradients."""

    def start(self) -> None:
        """See the base class."""
        if self.data.train_x.shape[1:] != (2,):
            raise ValueError("--measure: expected points of the plane for plane, as --dataset disk, got another set.")
        self.features = TangentFeatures(self.model, forward_fn=_difference)
        side = torch.linspace(-1, 1, 41, device=self.accelerator.device)
        self.grid = torch.cartesian_prod(side, side)

    def values(self, folder: Path, step: int) -> dict[str, float]:
        """See the base class."""
        x, y = self.few()
        n = len(x)
        kernel = self.features.kernel(x).double().reshape(n, n)
        eigenvalues, vectors = torch.linalg.eigh(kernel)
        eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
        # u(x) = Σ_i k(x, x_i) u_i / λ continues the eigenvector u to all of the plane.
        across = self.features.kernel(self.grid, x).double().reshape(len(self.grid), n)
        functions = across @ vectors[:, :EIGENVALUES] / eigenvalues[:EIGENVALUES] * n**0.5
        inputs = self.grid.clone().requires_grad_()
        with torch.enable_grad():
            outputs = _difference(self.model, inputs)
            slopes = torch.autograd.grad(outputs.sum(), inputs)[0].norm(dim=1)
        tangent = self.features.diagonal(self.grid).reshape(-1).sqrt()
        arrays = {
            "eigenfunctions": functions.float(),
            "eigenvalues": eigenvalues,
            "outputs": outputs.detach()[:, 0],
            "input_gradient": slopes,
            "tangent_norm": tangent,
        }
        save_file(
            {key: value.contiguous().cpu() for key, value in arrays.items()}, folder / f"plane-{step}.safetensors"
        )
        centred = functional.spectrum(functional.center(kernel.reshape(n, 1, n, 1)))
        last = min(19, n - 1)
        return {
            "plane/ratio_20": float(eigenvalues[last] / eigenvalues[0]),
            "plane/ratio_20_centered": float(centred[last] / centred[0]),
            "plane/alignment": float(functional.alignment(kernel.reshape(n, 1, n, 1), 2.0 * y[:, None].double() - 1)),
        }


def _difference(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return (logits[:, 1] - logits[:, 0])[:, None]


@final
class Norms(Exact):
    """Norm-based measures of complexity, and those over the margin that a tenth of the training examples fall below."""

    def start(self) -> None:
        """See the base class."""
        self.initial = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def values(self, folder: Path, step: int) -> dict[str, float]:  # noqa: ARG002
        """See the base class."""
        data, device = self.data, self.accelerator.device
        with torch.no_grad():
            outputs = torch.cat([self.model(x.to(device)).cpu() for x in data.train_x.split(500)])
        gap = float(complexity.margin(outputs, data.train_y, 0.1))
        measures: dict[str, Callable[..., Tensor]] = {
            "Frobenius product": complexity.frobenius_product,
            "spectral product": complexity.spectral_product,
            "path norm": partial(complexity.path_norm, shape=tuple(data.train_x.shape[1:])),
            "distance": partial(complexity.distance, initial=self.initial),
            "Bartlett 2017": partial(complexity.bartlett2017, initial=self.initial),
            "Neyshabur 2018": partial(complexity.neyshabur2018, initial=self.initial),
        }
        found = {"train/margin": gap}
        for name, measure in measures.items():
            found[f"norm/{name}"] = float(measure(self.model))
            # Without a margin there is no such measure.
            found[f"norm/{name}, margin"] = float(measure(self.model, margin=gap)) if gap > 0 else math.nan
        return found


QUANTITIES: dict[str, type[Measure]] = {
    "alignment": Alignment,
    "held_out": HeldOut,
    "path": PathSoFar,
    "ranks": Ranks,
    "spectrum": Spectrum,
    "layers": Layers,
    "groups": Groups,
    "plane": Plane,
    "norms": Norms,
}


@final
class Measurements:
    """Loss and accuracy, and the quantities that are asked for, by name."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, data: examples.Data, config: Any, names: tuple[str, ...]
    ) -> None:
        bare = accelerator.unwrap_model(model)
        kinds = [Accuracy, *(kind for name, kind in QUANTITIES.items() if name in names)]
        self.measures = [kind(accelerator, bare, data, config) for kind in kinds]
        self.path = next((measure.metric for measure in self.measures if isinstance(measure, PathSoFar)), None)

    def __call__(self, folder: Path, step: int) -> dict[str, float]:
        """Measure now; the network is in evaluation mode."""
        values: dict[str, float] = {}
        for measure in self.measures:
            values |= measure(folder, step)
        return values
