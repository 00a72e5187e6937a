"""A run's folder: claimed by one run, written to by one process, its flags and its log."""

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
from accelerate import Accelerator, skip_first_batches
from safetensors.torch import save_file

import alignreg
from data.examples import Data
from training import lock, processes, storage


def claim_folder(accelerator: Accelerator, wanted: str | None, default_name: str) -> Path:
    """Make the run's own folder, decided on the main process alone.

    Raises:
        ValueError: on every process, if the folder holds something already or cannot be written.
    """

    def claimed() -> str:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        folder = Path(wanted) if wanted else Path("runs") / f"{default_name}-{stamp}"
        claim(folder)
        return str(folder)

    return Path(processes.on_main(accelerator, claimed))


def claim(folder: Path) -> None:
    """Make a folder for one run, with an empty log in it.

    Raises:
        ValueError: if it holds something already, or cannot be written.
    """
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
        try:
            if not taken:
                log_of(folder).open("x").close()
        except FileExistsError:  # of two at once, the other
            taken = True
    if taken:
        raise ValueError(
            f"--output_dir: expected a new or empty folder, but {folder} holds another run. "
            "Choose another one, or leave the flag out for a new folder under runs/."
        )


@contextmanager
def only_writer(accelerator: Accelerator, folder: Path, flag: str) -> Iterator[None]:
    """Hold a run's lock on the main process, and with it the run for all.

    Raises:
        ValueError: on every process, if another run holds it.
    """
    with ExitStack() as held:
        processes.on_main(accelerator, lambda: held.enter_context(lock.hold(folder, flag)))
        yield


@contextmanager
def unclaimed_on_failure(folder: Path) -> Iterator[None]:
    """Remove a folder that was claimed where its run does not begin: the same command then works again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_done(folder: Path, steps: int, stop_loss: float) -> None:
    """Stop where a run would begin again that has come to its end.

    Raises:
        ValueError: if the log has its last line.
    """
    log = log_of(folder)
    lines = storage.read(log).splitlines() if log.exists() else []
    values = [json.loads(line) for line in lines if _step(line) is not None]
    if any(line["step"] == steps or (line.get("train/loss") or stop_loss) < stop_loss for line in values):
        raise ValueError(
            f"--resume_from_checkpoint: expected a run that has not come to its end, but {log} is whole. "
            "Choose another --output_dir."
        )


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
    storage.write(folder / "config.json", json.dumps(made, indent=1) + "\n")


def save_examples(folder: Path, data: Data) -> None:
    """Write which examples a run trains on, with what labels, which of them are difficult, and which are held out."""
    saved = {"rows": data.rows, "labels": data.train_y, "difficult": data.difficult}
    if len(data.val_rows):
        saved |= {"val_rows": data.val_rows, "val_labels": data.val_y}
    path = folder / "examples.safetensors"
    with storage.writing(path):
        save_file(saved, path)


def versions() -> dict[str, str]:
    """Return what makes the numbers."""
    return {"alignreg": alignreg.__version__, "torch": torch.__version__, "python": platform.python_version()}


def config_of(folder: Path) -> dict[str, Any]:
    """Return the flags that made a run."""
    return dict(json.loads(storage.read(folder / "config.json"))["config"])


def made(folder: Path) -> str:
    """Return when the run was made: what tells it from every other."""
    return str(json.loads(storage.read(folder / "config.json"))["made"])


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
    """Add one line to the log. Numbers that json has no word for become null.

    Raises:
        ValueError: if it cannot be written.
    """
    line = {key: value if math.isfinite(value) else None for key, value in values.items()}
    log = log_of(folder)
    with storage.writing(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, float]]:
    """Read the log; null comes back as NaN."""
    lines = storage.read(log_of(folder)).splitlines()
    return [{key: math.nan if v is None else v for key, v in json.loads(line).items()} for line in lines]


def cut(accelerator: Accelerator, folder: Path, steps: list[int]) -> None:
    """Cut the log back to the given steps, which a run that goes on has behind it.

    Raises:
        ValueError: on every process, if the log lacks one of them; it is then left as it is.
    """

    def cut_back() -> None:
        log = log_of(folder)
        lines = storage.read(log).splitlines() if log.exists() else []
        kept = {step: line for line in lines if (step := _step(line)) in steps}
        lost = sorted(set(steps) - kept.keys())
        if lost:
            raise ValueError(
                f"--resume_from_checkpoint: expected a log with the steps before it, but {log}: lacks {lost}."
            )
        storage.write(log, "".join(f"{kept[step]}\n" for step in sorted(steps)))

    processes.on_main(accelerator, cut_back)


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a process that was killed while it wrote
