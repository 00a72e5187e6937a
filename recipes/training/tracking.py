"""Runs in wandb: files inside the run's folder, steps as axis, best values as summary, figures as images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from training import processes, run_folder

BEST = {"accuracy": "max", "alignment": "max", "loss": "min"}
"""Of which quantities the summary holds the best value too, by the last part of their key."""


def start(accelerator: Accelerator, values: dict[str, Any], folder: Path) -> None:
    """Open the run; one that goes on from a checkpoint keeps its identity.

    Raises:
        ValueError: on every process, if wandb does not open it: without a login, for one.
    """
    identity = hashlib.blake2b(run_folder.made(folder).encode(), digest_size=8).hexdigest()
    options = {"dir": str(folder), "name": folder.name, "id": identity, "resume": "allow"}
    processes.everywhere(accelerator, lambda: _open(accelerator, values, options))
    if accelerator.is_main_process:
        run = accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")


def _open(accelerator: Accelerator, values: dict[str, Any], options: dict[str, str]) -> None:
    import wandb  # noqa: PLC0415 - optional

    try:
        accelerator.init_trackers("alignreg", values, {"wandb": options})
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--with_tracking: expected a run of wandb, but {reason} Without a login, set WANDB_MODE=offline."
        ) from None


def finish(accelerator: Accelerator, folder: Path, figures: list[Path]) -> None:
    """Add the figures, and the best values of the log; on the main process."""
    import wandb  # noqa: PLC0415 - optional

    run = accelerator.get_tracker("wandb", unwrap=True)
    run.log({figure.stem: wandb.Image(str(figure)) for figure in figures})
    log = run_folder.read(folder)
    for key in log[-1]:
        if better := BEST.get(key.rpartition("/")[2]):
            values = [line[key] for line in log]
            run.summary[f"{key}_best"] = max(values) if better == "max" else min(values)
