"""Checkpoints that are complete or absent, verified in full before anything is read from them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load as load_plain
from safetensors import SafetensorError
from torch import nn

from training import messages, processes, storage

FLAG = "--resume_from_checkpoint"
LATEST = "latest"
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
ENTRIES = {"step": int, "processes": int, "config": dict, "files": dict, "digest": str}


def save(accelerator: Accelerator, run: Path, step: int, config: dict[str, Any], parts: dict[str, nn.Module]) -> Path:
    """Write model, optimizer, random states, and the parts of every process; the folder appears once it is complete.

    Raises:
        ValueError: on every process, if one of them cannot write; nothing of the checkpoint remains.
    """
    folder = run / FOLDER / f"step_{step}"
    partial = run / FOLDER / f".step_{step}.partial"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        with storage.writing(partial):
            partial.mkdir(parents=True)

    def write() -> None:
        try:
            accelerator.save_state(str(partial))
            torch.save(
                {name: part.state_dict() for name, part in parts.items()}, partial / _parts(accelerator.process_index)
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _unwritten(partial, error) from None

    def complete() -> None:
        manifest: dict[str, Any] = {
            "step": step,
            "processes": accelerator.num_processes,
            "config": config,
            "files": {file.name: _digest(file.read_bytes()) for file in sorted(partial.iterdir())},
        }
        manifest["digest"] = _digest(_text(manifest).encode())
        storage.write(partial / MANIFEST, _text(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        with storage.writing(folder):
            partial.rename(folder)

    try:
        processes.on_main(accelerator, begin)
        processes.everywhere(accelerator, write)
        processes.on_main(accelerator, complete)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run."""
    steps = {int(p.name[5:]): p for p in (run / FOLDER).glob("step_*") if p.name[5:].isdecimal()}
    return steps[max(steps)] if steps else None


def find(path: str) -> Path:
    """Return the checkpoint that ``path`` names: the folder itself, or the newest checkpoint of a run's folder.

    Raises:
        ValueError: if there is no checkpoint.
    """
    given = Path(path)
    if not given.is_dir():
        raise ValueError(f"{FLAG}: expected the folder of a checkpoint, but {given}: No such folder.")
    if checkpoint := newest(given):
        return checkpoint
    if not (given / MANIFEST).is_file():
        reason = f"it holds no {MANIFEST} and no {FOLDER}/step_N. Runs write them with --checkpointing_steps"
        raise _refusal(given, reason)
    return given


def latest(run: str | None) -> Path | None:
    """Return the place that a restarted command continues from.

    Returns:
        The newest checkpoint of the run; the run's folder if it stopped before its first checkpoint; None if it never
        started.

    Raises:
        ValueError: if there is no folder to look into.
    """
    if run is None:
        raise ValueError(f"{FLAG} {LATEST}: expected --output_dir with it, the folder whose newest checkpoint to use.")
    folder = Path(run).resolve()
    return newest(folder) or (folder if (folder / "config.json").is_file() else None)


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote the checkpoint; a run's folder is its own."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint


def verify(checkpoint: Path, config: dict[str, Any], processes: int) -> int:
    """Return the checkpoint's step, if this run wrote it and no byte of it has changed.

    Raises:
        ValueError: with path and reason, before any state changes.
    """
    manifest = _manifest(checkpoint)
    step, files, theirs, count = (manifest[key] for key in ("step", "files", "config", "processes"))
    if not 1 <= step <= config["steps"] or checkpoint.resolve().name != f"step_{step}":
        raise _refusal(checkpoint, f"{MANIFEST} is for step {messages.short(step)}")
    if theirs != config:
        odd = sorted(key for key in theirs | config if theirs.get(key) != config.get(key))
        raise _refusal(checkpoint, f"it belongs to another run, which differs in {', '.join(odd)}")
    if count != processes:
        raise _refusal(checkpoint, f"{count} process(es) wrote it and {processes} would read it; launch {count}")
    wanted = {"optimizer.bin"}.union(*({_random_states(i), _parts(i)} for i in range(processes)))
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in files):
        wanted.add("model.safetensors")
    if missing := sorted(wanted - files.keys()):
        raise _refusal(checkpoint, f"{MANIFEST} does not list {', '.join(missing)}")
    for name, digest in files.items():
        file = checkpoint / Path(name).name
        if not file.is_file():
            raise _refusal(checkpoint, f"{name} is missing")
        if _digest(file.read_bytes()) != digest:
            raise _refusal(checkpoint, f"{name} is truncated or was changed")
    foreign = {file.name for file in checkpoint.iterdir() if not file.name.startswith(".")} - files.keys() - {MANIFEST}
    if foreign:
        raise _refusal(checkpoint, f"{', '.join(sorted(foreign))} does not belong to it. Remove that file")
    return step  # type: ignore[no-any-return]


def load(accelerator: Accelerator, checkpoint: Path, parts: dict[str, nn.Module]) -> None:
    """Load a verified checkpoint into model, optimizer, random states and parts, without unpickling code.

    Raises:
        ValueError: on every process, if the random states of one cannot be read: Accelerate would continue without
            them.
    """
    name = _random_states(accelerator.process_index)
    states: dict[str, Any] = {}

    def read() -> None:
        try:
            states.update(load_plain(checkpoint / name))
            states["torch_manual_seed"], states["random_state"]
        except Exception as error:  # noqa: BLE001 - each kind of damage raises its own class
            raise _refusal(checkpoint, f"{name} cannot be read: {messages.short(str(error))}") from None

    def compare() -> None:
        same = torch.equal(torch.get_rng_state(), states["torch_manual_seed"])
        if not (same and random.getstate() == states["random_state"]):
            raise _refusal(checkpoint, f"the random states of {name} do not fit this machine and its versions")

    processes.everywhere(accelerator, read)
    accelerator.load_state(str(checkpoint))
    processes.everywhere(accelerator, compare)
    own = torch.load(checkpoint / _parts(accelerator.process_index), map_location="cpu", weights_only=True)
    for part_name, part in parts.items():
        part.load_state_dict(own[part_name])
        part.to(accelerator.device)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(storage.read(checkpoint / MANIFEST))
    except OSError as error:
        raise _refusal(checkpoint, f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, RecursionError):
        manifest = None
    kinds = {key: type(value) for key, value in manifest.items()} if isinstance(manifest, dict) else None
    if kinds != ENTRIES:
        raise _refusal(checkpoint, f"{MANIFEST} is truncated, or not the manifest of a checkpoint")
    digest = manifest.pop("digest")
    if _digest(_text(manifest).encode()) != digest:
        raise _refusal(checkpoint, f"{MANIFEST} was changed")
    return manifest


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _random_states(process: int) -> str:
    return f"random_states_{process}.pkl"


def _parts(process: int) -> str:
    return f"process_{process}.pt"


def _unwritten(partial: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None)
    if reason is None:
        try:  # torch says where in the file it stopped, but not why; on a full disk this write fails too
            (partial / ".room").write_bytes(bytes(2**20))
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        except OSError as why:
            reason = why.strerror
    run = partial.parent.parent
    hint = f"continue with {FLAG} {run}" if newest(run) else "start again"
    return ValueError(
        f"--output_dir: expected a writable folder, but {partial}: {reason}. Free space there, and {hint}."
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _refusal(checkpoint: Path, reason: str) -> ValueError:
    return ValueError(f"{FLAG}: expected a complete checkpoint of this run, but {checkpoint}: {reason}.")
