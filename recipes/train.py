r"""What happens to the tangent kernel of a network while it is trained?

Trains a small network on bundled data and follows, at log-spaced steps, the alignment of its tangent kernel with the
labels (streamed sketch, with standard error, on training and test examples) and the kernel's effective rank and
participation ratio (exact, on a few training examples). Training examples count with the labels that the network is
trained on, redrawn ones included; test labels are clean.

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4 \
        --regularizer weight_decay --weight 0.02
    torchrun --nproc_per_node 2 recipes/train.py --cpu                        # two CPU processes
    WANDB_MODE=offline accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --with_tracking

Each run makes a new folder with config.json, metrics.jsonl (no clock times: the same flags give the same bytes) and
figure.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _data
import _figure
import _models
import _run
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alignreg import TangentFeatures, functional
from alignreg.metrics import TangentAlignment


@dataclass(frozen=True)
class Config:
    """Every flag with its default; saved with the run."""

    dataset: str = "digits"  # digits or disk
    model: str = "mlp"  # mlp or cnn
    hidden: int = 256  # width of the hidden layers; the cnn takes an eighth of it as channels
    depth: int = 3  # layers with weights
    regularizer: str = "none"  # none or weight_decay
    weight: float = 0.0  # strength of the regularizer
    label_noise: float = 0.0  # share of the training labels that are redrawn uniformly
    train_size: int = 1000
    seed: int = 0
    steps: int = 1500
    batch_size: int = 64  # on each process
    lr: float = 0.05
    momentum: float = 0.9
    sketch_dim: int = 64  # random directions of the alignment
    probe_size: int = 500  # training, and test, examples that alignment is measured on, or all if fewer
    kernel_size: int = 50  # training examples of the exact kernel, or all if fewer
    mixed_precision: str = "no"  # no, bf16 or fp16
    cpu: bool = False
    with_tracking: bool = False  # log to wandb as well
    output_dir: str | None = None  # a new folder under runs/ by default


CHOICES = {
    "dataset": tuple(_data.DATASETS),
    "model": tuple(_models.MODELS),
    "regularizer": ("none", "weight_decay"),
    "mixed_precision": ("no", "bf16", "fp16"),
}
LEAST = {
    "hidden": 1,
    "depth": 2,
    "batch_size": 1,
    "sketch_dim": 3,
    "probe_size": 10,
    "kernel_size": 2,
    **dict.fromkeys(("steps", "seed", "lr", "momentum", "weight", "label_noise"), 0),
}
MOST = {"momentum": 1.0, "label_noise": 1.0}


def check(config: Config) -> None:
    """Refuse flags that cannot be meant, before anything is made.

    Raises:
        ValueError: with the flag, what was expected and what came.
    """
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"--{name}: expected one of {', '.join(allowed)}, got {getattr(config, name)!r}.")
    for name, least in LEAST.items():
        value, most = getattr(config, name), MOST.get(name, math.inf)
        if not (least <= value <= most and math.isfinite(value)):
            bounds = f"between {least:g} and {most:g}" if name in MOST else f"of at least {least:g}"
            raise ValueError(f"--{name}: expected a number {bounds}, got {value}.")
    if not config.batch_size <= config.train_size <= 1000:
        raise ValueError(
            f"--train_size: expected between one batch ({config.batch_size}) and the 1000 training examples of "
            f"{config.dataset}, got {config.train_size}."
        )
    if config.regularizer == "none" and config.weight:
        raise ValueError(f"--weight: expected --regularizer weight_decay with it, got {config.weight} with none.")
    if config.model == "cnn" and config.dataset == "disk":
        raise ValueError("--model: expected mlp for disk, whose inputs are points and no images, got cnn.")
    if config.with_tracking and importlib.util.find_spec("wandb") is None:
        raise ValueError("--with_tracking: expected the package wandb. Install it: pip install wandb")


def log_steps(steps: int) -> set[int]:
    """0, 5, 5·1.3, 5·1.3², … and the last step."""
    spaced = (int(5 * 1.3**k) for k in range(200))
    return {0, steps, *(step for step in spaced if step < steps)}


def train(config: Config) -> Path:
    """Train, log and draw; return the run's folder."""
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        log_with="wandb" if config.with_tracking else None,
        # Probe loaders must not repeat examples to fill the last batch: metrics would count them twice.
        dataloader_config=DataLoaderConfiguration(even_batches=False, use_seedable_sampler=True),
    )
    _run.refuse_split_launch(accelerator.num_processes)
    if config.train_size // config.batch_size < accelerator.num_processes:  # drop_last would leave no batch: no end
        raise ValueError(
            f"--train_size: expected a batch of {config.batch_size} for each of {accelerator.num_processes} processes, "
            f"got {config.train_size} examples. Lower --batch_size or use fewer processes."
        )
    name = f"{config.dataset}-{config.model}-{config.regularizer}"
    folder = _run.claim_folder(accelerator, config.output_dir, name)
    if accelerator.is_main_process:
        _run.save_config(folder, dataclasses.asdict(config))
    _start_tracking(accelerator, config, folder)

    set_seed(config.seed)
    data = _data.load(config.dataset, train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    shape = tuple(data.train_x.shape[1:])
    model = _models.MODELS[config.model](shape, data.num_classes, hidden=config.hidden, depth=config.depth)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight)
    # drop_last: every process takes the same number of steps.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), config.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    measure = Measurements(accelerator, model, data, config)
    logged = log_steps(config.steps)

    step = 0
    with _progress(accelerator) as progress:
        bar = progress.add_task("training", total=config.steps)
        _log(accelerator, folder, step, measure())
        while step < config.steps:
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(cross_entropy(model(x), y))
                optimizer.step()
                step += 1
                progress.update(bar, completed=step)
                if step in logged:
                    _log(accelerator, folder, step, measure())
                if step == config.steps:
                    break

    if accelerator.is_main_process:
        regularizer = config.regularizer if config.regularizer == "none" else f"{config.regularizer} {config.weight:g}"
        title = f"{config.dataset}, {config.model}, label noise {config.label_noise:g}, regulariser: {regularizer}"
        _figure.draw(_run.read(folder), title, folder / "figure.png")
        _run.print_table(folder)
        print(f"log:    {folder / 'metrics.jsonl'}\nfigure: {folder / 'figure.png'}")
        if config.with_tracking:
            import wandb  # noqa: PLC0415 - optional

            accelerator.get_tracker("wandb").log({"figure": wandb.Image(str(folder / "figure.png"))})
    accelerator.wait_for_everyone()  # no process tears the group down while another still uses it
    accelerator.end_training()
    return folder


