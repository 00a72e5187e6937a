"""A training run from top to bottom: prepare, step, measure, save, stop and resume."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, final

import psutil
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from data import examples
from training import checkpoint, flags, messages, models, plots, processes, regularizers, run_folder, tracking
from training.config import Config
from training.measure import Measurements, Seen


@final
class Run(NamedTuple):
    """The objects of a training run."""

    config: Config
    accelerator: Accelerator
    model: nn.Module
    """As wrapped by Accelerate."""
    data: examples.Data
    optimizer: torch.optim.Optimizer
    loader: DataLoader[tuple[Tensor, ...]]
    regularizer: nn.Module | None
    pool: tuple[Tensor, Tensor] | None
    """This process's share of the examples that the regularizer uses instead of the batch."""
    measurements: Measurements

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Modules whose state is saved in checkpoints, separately for each process."""
        parts = {"path": self.measurements.path, "regularizer": self.regularizer}
        return {name: part for name, part in parts.items() if part is not None}


@final
class DivergedError(messages.ToldError):
    """A loss or a metric rejects the network that training has produced."""


def train(config: Config, resume: Path | None = None) -> Path:
    """Train, log and draw; return the run's folder.

    Args:
        config: the flags.
        resume: a checkpoint of the run to continue from, or the folder of a run to restart.
    """
    run, logged = prepare(config), config.logged
    accelerator = run.accelerator
    if resume is None:
        folder = processes.on_main(accelerator, lambda: run_folder.claim(config.output_dir, config.name))
    else:
        folder = checkpoint.run_of(resume)
    with run_folder.only_writer(accelerator, folder, "--output_dir" if resume is None else checkpoint.FLAG):
        start = _begin(run, folder, resume)
        signal.signal(signal.SIGTERM, lambda *_: accelerator.set_trigger())
        console = Console(stderr=True)
        shown = accelerator.is_main_process and console.is_terminal
        with Progress(console=console, disable=not shown, transient=True) as progress:
            bar = progress.add_task("training", total=config.last_step, completed=start)
            for step, (x, y) in _batches(run.loader, start, config.last_step):
                with _diverging(folder, step):
                    advance(run, step, x, y)
                    low = step in logged and _log(run, folder, step) < config.stop_loss
                progress.update(bar, completed=step)
                if low:
                    break
                _save_or_stop(run, folder, step)
        if accelerator.is_main_process:
            _conclude(run, folder)
        accelerator.wait_for_everyone()  # no process tears the group down while another still uses it
    accelerator.end_training()
    return folder


def prepare(config: Config) -> Run:
    """Load the data and build everything that a run needs, without writing any file."""
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        log_with="wandb" if config.with_tracking else None,
        # Probe loaders must not repeat examples to fill the last batch: metrics would count them twice.
        dataloader_config=DataLoaderConfiguration(even_batches=False, use_seedable_sampler=True),
    )
    processes.refuse_split_launch(accelerator.num_processes)
    processes.refuse_other_training(accelerator, config.mixed_precision)
    set_seed(config.seed)
    with accelerator.main_process_first():  # the main process downloads, the others read its copy
        names = ("train_size", "val_size", "label_noise", "mix", "mix_size", "data_path", "mix_path", "seed")
        data = examples.load(config.dataset, **{name: getattr(config, name) for name in names})
    world = accelerator.num_processes
    if len(data.train_x) // config.batch_size < world:  # drop_last would leave no batch, and the loop would not end
        raise ValueError(
            f"--batch_size: expected a batch of {config.batch_size} for each of {world} process(es), "
            f"got {len(data.train_x)} training examples. Lower --batch_size or use fewer processes."
        )
    network = (config.model, tuple(data.train_x.shape[1:]), data.num_classes)
    options = {name: getattr(config, name) for name in ("hidden", "depth", "batch_norm", "init")}
    _refuse_too_large(models.size(*network, **options), accelerator.device)
    set_seed(config.seed)
    model = models.build(*network, **options)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    # drop_last gives every process the same number of steps.
    loader = DataLoader(TensorDataset(data.train_x, data.train_y), config.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    share = slice(accelerator.process_index, config.reg_pool, accelerator.num_processes)
    pool = (data.train_x[share].to(accelerator.device), data.train_y[share].to(accelerator.device))
    return Run(
        config,
        accelerator,
        model,
        data,
        optimizer,
        loader,
        regularizer=regularizers.make(config, accelerator, model),
        pool=pool if config.reg_pool else None,
        measurements=Measurements(Seen(accelerator, accelerator.unwrap_model(model), data, config), config.measures),
    )


def advance(run: Run, step: int, x: Tensor, y: Tensor) -> None:
    """Make one optimizer step on a batch."""
    inputs = _augmented(x, run.config.seed, step, run.accelerator.process_index) if run.config.augment else x
    run.optimizer.zero_grad()
    run.accelerator.backward(loss(run, run.model(inputs), inputs, y))
    run.optimizer.step()
    if run.measurements.path is not None:
        run.measurements.path.step()


def loss(run: Run, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the training loss."""
    task = cross_entropy(logits, y, label_smoothing=run.config.label_smoothing)
    return task if run.regularizer is None else task + run.regularizer(*(run.pool or (x, y)))


