r"""What happens to the tangent kernel of a network while it is trained?

Trains a network and follows, at log-spaced steps, the alignment of its tangent kernel with the labels (streamed sketch,
with standard error, on training and test examples), the kernel's effective rank and participation ratio (exact, on a
few training examples), and the complexity of the path that the weights take. Training examples count with the labels
that the network is trained on, redrawn ones included; test labels are clean.

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4 \
        --regularizer complexity --weight 0.016
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py \
        --config recipes/configs/paper/cifar10-vgg19.yaml --data_path FOLDER
    torchrun --nproc_per_node 2 recipes/train.py --cpu                        # two CPU processes
    WANDB_MODE=offline accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --with_tracking

Each run makes a new folder with config.json, examples.safetensors (which examples, labels, and which are difficult),
metrics.jsonl (no clock times: the same flags give the same bytes) and figure.png. With --checkpointing_steps it can be
killed at any time and goes on exactly where the newest checkpoint is:

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --resume_from_checkpoint runs/FOLDER
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200 \
        --output_dir runs/mine --resume_from_checkpoint latest                # begins, or goes on, when started again

On SIGTERM it finishes the step, writes a checkpoint and leaves with exit status 143. The signal must reach this
process: torchrun passes it on, accelerate launch does not (send it to the launcher's child).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import final

import _figure
import _flags
import _loop
import _run
import torch
from _fisher import FisherPenalty
from _flags import flag
from _measure import QUANTITIES, Measurements
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss

LOSSES = {
    "alignment": AlignmentLoss,
    "complexity": ComplexityPenalty,
    "participation_ratio": ParticipationRatioLoss,
    "kare": KARELoss,
    "fisher": FisherPenalty,
}
LAYERS = {"all": slice(None), "hidden": slice(-1), "last": slice(-1, None)}


@final
@dataclass(frozen=True)
class Config(_flags.Common):
    """Every flag with its default."""

    label_smoothing: float = flag(0.0, "share of each label that is spread over all classes", least=0, most=1)
    regularizer: str = flag("none", "what is added to the task", choices=("none", *LOSSES))
    weight: float = flag(0.0, "strength of the regularizer", least=0)
    reg_examples: int = flag(32, "of a batch, what the regularizer is evaluated on, or all if fewer", least=2)
    reg_pool: int = flag(0, "draw them from the first so many training examples in place of the batch", least=0)
    reg_every: int = flag(1, "steps between their evaluations", least=1)
    reg_from: float = flag(0.0, "share of training before the regularizer sets in", least=0, most=1)
    reg_until: float = flag(1.0, "share of training after which it is left out", least=0, most=1)
    reg_probes: int = flag(0, "its random probes; 0 for its own number", least=0, most=10**5)
    reg_clip: float = flag(0.25, "how many times as long as the weights its gradient may be; 0 for no limit", least=0)
    reg_layers: str = flag("all", "whose tangent features count", choices=tuple(LAYERS))
    reg_centered: bool = flag(True, "centre the kernel")
    reg_per_layer: bool = flag(False, "the mean over layers of each one's own")
    sketch_dim: int = flag(64, "random directions of the alignment", least=3, most=10**5)
    probe_size: int = flag(500, "training, and test, examples that alignment is measured on, or all if fewer", least=10)
    kernel_size: int = flag(50, "training examples of the exact kernel, or all if fewer", least=2)
    figure: bool = flag(True, "draw the log and print a table of it")
    measure: str = flag("alignment,path,ranks", f"what to log beside accuracy, of {', '.join(QUANTITIES)}")

    @property
    def measures(self) -> tuple[str, ...]:
        """What to log."""
        return tuple(name.strip() for name in self.measure.split(",") if name.strip())

    def check(self) -> None:
        """See the base class."""
        super().check()
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--figure: expected the package matplotlib. pip install matplotlib, or pass --no-figure.")
        odd = set(self.measures) - QUANTITIES.keys()
        if odd:
            raise ValueError(f"--measure: expected some of {', '.join(QUANTITIES)}, got {', '.join(sorted(odd))}.")
        if self.reg_probes and self.regularizer in ("kare", "fisher"):
            raise ValueError(f"--reg_probes: expected a regularizer of probes, got {self.regularizer}.")
        if self.regularizer == "fisher" and (self.reg_per_layer or not self.reg_centered):
            raise ValueError("--reg_per_layer, --reg_centered: expected a regularizer of the kernel, got fisher.")
        if self.regularizer == "none" and self.weight:
            raise ValueError(f"--weight: expected a --regularizer with it, got {self.weight} with none.")
        if self.regularizer != "none" and not self.weight:
            raise ValueError(f"--weight: expected a positive number with --regularizer {self.regularizer}, got 0.")


@final
class Train(_loop.Recipe[Config]):
    """Train, with or without a regularizer, and follow the tangent kernel."""

    config_class = Config

    @property
    def name(self) -> str:
        """See the base class."""
        return f"{self.config.dataset}-{self.config.model}-{self.config.regularizer}"

    def start(self, setup: _loop.Setup) -> None:
        """See the base class."""
        config = self.config
        self.regularizer = None if config.regularizer == "none" else self._regularizer(setup)
        pool = slice(setup.accelerator.process_index, config.reg_pool, setup.accelerator.num_processes)
        device = setup.accelerator.device
        self.pool = (setup.data.train_x[pool].to(device), setup.data.train_y[pool].to(device))
        self.measurements = Measurements(setup.accelerator, setup.model, setup.data, config, config.measures)

    def _regularizer(self, setup: _loop.Setup) -> nn.Module:
        config = self.config
        first, last = config.reg_from * config.steps, config.reg_until * config.steps
        layers = list(TangentFeatures(setup.accelerator.unwrap_model(setup.model)).layers.values())
        counted = [name for names in layers[LAYERS[config.reg_layers]] for name in names]
        options = {"probes": config.reg_probes} if config.reg_probes else {}
        return LOSSES[config.regularizer](
            setup.model,
            weight=lambda step: config.weight if first <= step < last else 0.0,
            examples=config.reg_examples,
            every_n_steps=config.reg_every,
            seed=config.seed,
            centered=config.reg_centered,
            per_layer=config.reg_per_layer,
            clip=config.reg_clip or None,
            params=counted,
            **options,
        ).to(setup.accelerator.device)

    def loss(self, logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        task = cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        if self.regularizer is None:
            return task
        return task + self.regularizer(*(self.pool if self.config.reg_pool else (x, y)))

    def measure(self, folder: Path, step: int) -> dict[str, float]:
        """See the base class."""
        return self.measurements(folder, step)

    def after_step(self) -> None:
        """See the base class."""
        if self.measurements.path is not None:
            self.measurements.path.step()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """See the base class."""
        parts = {"path": self.measurements.path, "regularizer": self.regularizer}
        return {name: part for name, part in parts.items() if part is not None}

    def conclude(self, folder: Path) -> list[Path]:
        """See the base class."""
        if not self.config.figure:
            return []
        config = _run.config_of(folder)
        name = _figure.label(config)
        figure = folder / "figure.png"
        _figure.draw({name: _run.read(folder)}, f"{_figure.task(config)}, regularizer: {name}", figure)
        _figure.print_table(folder)
        return [figure]


RECIPE = Train

if __name__ == "__main__":
    _loop.main(RECIPE, __doc__)
