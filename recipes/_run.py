"""What recipes share around training: the launch guard, the run folder and the log."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

import alignreg


def refuse_split_launch(num_processes: int) -> None:
    """Stop where a launcher was asked for several processes that do not train together.

    Raises:
        RuntimeError: if ``WORLD_SIZE`` and Accelerate disagree: every process would train alone, and all of them
            would write the same files; or if ``accelerate launch`` was asked for several processes and started one.
    """
    if num_processes > 1:
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise RuntimeError(
            f"expected the launcher's {world} processes to train together, but Accelerate sees one. "
            "On CPUs pass --cpu to the recipe: torchrun --nproc_per_node 2 recipes/train.py --cpu"
        )
    # What `accelerate launch` sets for the one process that it starts on CPUs in place of several.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RuntimeError(
            "expected the several processes that accelerate launch was asked for, but on CPUs it starts only one "
            "process. Use torchrun --nproc_per_node 2 RECIPE --cpu, or "
            "accelerate launch --multi_gpu --num_processes 2 RECIPE --cpu. (For one process: --num_processes 1, and "
            "no MASTER_ADDR in the environment.)"
        )


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the running statistics of the main one, as DDP does before its forward passes."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            broadcast(buffer)


def claim_folder(accelerator: Accelerator, wanted: str | None, default_name: str) -> Path:
    """Make the run's own folder, decided on the main process alone.

    Raises:
        ValueError: on every process, if the folder holds something already or cannot be written.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        folder = Path(wanted) if wanted else Path("runs") / f"{default_name}-{stamp}"
        answer = [str(folder), claim(folder)]
    broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return Path(answer[0])


def claim(folder: Path) -> str | None:
    """Make a folder for one run with an empty log in it, or return why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            return (
                f"--output_dir: expected a new or empty folder, but {folder} holds another run. "
                "Choose another one, or leave the flag out for a new folder under runs/."
            )
        log_of(folder).touch()
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


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the flags, the command, and the versions that made the run."""
    made = {
        "config": config,
        "command": sys.argv,
        "made": datetime.now(timezone.utc).isoformat(),
        "git": _git(),
        "versions": versions(),
    }
    (folder / "config.json").write_text(json.dumps(made, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return what makes the numbers."""
    return {"alignreg": alignreg.__version__, "torch": torch.__version__, "python": platform.python_version()}


def config_of(folder: Path) -> dict[str, Any]:
    """Return the flags that made a run."""
    return dict(json.loads((folder / "config.json").read_text())["config"])


def made(folder: Path) -> str:
    """Return when the run was made: what tells it from every other."""
    return str(json.loads((folder / "config.json").read_text())["made"])


def _git() -> str | None:
    here = Path(__file__).parent
    found = []
    for command in ("rev-parse HEAD", "status --porcelain"):
        try:
            result = subprocess.run(["git", *command.split()], cwd=here, capture_output=True, text=True, check=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError):
            return None  # not from a checkout
        found.append(result.stdout.strip())
    return found[0] + ("-dirty" if found[1] else "")


def log_of(folder: Path) -> Path:
    """Return the path of a run's log."""
    return folder / "metrics.jsonl"


def append(folder: Path, values: dict[str, float]) -> None:
    """Add one line to the log. Numbers that json has no word for become null."""
    line = {key: value if math.isfinite(value) else None for key, value in values.items()}
    with log_of(folder).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """Read the log; null comes back as NaN."""
    lines = log_of(folder).read_text().splitlines()
    return [{key: math.nan if v is None else v for key, v in json.loads(line).items()} for line in lines]


def cut(accelerator: Accelerator, folder: Path, steps: list[int]) -> None:
    """Cut the log back to the given steps, which a run that goes on has behind it.

    Raises:
        ValueError: on every process, if the log lacks one of them; it is then left as it is.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        log = log_of(folder)
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
