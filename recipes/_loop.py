"""The way in which every recipe trains: launch guard, seeds, steps, log, checkpoints, stop and resume."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, final

import _checkpoint
import _data
import _flags
import _models
import _processes
import _run
import _tracking
import _words
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

C = TypeVar("C", bound=_flags.Common)


class Setup(NamedTuple):
    """What is trained, on what, with what."""

    accelerator: Accelerator
    model: nn.Module
    """As Accelerate wrapped it."""
    data: _data.Data
    optimizer: torch.optim.Optimizer
    loader: DataLoader[tuple[torch.Tensor, ...]]


class Recipe(ABC, Generic[C]):
    """What tells one recipe from another. A recipe makes its metrics and losses in :meth:`start`."""

    config_class: type[C]

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the run's folder, if the user gives none."""

    @abstractmethod
    def start(self, setup: Setup) -> None:
        """Make what watches or regularises the network, once."""

    @abstractmethod
    def measure(self, folder: Path, step: int) -> dict[str, float]:
        """Return the values to log, on all processes together; the network is in evaluation mode."""

    @abstractmethod
    def conclude(self, folder: Path) -> list[Path]:
        """Draw the figures from the log alone, print the table, on the main process; return the figures."""

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Modules whose state checkpoints keep, of each process its own."""
        return {}

    def loss(self, logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the training loss."""
        return cross_entropy(logits, y)

    def after_step(self) -> None:
        """Do what is due after every optimizer step."""

    def logged(self) -> set[int]:
        """Return the steps to measure at: 0, 5, 5·1.3, 5·1.3², … and the last."""
        steps, step = {0, self.config.steps}, 5.0
        while step < self.config.steps:
            steps.add(int(step))
            step *= self.config.log_spacing
        return steps


@final
class DivergedError(_words.ToldError):
    """A loss or a metric does not take what training has made of the network."""


def main(kind: type[Recipe[C]], doc: str | None) -> None:
    """Run a recipe from the command line."""
    with _words.in_words():
        config, resume = _flags.parse(kind.config_class, doc)
        run(kind(config), resume)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads outlive the process group, and one that still drops its last work while the interpreter exits
        # aborts the process. All is written and ended by now: leave without the interpreter's farewell.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def run(recipe: Recipe[C], resume: Path | None = None) -> Path:
    """Train, log and draw; return the run's folder.

    Args:
        recipe: what to run.
        resume: a checkpoint of the run to go on with, or the folder of a run to begin again.
    """
    setup = prepare(recipe)
    accelerator, config = setup.accelerator, recipe.config
    if resume is None:
        folder = _run.claim_folder(accelerator, config.output_dir, recipe.name)
    else:
        folder = _checkpoint.run_of(resume)
    with _run.only_writer(accelerator, folder, "--output_dir" if resume is None else _checkpoint.FLAG):
        step = _begin(setup, recipe, folder, resume)
        _train(setup, recipe, folder, step)
        if accelerator.is_main_process:
            figures = recipe.conclude(folder)
            print("\n".join([f"log:    {_run.log_of(folder)}", *(f"figure: {figure}" for figure in figures)]))
            _tracking.finish(accelerator, config, folder, figures)
        accelerator.wait_for_everyone()  # no process tears the group down while another still uses it
    accelerator.end_training()
    return folder


def prepare(recipe: Recipe[C]) -> Setup:
    """Load and make what the recipe trains on and with; nothing is written."""
    config = recipe.config
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        log_with="wandb" if config.with_tracking else None,
        # Probe loaders must not repeat examples to fill the last batch: metrics would count them twice.
        dataloader_config=DataLoaderConfiguration(even_batches=False, use_seedable_sampler=True),
    )
    _processes.refuse_split_launch(accelerator.num_processes)
    _processes.refuse_other_training(accelerator, config.mixed_precision)
    set_seed(config.seed)
    with accelerator.main_process_first():  # it fetches, the others find
        data = _load(config)
    _refuse_empty_shares(config, len(data.train_x), accelerator.num_processes)
    setup = _set_up(accelerator, config, data)
    recipe.start(setup)
    return setup


