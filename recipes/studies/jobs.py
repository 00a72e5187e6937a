"""Many runs of train.py, several at a time, and only those that are not done."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, final

import torch
from rich.progress import track

from training import checkpoint, lock, loop, messages, storage
from training.config import Config

Job = tuple[Path, Config]
"""The folder of a run, and its flags."""
DONE, BROKEN_OFF = "done", "broken_off"
"""Files that mark runs which came to their end, and to which one: the second says why."""


@final
class Workers:
    """Processes that run one job after the other, each with its share of the processors.

    Args:
        at_once: how many.
        study: the folder that all runs are in.
    """

    def __init__(self, at_once: int, study: Path) -> None:
        self._at_once, self._study = at_once, study
        # A process that torch already computes in is not to be forked.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(at_once, context, torch.set_num_threads, (threads(at_once),))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], what: str = "runs", *, may_break_off: bool = False) -> None:
        """Run what is not done; on a signal stop the runs, which write a checkpoint first, and say how to go on.

        One that fails stops all; if runs ``may_break_off``, one that has diverged, so that values are no longer what a
        loss or metric takes, ends there.
        """
        missing = [job for job in jobs if not done(job[0])]
        print(f"{len(missing)} of {len(jobs)} {what} to do, {self._at_once} at a time", flush=True)
        failure = None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        futures: list[Future[str | None]] = []
        try:
            futures += [self._pool.submit(_train, *job, may_break_off) for job in missing]
            for future in track(as_completed(futures), what, len(futures)) if futures else ():
                failure = _said(future)
                if failure:
                    break
        except KeyboardInterrupt:
            failure = "stopped"
        if failure:
            for waiting in futures:
                waiting.cancel()
            for child in multiprocessing.active_children():
                child.terminate()
            self._pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
        if failure:
            sys.exit(f"{failure}\ngo on with --resume {self._study}")


def threads(at_once: int) -> int:
    """Return the share of the processors that each of so many processes has."""
    return max(1, (os.cpu_count() or 1) // at_once)


def add_flags(parser: argparse.ArgumentParser, name: str) -> Any:
    """Add the flags of whatever runs many: how many at a time, and where; return the group of the latter."""
    at_once = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=at_once, help="runs at a time (default: 2)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output_dir", type=Path, help=f"the {name}'s folder; a new one under runs/ by default")
    place.add_argument("--resume", type=Path, metavar="FOLDER", help=f"go on with a {name} where it was left")
    return place


@contextlib.contextmanager
def opened(resume: Path | None, wanted: Path | None, name: str) -> Iterator[Path]:
    """Hold the folder of a study while it runs: of one that goes on, the one that is wanted, or a new one under runs/.

    Raises:
        ValueError: if it is a new one and holds something, or another study holds it.
    """
    folder = resume or wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(folder.iterdir()):
            raise ValueError(
                f"--output_dir: expected a new or empty folder, but {folder} holds something. Try --resume."
            )
    with lock.hold(folder, "--resume" if resume else "--output_dir"):
        yield folder


def done(folder: Path) -> bool:
    """Say whether a run came to its end."""
    return (folder / DONE).exists()


def broken_off(folder: Path) -> bool:
    """Say whether a run's end was one before its time."""
    return (folder / BROKEN_OFF).exists()


def slug(label: str) -> str:
    """Return a name of a folder."""
    return "".join(character if character.isalnum() or character in ".+" else "-" for character in label).strip("-")


def _said(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenExecutor:
        return "a process of the study ended before its run"


def _clear(folder: Path) -> None:
    """Remove a run that this study has begun, and that did not come far; not one that a process still writes to."""
    if folder.exists():
        with lock.hold(folder, "--resume"):
            shutil.rmtree(folder, ignore_errors=True)


def _train(folder: Path, config: Config, may_break_off: bool = False) -> str | None:
    """Train in this process, from the newest checkpoint if there is one; return what it said if it failed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            newest = checkpoint.newest(folder)
            if newest is None:
                _clear(folder)
            loop.train(dataclasses.replace(config, output_dir=str(folder)), newest)
        (folder / DONE).touch()
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            os._exit(stop.code)  # nothing of the queue is to begin
        return f"{folder}: train.py failed\n{said.getvalue()[-2000:]}"
    except Exception as error:  # noqa: BLE001 - the study says it
        if may_break_off and isinstance(error, loop.DivergedError):
            storage.write(folder / BROKEN_OFF, f"{error}\n")
            (folder / DONE).touch()
            return None
        told = str(error) if messages.is_told(error) else traceback.format_exc()[-2000:]
        return f"{folder}: train.py failed\n{told}"
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own handler waits for its next step
    return None
