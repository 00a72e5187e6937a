r"""What happens to the tangent kernel of a network while it is trained?

Trains a small network on bundled data and follows, at log-spaced steps, the alignment of its tangent kernel with the
labels (streamed sketch, with standard error, on training and test examples), the kernel's effective rank and
participation ratio (exact, on a few training examples), and the complexity of the path that the weights take. Training
examples count with the labels that the network is trained on, redrawn ones included; test labels are clean.

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4 \
        --regularizer complexity --weight 0.016                               # or alignment, or weight_decay
    torchrun --nproc_per_node 2 recipes/train.py --cpu                        # two CPU processes
    WANDB_MODE=offline accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --with_tracking

Each run makes a new folder with config.json, metrics.jsonl (no clock times: the same flags give the same bytes) and
figure.png. With --checkpointing_steps it can be killed at any time and goes on exactly where the newest checkpoint is:

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --resume_from_checkpoint runs/FOLDER

On SIGTERM it finishes the step, writes a checkpoint and leaves with exit status 143. The signal must reach this
process: torchrun passes it on, accelerate launch does not (send it to the launcher's child).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _checkpoint
import _data
import _figure
import _models
import _run
import torch
from _measure import Measurements
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss


def flag(default: Any, text: str) -> Any:
    """Return a field with the help that ``--help`` shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every flag with its default; saved with the run."""

    dataset: str = flag("digits", "bundled data")
    model: str = flag("mlp", "the network")
    hidden: int = flag(256, "width of the hidden layers; the cnn takes an eighth of it as channels")
    depth: int = flag(3, "layers with weights")
    regularizer: str = flag("none", "what is added to the task")
    weight: float = flag(0.0, "strength of the regularizer")
    reg_examples: int = flag(32, "of a batch, what the regularizer is evaluated on, or all if fewer")
    reg_every: int = flag(1, "steps between their evaluations")
    label_noise: float = flag(0.0, "share of the training labels that are redrawn uniformly")
    train_size: int = flag(1000, "training examples")
    seed: int = flag(0, "of initialisation, subset, label noise, batches and sketches")
    steps: int = flag(1500, "optimizer steps")
    batch_size: int = flag(64, "on each process")
    lr: float = flag(0.05, "learning rate of SGD")
    momentum: float = flag(0.9, "of SGD")
    sketch_dim: int = flag(64, "random directions of the alignment")
    probe_size: int = flag(500, "training, and test, examples that alignment is measured on, or all if fewer")
    kernel_size: int = flag(50, "training examples of the exact kernel, or all if fewer")
    mixed_precision: str = flag("no", "of the task's forward pass")
    cpu: bool = flag(False, "run on the CPU")
    with_tracking: bool = flag(False, "log to wandb as well")
    checkpointing_steps: int = flag(0, "steps between checkpoints, 0 for none")
    output_dir: str | None = flag(None, "the run's folder; a new one under runs/ by default")


LOSSES = {
    "alignment": AlignmentLoss,
    "complexity": ComplexityPenalty,
    "participation_ratio": ParticipationRatioLoss,
    "kare": KARELoss,
}
CHOICES = {
    "dataset": tuple(_data.DATASETS),
    "model": tuple(_models.MODELS),
    "regularizer": ("none", "weight_decay", *LOSSES),
    "mixed_precision": ("no", "bf16", "fp16"),
}
LEAST = {
    "hidden": 1,
    "depth": 2,
    "batch_size": 1,
    "sketch_dim": 3,
    "probe_size": 10,
    "kernel_size": 2,
    "reg_examples": 2,
    "reg_every": 1,
    **dict.fromkeys(("steps", "seed", "lr", "momentum", "weight", "label_noise", "checkpointing_steps"), 0),
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
        raise ValueError(f"--weight: expected a --regularizer with it, got {config.weight} with none.")
    if config.regularizer != "none" and not config.weight:
        raise ValueError(f"--weight: expected a positive number with --regularizer {config.regularizer}, got 0.")
    if config.model == "cnn" and config.dataset == "disk":
        raise ValueError("--model: expected mlp for disk, whose inputs are points and no images, got cnn.")
    if config.with_tracking and importlib.util.find_spec("wandb") is None:
        raise ValueError("--with_tracking: expected the package wandb. Install it: pip install wandb")


def log_steps(steps: int) -> set[int]:
    """0, 5, 5·1.3, 5·1.3², … and the last step."""
    spaced = (int(5 * 1.3**k) for k in range(200))
    return {0, steps, *(step for step in spaced if step < steps)}


class Setup(NamedTuple):
    """What is trained, with what, and what watches it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[tuple[torch.Tensor, ...]]
    regularizer: nn.Module | None
    measure: Measurements

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps of each process."""
        parts: dict[str, nn.Module] = {"path": self.measure.path}
        return parts if self.regularizer is None else {**parts, "regularizer": self.regularizer}


def train(config: Config, resume: Path | None = None) -> Path:
    """Train, log and draw; return the run's folder. ``resume`` is a checkpoint of the run to go on with."""
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
    logged = log_steps(config.steps)
    folder, start = _open(accelerator, config, resume, logged)
    _start_tracking(accelerator, config, folder)
    setup = _set_up(accelerator, config)
    if resume is not None:
        _checkpoint.load(accelerator, resume, setup.parts)
    else:
        _log(accelerator, folder, start, setup.measure())
    signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    with _progress(accelerator) as progress:
        bar = progress.add_task("training", total=config.steps, completed=start)
        for step, (x, y) in _run.batches(setup.loader, start, config.steps):
            setup.optimizer.zero_grad()
            loss = cross_entropy(setup.model(x), y)
            if setup.regularizer is not None:
                loss = loss + setup.regularizer(x, y)
            accelerator.backward(loss)
            setup.optimizer.step()
            setup.measure.path.step()
            progress.update(bar, completed=step)
            if step in logged:
                _log(accelerator, folder, step, setup.measure())
            _save_or_stop(accelerator, folder, step, config, setup.parts)
    _conclude(accelerator, folder, config)
    return folder