def advance(setup: Setup, recipe: Recipe[C], step: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """Take the given optimizer step, on a batch."""
    accelerator, config = setup.accelerator, recipe.config
    inputs = _augmented(x, config.seed, step, accelerator.process_index) if config.augment else x
    setup.optimizer.zero_grad()
    accelerator.backward(recipe.loss(setup.model(inputs), inputs, y))
    setup.optimizer.step()
    recipe.after_step()


def _load(config: _flags.Common) -> _data.Data:
    return _data.load(
        config.dataset,
        train_size=config.train_size,
        val_size=config.val_size,
        label_noise=config.label_noise,
        mix=config.mix,
        mix_size=config.mix_size,
        data_path=config.data_path,
        mix_path=config.mix_path,
        seed=config.seed,
    )


def _refuse_empty_shares(config: _flags.Common, examples: int, processes: int) -> None:
    if examples // config.batch_size < processes:  # drop_last would leave no batch: no end
        raise ValueError(
            f"--batch_size: expected a batch of {config.batch_size} for each of {processes} process(es), "
            f"got {examples} training examples. Lower --batch_size or use fewer processes."
        )


def _refuse_too_large(parameters: float, device: torch.device) -> None:
    cuda = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    needed = 3 * 4 * parameters  # float32: weights, their gradients, and momentum
    if needed > room:
        raise ValueError(
            f"--hidden, --depth: expected a network that fits into the {room / 2**30:.3g} GiB of memory, got one of "
            f"{parameters:.3g} parameters, which take {needed / 2**30:.3g} GiB while it is trained."
        )


def _begin(setup: Setup, recipe: Recipe[C], folder: Path, resume: Path | None) -> int:
    """Bring the run to where training begins, at its start or at a checkpoint, and return that step."""
    accelerator, config = setup.accelerator, recipe.config
    values, step = dataclasses.asdict(config), 0
    with ExitStack() as attempt:
        if resume is None:
            if accelerator.is_main_process:
                attempt.enter_context(_run.unclaimed_on_failure(folder))
            _processes.on_main(accelerator, lambda: _run.save_config(folder, values))
        elif resume == folder:
            _processes.on_main(accelerator, lambda: _run.refuse_done(folder, config.steps, config.stop_loss))
            _run.cut(accelerator, folder, [])
        else:
            step = _checkpoint.verify(resume, _flags.identity(values), accelerator.num_processes)
            _run.cut(accelerator, folder, [other for other in recipe.logged() if other <= step])
        _tracking.start(accelerator, config, folder)
        if resume is not None and step:
            _checkpoint.load(accelerator, resume, recipe.parts)
        else:
            _processes.on_main(accelerator, lambda: _data.save(setup.data, folder / "examples.safetensors"))
            _log(setup, recipe, folder, step)
    return step


def _set_up(accelerator: Accelerator, config: _flags.Common, data: _data.Data) -> Setup:
    network = (config.model, tuple(data.train_x.shape[1:]), data.num_classes)
    options = {name: getattr(config, name) for name in ("hidden", "depth", "batch_norm", "init")}
    _refuse_too_large(_models.size(*network, **options), accelerator.device)
    set_seed(config.seed)
    model = _models.build(*network, **options)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    # drop_last: every process takes the same number of steps.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), config.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return Setup(accelerator, model, data, optimizer, loader)


def _train(setup: Setup, recipe: Recipe[C], folder: Path, start: int) -> None:
    accelerator, config = setup.accelerator, recipe.config
    signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
    logged = recipe.logged()
    with _progress(accelerator) as progress:
        bar = progress.add_task("training", total=config.last_step, completed=start)
        for step, (x, y) in _run.batches(setup.loader, start, config.last_step):
            with _diverging(folder, step):
                advance(setup, recipe, step, x, y)
                low = step in logged and _log(setup, recipe, folder, step)
            progress.update(bar, completed=step)
            if low:
                return
            _save_or_stop(accelerator, recipe, folder, step)


@contextmanager
def _diverging(folder: Path, step: int) -> Iterator[None]:
    """Say where a loss or a metric no longer takes what training has made of the network."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        if _words.is_told(error):
            raise
        raise DivergedError(
            f"training ended at step {step}: {' '.join(str(error).split())} If it diverged, lower --lr or --weight. "
            f"The log until then is kept: {_run.log_of(folder)}"
        ) from error


def _augmented(x: torch.Tensor, seed: int, step: int, process: int) -> torch.Tensor:
    # Of its own, so that a run which goes on draws what it would have drawn. Below 2⁶³, as torch wants seeds, no two
    # steps of a run share one: 10⁴ times their difference is no multiple of 2⁶³.
    generator = torch.Generator().manual_seed(((seed * 10**9 + step) * 10**4 + process) % 2**63)
    return _data.crop_and_flip(x, generator)


def _save_or_stop(accelerator: Accelerator, recipe: Recipe[C], folder: Path, step: int) -> None:
    config = recipe.config
    if step == config.steps:
        return
    stop = accelerator.check_trigger()  # a process that got the signal stops all of them
    due = config.checkpointing_steps and step % config.checkpointing_steps == 0
    if stop or due or step == config.last_step:
        identity = _flags.identity(dataclasses.asdict(config))
        saved = _checkpoint.save(accelerator, folder, step, identity, recipe.parts)
        if stop or step == config.last_step:
            reason = "SIGTERM" if stop else "--max_steps"
            accelerator.print(f"stopped by {reason} after step {step}; go on with {_checkpoint.FLAG} {saved}")
    if stop:
        accelerator.end_training()
        sys.exit(128 + signal.SIGTERM)


def _log(setup: Setup, recipe: Recipe[C], folder: Path, step: int) -> bool:
    """Measure, and say whether the training loss is low enough to stop."""
    model = setup.accelerator.unwrap_model(setup.model)
    _processes.share_buffers(setup.accelerator, model)
    training = model.training
    setup.model.eval()
    values: dict[str, Any] = {"step": step, **recipe.measure(folder, step)}
    setup.model.train(training)
    _processes.on_main(setup.accelerator, lambda: _run.append(folder, values))
    setup.accelerator.log(values, step=step)
    return bool(values["train/loss"] < recipe.config.stop_loss)


def _progress(accelerator: Accelerator) -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not (accelerator.is_main_process and console.is_terminal), transient=True)
