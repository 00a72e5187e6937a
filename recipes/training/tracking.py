"""Tracking with wandb: its files in the run's folder, steps as the axis, best values in the summary, and figures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from training import processes, run_folder
from training.plots import Log

BEST = {"accuracy": "max", "alignment": "max", "loss": "min"}
"""Quantities whose best value the summary holds as well, by the last part of their key."""


def start(accelerator: Accelerator, values: dict[str, Any], folder: Path) -> None:
    """Open the tracked run; a resumed run keeps its identity.

    Raises:
        ValueError: on every process, if wandb does not open the run, for example without a login.
    """
    identity = hashlib.blake2b(run_folder.made(folder)["made"].encode(), digest_size=8).hexdigest()
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
            f"--with_tracking: expected wandb to open a run, but {reason} Without a login, set WANDB_MODE=offline."
        ) from None


def finish(accelerator: Accelerator, log: Log, figures: list[Path]) -> None:
    """Add the figures and the best values of the log, on the main process."""
    import wandb  # noqa: PLC0415 - optional

    run = accelerator.get_tracker("wandb", unwrap=True)
    run.log({figure.stem: wandb.Image(str(figure)) for figure in figures})
    for key in log[-1]:
        if better := BEST.get(key.rpartition("/")[2]):
            values = [line[key] for line in log]
            run.summary[f"{key}_best"] = max(values) if better == "max" else min(values)