def _open(accelerator: Accelerator, config: Config, resume: Path | None, logged: set[int]) -> tuple[Path, int]:
    """Return the run's folder, new or gone on with, and the step that it is at."""
    values = dataclasses.asdict(config)
    if resume is not None:
        folder = _checkpoint.run_of(resume)
        step = _checkpoint.verify(resume, values, accelerator.num_processes)
        _run.cut(accelerator, folder, [other for other in logged if other <= step])
        return folder, step
    folder = _run.claim_folder(accelerator, config.output_dir, f"{config.dataset}-{config.model}-{config.regularizer}")
    if accelerator.is_main_process:
        _run.save_config(folder, values)
    return folder, 0


def _set_up(accelerator: Accelerator, config: Config) -> Setup:
    set_seed(config.seed)
    data = _data.load(config.dataset, train_size=config.train_size, label_noise=config.label_noise, seed=config.seed)
    shape = tuple(data.train_x.shape[1:])
    model = _models.MODELS[config.model](shape, data.num_classes, hidden=config.hidden, depth=config.depth)
    decay = config.weight if config.regularizer == "weight_decay" else 0.0
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=decay)
    # drop_last: every process takes the same number of steps.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), config.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    regularizer = None
    if config.regularizer in LOSSES:
        regularizer = LOSSES[config.regularizer](
            model,
            weight=config.weight,
            examples=config.reg_examples,
            every_n_steps=config.reg_every,
            seed=config.seed,
        ).to(accelerator.device)
    measure = Measurements(
        accelerator,
        model,
        data,
        sketch_dim=config.sketch_dim,
        seed=config.seed,
        probe_size=config.probe_size,
        kernel_size=config.kernel_size,
    )
    return Setup(model, optimizer, loader, regularizer, measure)