class Measurements:
    """Loss, accuracy, alignment and ranks of the live model; the same on any number of processes."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, data: _data.Data, config: Config) -> None:
        self.accelerator, self.model = accelerator, model
        self.features = TangentFeatures(model)
        device = accelerator.device
        self.kernel_x = data.train_x[: config.kernel_size].to(device)
        self.alignment = TangentAlignment(
            model, data.num_classes, sketch_dim=config.sketch_dim, seed=config.seed, return_std_error=True
        ).to(device)
        self.accuracy = MulticlassAccuracy(data.num_classes, average="micro").to(device)
        self.loss = MeanMetric().to(device)
        size = config.probe_size
        parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
        self.loaders = {
            part: [
                accelerator.prepare(DataLoader(TensorDataset(x, y), 100)),
                accelerator.prepare(DataLoader(TensorDataset(x[:size], y[:size]), 100)),
            ]
            for part, (x, y) in parts.items()
        }

    def __call__(self) -> dict[str, float]:
        """Measure now."""
        values: dict[str, float] = {}
        self.model.eval()
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
        if self.accelerator.is_main_process:  # no collective below
            kernel = functional.center(self.features.kernel(self.kernel_x)).double()
            values["train/effective_rank"] = float(functional.effective_rank(kernel))
            values["train/participation_ratio"] = float(functional.participation_ratio(kernel))
        self.model.train()
        return values


def _log(accelerator: Accelerator, folder: Path, step: int, values: dict[str, float]) -> None:
    if accelerator.is_main_process:
        _run.append(folder, {"step": step, **values})
    accelerator.log({"step": step, **values}, step=step)


def _start_tracking(accelerator: Accelerator, config: Config, folder: Path) -> None:
    if config.with_tracking:
        options = {"wandb": {"dir": str(folder), "name": folder.name}}
        accelerator.init_trackers("alignreg", dataclasses.asdict(config), options)
        if accelerator.is_main_process:
            run = accelerator.get_tracker("wandb", unwrap=True)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")


def _progress(accelerator: Accelerator) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not (accelerator.is_main_process and console.is_terminal), transient=True)


def parse(arguments: list[str] | None = None) -> Config:
    """Read flags, and the flags of an earlier run where ``--config`` names its config.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config.json of an earlier run, whose flags become the defaults")
    kinds = {"int": int, "float": float}
    for field in dataclasses.fields(Config):
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kinds.get(str(field.type), str), help=f"default: {field.default}")
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    source = given.pop("config")
    try:
        earlier = _earlier(source) if source else {}
        config = Config(**{**earlier, **given})
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def _earlier(source: str) -> dict[str, Any]:
    expected = "--config: expected the config.json of an earlier run"
    try:
        values = dict(json.loads(Path(source).read_text())["config"])
    except OSError as error:
        raise ValueError(f"{expected}, but {source}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{expected}, got another file: {source}.") from None
    unknown = values.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"--config: {source} has flags that this recipe does not know: {', '.join(sorted(unknown))}.")
    values.pop("output_dir", None)  # a new run has its own folder
    return values


def main() -> None:
    """Run from the command line."""
    config = parse()
    try:
        train(config)
    except ValueError as error:
        if not str(error).startswith("--"):
            raise
        sys.exit(f"train.py: error: {error}")
    # After DDP, gloo's threads outlive the process group, and one that still drops its last work while the interpreter
    # exits aborts the process. The time that this takes lets it finish first: enough under load, but no guarantee.
    gc.collect()


if __name__ == "__main__":
    main()
