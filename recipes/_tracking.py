"""Runs in wandb: files inside the run's folder, steps as axis, best values as summary, figures as images."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import _flags
import _run
from accelerate import Accelerator

BEST = {"accuracy": "max", "alignment": "max", "loss": "min"}
"""Of which quantities the summary holds the best value too, by the last part of their key."""


def start(accelerator: Accelerator, config: _flags.Common, folder: Path) -> None:
    """Open the run; one that goes on from a checkpoint keeps its identity."""
    if not config.with_tracking:
        return
    identity = hashlib.blake2b(_run.made(folder).encode(), digest_size=8).hexdigest()
    options = {"dir": str(folder), "name": folder.name, "id": identity, "resume": "allow"}
    accelerator.init_trackers("alignreg", dataclasses.asdict(config), {"wandb": options})
    if accelerator.is_main_process:
        run = accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")


def finish(accelerator: Accelerator, config: _flags.Common, folder: Path, figures: list[Path]) -> None:
    """Add the figures, and the best values of the log; on the main process."""
    if not config.with_tracking:
        return
    import wandb  # noqa: PLC0415 - optional

    run = accelerator.get_tracker("wandb", unwrap=True)
    run.log({figure.stem: wandb.Image(str(figure)) for figure in figures})
    log = _run.read(folder)
    for key in log[-1]:
        if better := BEST.get(key.rpartition("/")[2]):
            values = [line[key] for line in log]
            run.summary[f"{key}_best"] = max(values) if better == "max" else min(values)