def _begin(run: Run, folder: Path, resume: Path | None) -> int:
    """Bring the run to its start or to a checkpoint, and return that step."""
    accelerator, config = run.accelerator, run.config
    values, step = dataclasses.asdict(config), 0
    with ExitStack() as attempt:
        if resume is None:
            if accelerator.is_main_process:
                attempt.enter_context(run_folder.unclaimed_on_failure(folder))
            processes.on_main(accelerator, lambda: run_folder.save_config(folder, values))
        elif resume == folder:
            processes.on_main(accelerator, lambda: run_folder.refuse_done(folder, config.steps, config.stop_loss))
            run_folder.cut(accelerator, folder, [])
        else:
            step = checkpoint.verify(resume, flags.identity(values), accelerator.num_processes)
            run_folder.cut(accelerator, folder, [other for other in config.logged if other <= step])
        if config.with_tracking:
            tracking.start(accelerator, values, folder)
        if resume is not None and step:
            checkpoint.load(accelerator, resume, run.parts)
        else:
            processes.on_main(accelerator, lambda: run_folder.save_examples(folder, run.data))
            _log(run, folder, step)
    return step


def _batches(loader: Any, step: int, last: int) -> Iterator[tuple[int, Any]]:
    """Yield the steps from ``step + 1`` to ``last`` with their batches, across epochs."""
    while step < last:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done) if done else loader:
            step += 1
            yield step, batch
            if step == last:
                return


def _log(run: Run, folder: Path, step: int) -> float:
    """Measure, add a line to the log, and return the training loss."""
    model = run.accelerator.unwrap_model(run.model)
    processes.share_buffers(run.accelerator, model)
    training = model.training
    run.model.eval()
    values: dict[str, Any] = {"step": step, **run.measurements(folder, step)}
    run.model.train(training)
    processes.on_main(run.accelerator, lambda: run_folder.append(folder, values))
    run.accelerator.log(values, step=step)
    return float(values["train/loss"])


def _save_or_stop(run: Run, folder: Path, step: int) -> None:
    """Write a checkpoint if one is due or the run must stop here, and exit on SIGTERM."""
    accelerator, config = run.accelerator, run.config
    if step == config.steps:
        return
    stop = accelerator.check_trigger()  # a process that got the signal stops all of them
    due = config.checkpointing_steps and step % config.checkpointing_steps == 0
    if stop or due or step == config.last_step:
        identity = flags.identity(dataclasses.asdict(config))
        saved = checkpoint.save(accelerator, folder, step, identity, run.parts)
        if stop or step == config.last_step:
            reason = "SIGTERM" if stop else "--max_steps"
            accelerator.print(f"stopped by {reason} after step {step}; continue with {checkpoint.FLAG} {saved}")
    if stop:
        accelerator.end_training()
        sys.exit(128 + signal.SIGTERM)


def _conclude(run: Run, folder: Path) -> None:
    """Draw the figure and print the table from the log alone, and close the tracker."""
    values, log, figures = dataclasses.asdict(run.config), run_folder.read(folder), []
    if run.config.figure:
        name, figures = plots.label(values), [folder / "figure.png"]
        plots.draw({name: log}, f"{plots.task(values)}, regularizer: {name}", figures[0])
        plots.print_table(log)
    print("\n".join([f"log:    {run_folder.log_of(folder)}", *(f"figure: {figure}" for figure in figures)]))
    if run.config.with_tracking:
        tracking.finish(run.accelerator, log, figures)


def _refuse_too_large(parameters: float, device: torch.device) -> None:
    cuda = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total
    needed = 3 * 4 * parameters  # float32 weights, gradients, and momentum
    if needed > room:
        raise ValueError(
            f"--hidden, --depth: expected a network that fits into the {room / 2**30:.3g} GiB of memory, got one of "
            f"{parameters:.3g} parameters, which needs {needed / 2**30:.3g} GiB during training."
        )


@contextmanager
def _diverging(folder: Path, step: int) -> Iterator[None]:
    """Report the step at which a loss or a metric rejects the network."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        if messages.is_told(error):
            raise
        raise DivergedError(
            f"training ended at step {step}: {' '.join(str(error).split())} If it diverged, lower --lr or --weight. "
            f"The log up to that step is kept: {run_folder.log_of(folder)}"
        ) from error


def _augmented(x: Tensor, seed: int, step: int, process: int) -> Tensor:
    # A separate generator, so that a resumed run draws the same crops. Torch requires a seed below 2⁶³, and no two
    # steps of a run share one: 10⁴ times their difference is no multiple of 2⁶³.
    generator = torch.Generator().manual_seed(((seed * 10**9 + step) * 10**4 + process) % 2**63)
    return examples.crop_and_flip(x, generator)
