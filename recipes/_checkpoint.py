"""Checkpoints that are whole or absent, and a resume that reads nothing which it has not checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

FLAG = "--resume_from_checkpoint"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"


def save(accelerator: Accelerator, run: Path, step: int, config: dict[str, Any], parts: dict[str, nn.Module]) -> Path:
    """Write model, optimizer, random states, and the parts of every process; the folder appears when it is complete."""
    folder = run / FOLDER / f"step_{step}"
    partial = run / FOLDER / f".step_{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    torch.save({name: part.state_dict() for name, part in parts.items()}, partial / _own(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest = {
            "step": step,
            "processes": accelerator.num_processes,
            "config": config,
            "files": {file.name: _digest(file) for file in sorted(partial.iterdir())},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()
    return folder


def find(path: str) -> Path:
    """Return the checkpoint that ``path`` names: itself, or the newest one of a run's folder.

    Raises:
        ValueError: if there is none.
    """
    given = Path(path)
    if not given.is_dir():
        raise ValueError(f"{FLAG}: expected a checkpoint's folder, but {given}: No such folder.")
    steps = {int(p.name[5:]): p for p in (given / FOLDER).glob("step_*") if p.name[5:].isdigit()}
    if steps:
        return steps[max(steps)]
    if not (given / MANIFEST).is_file():
        reason = f"there is no {MANIFEST} and no {FOLDER}/step_N in it. Runs write them with --checkpointing_steps"
        raise _refusal(given, reason)
    return given


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote the checkpoint."""
    return checkpoint.resolve().parent.parent


def verify(checkpoint: Path, config: dict[str, Any], processes: int) -> int:
    """Return the checkpoint's step if every byte of it is as it was written, by this run.

    Raises:
        ValueError: with path and reason; nothing has been read into anything yet.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
        theirs, count = dict(manifest["config"]), int(manifest["processes"])
    except OSError as error:
        raise _refusal(checkpoint, f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise _refusal(checkpoint, f"{MANIFEST} is truncated or no manifest of a checkpoint") from None
    for name, digest in files.items():
        file = checkpoint / Path(name).name
        if not file.is_file():
            raise _refusal(checkpoint, f"{name} is missing")
        if _digest(file) != digest:
            raise _refusal(checkpoint, f"{name} is truncated or was changed")
    if theirs != config:
        odd = sorted(key for key in theirs | config if theirs.get(key) != config.get(key))
        raise _refusal(checkpoint, f"it belongs to another run, with other {', '.join(odd)}")
    if count != processes:
        raise _refusal(checkpoint, f"{count} process(es) wrote it and {processes} would read it; launch as many")
    return step


def load(accelerator: Accelerator, checkpoint: Path, parts: dict[str, nn.Module]) -> None:
    """Read a verified checkpoint into model, optimizer, random states and parts, without unpickling code."""
    accelerator.load_state(str(checkpoint))
    own = torch.load(checkpoint / _own(accelerator), map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(own[name])
        part.to(accelerator.device)


def _own(accelerator: Accelerator) -> str:
    return f"process_{accelerator.process_index}.pt"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _refusal(checkpoint: Path, reason: str) -> ValueError:
    return ValueError(f"{FLAG}: expected a complete checkpoint of this run, but {checkpoint}: {reason}.")
