"""The flags of a run, with their defaults and allowed values."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import final

from data import bundled, examples
from training import flags, models, regularizers
from training.flags import flag
from training.measure import QUANTITIES


@final
@dataclass(frozen=True)
class Config:
    """Flags with their defaults; saved with the run."""

    dataset: str = flag("digits", "the data set", choices=examples.DATASETS)
    data_path: str | None = flag(None, "folder of the image data set; by default it comes from the Hub")
    train_size: int = flag(0, "training examples; 0 for all that are not held out", least=0)
    val_size: int = flag(0, "training examples to hold out for validation", least=0)
    label_noise: float = flag(0.0, "share of the training labels to redraw uniformly", least=0, most=1)
    mix: str | None = flag(None, "second data set to add training examples from", choices=examples.DATASETS)
    mix_size: int = flag(0, "examples to add from it", least=0)
    mix_path: str | None = flag(None, "folder of the second data set")
    augment: bool = flag(False, "crop images with a margin of 4 pixels, and mirror half of them, at every step")
    model: str = flag("mlp", "the network", choices=tuple(models.WIDTHS))
    hidden: int = flag(
        0, "units, first-stage channels, or embedding size; 0 for the model's default", least=0, most=10**9
    )
    depth: int = flag(0, "layers (mlp, cnn) or blocks (transformer); 0 for the model's default", least=0, most=10**4)
    batch_norm: bool = flag(False, "batch normalization (vgg, resnet18)")
    init: str = flag("torch", "initial weights: torch's default, or Kaiming normal", choices=models.INITS)
    seed: int = flag(0, "seed of initialization, subset, label noise, batches and sketches", least=0, most=2**32 - 1)
    steps: int = flag(1500, "optimizer steps", least=0)
    max_steps: int = flag(0, "steps after which to stop early, with a checkpoint to continue from; 0 for none", least=0)
    stop_loss: float = flag(0.0, "stop when the measured training loss is lower than this", least=0)
    log_spacing: float = flag(1.3, "ratio between successive logged steps: 0, 5, 5·1.3, …", least=1.01)
    batch_size: int = flag(64, "batch size on each process", least=1)
    lr: float = flag(0.05, "learning rate of SGD", least=0)
    momentum: float = flag(0.9, "momentum of SGD", least=0, most=1)
    weight_decay: float = flag(0.0, "weight decay of SGD", least=0)
    mixed_precision: str = flag("no", "precision of the task's forward pass", choices=("no", "bf16", "fp16"))
    cpu: bool = flag(False, "run on the CPU")
    with_tracking: bool = flag(False, "also log to wandb")
    checkpointing_steps: int = flag(0, "steps between checkpoints; 0 for none", least=0)
    output_dir: str | None = flag(None, "the run's folder; by default a new one under runs/")
    label_smoothing: float = flag(0.0, "share of each label to spread over all classes", least=0, most=1)
    regularizer: str = flag("none", "regularizer to add to the task", choices=("none", *regularizers.LOSSES))
    weight: float = flag(0.0, "strength of the regularizer", least=0)
    reg_examples: int = flag(32, "examples of a batch for the regularizer; all if the batch has fewer", least=2)
    reg_pool: int = flag(0, "draw them from this many first training examples, not the batch; 0 for the batch", least=0)
    reg_every: int = flag(1, "steps between evaluations of the regularizer", least=1)
    reg_from: float = flag(0.0, "share of training after which the regularizer starts", least=0, most=1)
    reg_until: float = flag(1.0, "share of training after which the regularizer stops", least=0, most=1)
    reg_probes: int = flag(0, "random probes of the regularizer; 0 for its default", least=0, most=10**5)
    reg_clip: float = flag(0.25, "largest norm of its gradient relative to the weights; 0 for no limit", least=0)
    reg_layers: str = flag("all", "layers whose tangent features count", choices=tuple(regularizers.LAYERS))
    reg_centered: bool = flag(True, "center the kernel of the regularizer")
    reg_per_layer: bool = flag(False, "average the regularizer over the layers' own kernels")
    sketch_dim: int = flag(64, "random directions for the alignment", least=3, most=10**5)
    probe_size: int = flag(500, "training and test examples for the alignment; all if there are fewer", least=10)
    kernel_size: int = flag(50, "training examples for the exact kernel; all if there are fewer", least=2)
    figure: bool = flag(True, "draw the log and print a table of it")
    measure: str = flag("alignment,path,ranks", f"quantities to log besides accuracy, from {', '.join(QUANTITIES)}")

    @property
    def name(self) -> str:
        """The name of the run's folder, if the user gives none."""
        return f"{self.dataset}-{self.model}-{self.regularizer}"

    @property
    def measures(self) -> tuple[str, ...]:
        """The quantities to log."""
        return tuple(name.strip() for name in self.measure.split(",") if name.strip())

    @property
    def last_step(self) -> int:
        """The step after which to stop."""
        return min(self.steps, self.max_steps or self.steps)

    @property
    def logged(self) -> set[int]:
        """The steps to log: 0, 5, 5·1.3, 5·1.3², … and the last."""
        steps, step = {0, self.steps}, 5.0
        while step < self.steps:
            steps.add(int(step))
            step *= self.log_spacing
        return steps

    def check(self) -> None:
        """Refuse flags that make no sense, before anything is created.

        Raises:
            ValueError: with the flag, the expected value and the given value.
        """
        flags.check(self)
        self._check_data()
        self._check_network()
        self._check_regularizer()
        if self.with_tracking and importlib.util.find_spec("wandb") is None:
            raise ValueError("--with_tracking: expected the package wandb. Install it: pip install wandb")
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--figure: expected the package matplotlib. pip install matplotlib, or pass --no-figure.")
        odd = set(self.measures) - QUANTITIES.keys()
        if odd:
            raise ValueError(f"--measure: expected some of {', '.join(QUANTITIES)}, got {', '.join(sorted(odd))}.")

    def _check_data(self) -> None:
        points = [name for name in (self.dataset, self.mix) if name in bundled.POINTS]
        if points and self.model != "mlp":
            raise ValueError(
                f"--model: expected mlp for {points[0]}, whose inputs are points, not images, got {self.model}."
            )
        if points and self.augment:
            raise ValueError(f"--augment: expected images, got {points[0]}, whose inputs are points.")
        if (self.mix is None) != (self.mix_size == 0):
            raise ValueError("--mix_size: expected --mix and --mix_size together, a data set and a number of examples.")
        for path, name in (("data_path", self.dataset), ("mix_path", self.mix)):
            if getattr(self, path) is not None and (name is None or name in bundled.BUNDLED):
                raise ValueError(f"--{path}: expected an image data set with it, got {name}, which needs no folder.")

    def _check_network(self) -> None:
        if self.depth == 1 and self.model in ("mlp", "cnn"):
            raise ValueError("--depth: expected at least 2 layers, or 0 for the default, got 1.")
        if self.depth and self.model not in models.DEPTHS:
            raise ValueError(f"--depth: expected {', '.join(models.DEPTHS)} with it, got {self.model}.")
        if self.batch_norm and self.model in ("mlp", "cnn", "transformer"):
            raise ValueError(f"--batch_norm: expected vgg or resnet18 with it, got {self.model}.")

    def _check_regularizer(self) -> None:
        if self.reg_probes and self.regularizer in ("kare", "fisher"):
            raise ValueError(f"--reg_probes: expected a regularizer that uses probes, got {self.regularizer}.")
        if self.regularizer == "fisher" and (self.reg_per_layer or not self.reg_centered):
            raise ValueError("--reg_per_layer, --reg_centered: expected a regularizer of the kernel, got fisher.")
        if self.regularizer == "none" and self.weight:
            raise ValueError(f"--weight: expected a --regularizer with it, got {self.weight} with none.")
        if self.regularizer != "none" and not self.weight:
            raise ValueError(f"--weight: expected a positive number with --regularizer {self.regularizer}, got 0.")
