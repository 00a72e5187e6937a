"""What recipes share around training: the launch guard, the run folder, the log and the closing table."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list
from rich import box
from rich.console import Console
from rich.table import Table

import alignreg


def refuse_split_launch(num_processes: int) -> None:
    """Stop where a launcher started several processes that Accelerate does not know of.

    Raises:
        RuntimeError: if ``WORLD_SIZE`` and Accelerate disagree: every process would train alone, and all of them
            would write the same files.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and num_processes == 1:
        raise RuntimeError(
            f"expected the launcher's {world} processes to train together, but Accelerate sees one. "
            "On CPUs pass --cpu to the recipe: torchrun --nproc_per_node 2 recipes/train.py --cpu"
        )


def claim_folder(accelerator: Accelerator, wanted: str | None, default_name: str) -> Path:
    """Make the run's own folder, decided on the main process alone.

    Raises:
        ValueError: on every process, if the folder holds something already or cannot be written.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        folder = Path(wanted) if wanted else Path("runs") / f"{default_name}-{stamp}"
        answer = [str(folder), _claim(folder)]
    broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return Path(answer[0])


def _claim(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            return (
                f"--output_dir: expected a new or empty folder, but {folder} holds another run. "
                "Choose another one, or leave the flag out for a new folder under runs/."
            )
        (folder / "metrics.jsonl").touch()
    except OSError as error:
        return f"--output_dir: expected a folder that can be written, but {folder}: {error.strerror}."
    return None


def batches(loader: Any, step: int, last: int) -> Iterator[tuple[int, Any]]:
    """Yield steps and their batches from the one after ``step`` to the ``last``, whatever epochs they belong to."""
    while step < last:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done) if done else loader:
            step += 1
            yield step, batch
            if step == last:
                return


def task(config: dict[str, Any]) -> str:
    """Say what a run was trained on."""
    return f"{config['dataset']}, {config['model']}, label noise {config['label_noise']:g}"


def label(config: dict[str, Any]) -> str:
    """Name a run by what regularised it."""
    return "none" if config["regularizer"] == "none" else f"{config['regularizer']} {config['weight']:g}"


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the flags and the versions that made the run."""
    versions = {"alignreg": alignreg.__version__, "torch": torch.__version__, "python": platform.python_version()}
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": versions}, indent=1) + "\n")


def append(folder: Path, values: dict[str, float]) -> None:
    """Add one line to the log. Numbers that json has no word for become null."""
    line = {key: value if math.isfinite(value) else None for key, value in values.items()}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """Read the log; null comes back as NaN."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: math.nan if v is None else v for key, v in json.loads(line).items()} for line in lines]


def cut(accelerator: Accelerator, folder: Path, steps: list[int]) -> None:
    """Cut the log back to the given steps, which a run that goes on has behind it.

    Raises:
        ValueError: on every process, if the log lacks one of them; it is then left as it is.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        log = folder / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        kept = {step: line for line in lines if (step := _step(line)) in steps}
        if sorted(kept) != sorted(steps):
            lost = sorted(set(steps) - kept.keys())
            answer = [f"--resume_from_checkpoint: expected a log with the steps before it, but {log}: lacks {lost}."]
        else:
            new = log.with_suffix(".new")
            new.write_text("".join(f"{kept[step]}\n" for step in sorted(steps)))
            new.replace(log)
    broadcast_object_list(answer)
    if answer[0]:
        raise ValueError(answer[0])


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a process that was killed while it wrote


def print_table(folder: Path, rows: int = 8) -> None:
    """Print some rows of the log, the first and last among them."""
    log = read(folder)
    chosen = sorted({round(i * (len(log) - 1) / max(1, rows - 1)) for i in range(rows)})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("step", "train\nloss", "train\naccuracy", "test\naccuracy", "alignment\non train ± s.e.")
    columns += ("alignment\non test ± s.e.", "effective\nrank", "participation\nratio", "path\ncomplexity")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in (log[i] for i in chosen):
        table.add_row(
            str(line["step"]),
            f"{line['train/loss']:.3f}",
            f"{line['train/accuracy']:.3f}",
            f"{line['test/accuracy']:.3f}",
            f"{line['train/alignment']:.3f} ± {line['train/alignment_std_error']:.3f}",
            f"{line['test/alignment']:.3f} ± {line['test/alignment_std_error']:.3f}",
            f"{line['train/effective_rank']:.1f}",
            f"{line['train/participation_ratio']:.1f}",
            f"{line['train/path_complexity']:.0f}",
        )
    Console(width=max(118, Console().width)).print(table)
