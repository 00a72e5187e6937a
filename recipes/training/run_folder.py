"""A run's folder: claimed by one run, written by one process; it holds the flags and the log."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import alignreg
from data.examples import Data
from training import lock, processes, storage


def claim(wanted: str | None, default_name: str) -> Path:
    """Create and return the folder of one run, with an empty log in it; by default a new one under ``runs/``.

    Raises:
        ValueError: if the folder is not empty, or cannot be written.
    """
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
    folder = Path(wanted) if wanted else Path("runs") / f"{default_name}-{stamp}"
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
        try:
            if not taken:
                log_of(folder).open("x").close()
        except FileExistsError:  # another run claimed it at the same time
            taken = True
    if taken:
        raise ValueError(
            f"--output_dir: expected a new or empty folder, but {folder} holds another run. "
            "Choose another folder, or omit the flag to get a new folder under runs/."
        )
    return folder


@contextmanager
def only_writer(accelerator: Accelerator, folder: Path, flag: str) -> Iterator[None]:
    """Hold a run's lock on the main process, on behalf of all processes.

    Raises:
        ValueError: on every process, if another run holds it.
    """
    with ExitStack() as held:
        processes.on_main(accelerator, lambda: held.enter_context(lock.hold(folder, flag)))
        yield


@contextmanager
def unclaimed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a claimed folder if its run fails to start, so that the same command works again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_done(folder: Path, steps: int, stop_loss: float) -> None:
    """Refuse to restart a run that has finished.

    Raises:
        ValueError: if the log has its last line.
    """
    values = [json.loads(line) for line in _lines(folder) if _step(line) is not None]
    if any(line["step"] == steps or (line.get("train/loss") or stop_loss) < stop_loss for line in values):
        raise ValueError(
            f"--resume_from_checkpoint: expected an unfinished run, but {log_of(folder)} is complete. "
            "Choose another --output_dir."
        )


def save_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the flags, the command, and the versions that made the run."""
    values = {
        "config": config,
        "command": sys.argv,
        "made": datetime.now(timezone.utc).isoformat(),
        "git": _git(),
        "versions": versions(),
    }
    storage.write(folder / "config.json", json.dumps(values, indent=1) + "\n")


def made(folder: Path) -> dict[str, Any]:
    """Return what :func:`save_config` wrote; ``made``, the time, identifies the run."""
    return dict(json.loads(storage.read(folder / "config.json")))


def save_examples(folder: Path, data: Data) -> None:
    """Write the run's training examples, their labels, which ones are difficult, and the examples held out."""
    saved = {"rows": data.rows, "labels": data.train_y, "difficult": data.difficult}
    if len(data.val_rows):
        saved |= {"val_rows": data.val_rows, "val_labels": data.val_y}
    path = folder / "examples.safetensors"
    with storage.writing(path):
        save_file(saved, path)


def versions() -> dict[str, str]:
    """Return the versions of the software that affects the results."""
    return {"alignreg": alignreg.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _git() -> str | None:
    here = Path(__file__).parent
    said = []
    for command in ("rev-parse HEAD", "status --porcelain"):
        try:
            result = subprocess.run(["git", *command.split()], cwd=here, capture_output=True, text=True, check=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout
        said.append(result.stdout.strip())
    return said[0] + ("-dirty" if said[1] else "")


def log_of(folder: Path) -> Path:
    """Return the path of a run's log."""
    return folder / "metrics.jsonl"


def append(folder: Path, values: dict[str, float]) -> None:
    """Add one line to the log; numbers that JSON cannot express become null.

    Raises:
        ValueError: if the log cannot be written.
    """
    line = {key: value if math.isfinite(value) else None for key, value in values.items()}
    log = log_of(folder)
    with storage.writing(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """Read the log; null becomes NaN."""
    lines = storage.read(log_of(folder)).splitlines()
    return [{key: math.nan if v is None else v for key, v in json.loads(line).items()} for line in lines]


def cut(accelerator: Accelerator, folder: Path, steps: list[int]) -> None:
    """Cut the log back to the given steps, those before the checkpoint of a resumed run.

    Raises:
        ValueError: on every process, if the log lacks one of them; the log is then left unchanged.
    """

    def cut_back() -> None:
        kept = {step: line for line in _lines(folder) if (step := _step(line)) in steps}
        lost = sorted(set(steps) - kept.keys())
        if lost:
            raise ValueError(
                f"--resume_from_checkpoint: expected a log with all earlier steps, but {log_of(folder)} lacks {lost}."
            )
        storage.write(log_of(folder), "".join(f"{kept[step]}\n" for step in sorted(steps)))

    processes.on_main(accelerator, cut_back)


def _lines(folder: Path) -> list[str]:
    log = log_of(folder)
    return storage.read(log).splitlines() if log.exists() else []


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a process that was killed while writing it