def _save_or_stop(
    accelerator: Accelerator, folder: Path, step: int, config: Config, parts: dict[str, nn.Module]
) -> None:
    if step == config.steps:
        return
    stop = accelerator.check_trigger()  # a process that got the signal stops all of them
    if stop or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
        saved = _checkpoint.save(accelerator, folder, step, dataclasses.asdict(config), parts)
    if stop:
        accelerator.print(f"stopped by SIGTERM after step {step}; go on with {_checkpoint.FLAG} {saved}")
        accelerator.end_training()
        sys.exit(128 + signal.SIGTERM)


def _conclude(accelerator: Accelerator, folder: Path, config: Config) -> None:
    if accelerator.is_main_process:
        values = dataclasses.asdict(config)
        name = _run.label(values)
        title = f"{_run.task(values)}, regularizer: {name}"
        _figure.draw({name: _run.read(folder)}, title, folder / "figure.png")
        _run.print_table(folder)
        print(f"log:    {folder / 'metrics.jsonl'}\nfigure: {folder / 'figure.png'}")
        if config.with_tracking:
            import wandb  # noqa: PLC0415 - optional

            accelerator.get_tracker("wandb").log({"figure": wandb.Image(str(folder / "figure.png"))})
    accelerator.wait_for_everyone()  # no process tears the group down while another still uses it
    accelerator.end_training()


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


def parse(arguments: list[str] | None = None) -> tuple[Config, Path | None]:
    """Read flags: with those of an earlier run as defaults, or all of a run's own and the checkpoint to go on from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", help="config.json of an earlier run, whose flags become the defaults")
    source.add_argument(_checkpoint.FLAG, help="a checkpoint, or a run's folder for its newest, to go on from")
    kinds = {"int": int, "float": float}
    for field in dataclasses.fields(Config):
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if field.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kinds.get(str(field.type), str), metavar=field.name.upper())
        choices = f"one of {', '.join(CHOICES[field.name])}; " if field.name in CHOICES else ""
        options["help"] = f"{field.metadata['help']} ({choices}default: {field.default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(arguments))
    template, checkpoint = given.pop("config"), given.pop("resume_from_checkpoint")
    resume = None
    try:
        if checkpoint:
            resume = _checkpoint.find(checkpoint)
            earlier = _earlier(str(_checkpoint.run_of(resume) / "config.json"), _checkpoint.FLAG)
            _refuse_changes(given, earlier)
        else:
            earlier = _earlier(template, "--config") if template else {}
        earlier.pop("output_dir", None)  # a new run has its own folder, and one that goes on may have been moved
        config = Config(**{**earlier, **given})
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, resume


def _refuse_changes(given: dict[str, Any], earlier: dict[str, Any]) -> None:
    for name, value in given.items():
        if value != earlier.get(name, value):
            raise ValueError(
                f"--{name}: expected the value of the run that goes on, {earlier[name]}, got {value}. "
                "Leave the flag out, or start a new run."
            )


def _earlier(source: str, flag: str) -> dict[str, Any]:
    expected = f"{flag}: expected the config.json of an earlier run"
    try:
        values = dict(json.loads(Path(source).read_text())["config"])
    except OSError as error:
        raise ValueError(f"{expected}, but {source}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{expected}, got another file: {source}.") from None
    unknown = values.keys() - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise ValueError(f"{flag}: {source} has flags that this recipe does not know: {', '.join(sorted(unknown))}.")
    return values


def main() -> None:
    """Run from the command line."""
    config, resume = parse()
    try:
        train(config, resume)
    except ValueError as error:
        if not str(error).startswith("--"):
            raise
        sys.exit(f"train.py: error: {error}")
    # After DDP, gloo's threads outlive the process group, and one that still drops its last work while the interpreter
    # exits aborts the process. The time that this takes lets it finish first: enough under load, but no guarantee.
    gc.collect()


if __name__ == "__main__":
    main()
