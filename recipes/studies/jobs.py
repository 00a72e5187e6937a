"""Many runs of train.py, several at a time, skipping those that are done."""

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
"""Files that mark finished runs; the second marks those that diverged, and says why."""


@final
class Workers:
    """Processes that run one job after another, each with its share of the processors.

    Args:
        at_once: the number of processes.
        study: the folder that holds all runs.
    """

    def __init__(self, at_once: int, study: Path) -> None:
        self._at_once, self._study = at_once, study
        # Forking a process in which torch has computed is not safe.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(at_once, context, torch.set_num_threads, (threads(at_once),))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], what: str = "runs", *, may_break_off: bool = False) -> None:
        """Run the jobs that are not done; on a signal stop them, after a checkpoint, and say how to continue.

        A run that fails stops all others. With ``may_break_off``, a run that diverges counts as finished instead.
        """
        missing = [job for job in jobs if not done(job[0])]
        print(f"{len(missing)} of {len(jobs)} {what} to do, {self._at_once} at a time", flush=True)
        failure = None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        futures: list[Future[str | None]] = []
        try:
            futures += [self._pool.submit(_train, *job, may_break_off) for job in missing]
            for future in track(as_completed(futures), what, len(futures)) if futures else ():
                failure = future.result()
                if failure:
                    break
        except BrokenExecutor:
            failure = "a process of the study ended before its run"
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
            sys.exit(f"{failure}\ncontinue with --resume {self._study}")


def threads(at_once: int) -> int:
    """Return how many threads each of ``at_once`` processes may use."""
    return max(1, (os.cpu_count() or 1) // at_once)


def add_flags(parser: argparse.ArgumentParser, name: str) -> Any:
    """Add the flags for the number of runs at a time and for the folder; return the group of the latter."""
    at_once = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=at_once, help="runs at a time (default: 2)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output_dir", type=Path, help=f"the {name}'s folder; by default a new one under runs/")
    place.add_argument("--resume", type=Path, metavar="FOLDER", help=f"continue the {name} in this folder")
    return place


@contextlib.contextmanager
def opened(resume: Path | None, wanted: Path | None, name: str) -> Iterator[Path]:
    """Hold the lock on the folder of a study: the resumed one, the wanted one, or a new one under ``runs/``.

    Raises:
        ValueError: if a new study gets a folder that is not empty, or another study holds the lock.
    """
    folder = resume or wanted or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(folder.iterdir()):
            raise ValueError(f"--output_dir: expected a new or empty folder, but {folder} is not empty. Try --resume.")
    with lock.hold(folder, "--resume" if resume else "--output_dir"):
        yield folder


def done(folder: Path) -> bool:
    """Return whether a run is finished."""
    return (folder / DONE).exists()


def broken_off(folder: Path) -> bool:
    """Return whether a run finished early because it diverged."""
    return (folder / BROKEN_OFF).exists()


def of_seeds(place: Path, config: Config, count: int, first: int = 0) -> list[Job]:
    """Return the runs of one configuration with the seeds ``first``, ``first + 1``, ..., in a folder each."""
    return [(place / f"seed-{i}", dataclasses.replace(config, seed=first + i)) for i in range(count)]


def slug(label: str) -> str:
    """Return the name of the folder for a label."""
    return "".join(character if character.isalnum() or character in ".+" else "-" for character in label).strip("-")


def _train(folder: Path, config: Config, may_break_off: bool = False) -> str | None:
    """Train in this process, from the newest checkpoint if there is one; return the message of a failure."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            newest = checkpoint.newest(folder)
            if newest is None and folder.exists():
                with lock.hold(folder, "--resume"):  # no process still writes to it
                    shutil.rmtree(folder, ignore_errors=True)
            loop.train(dataclasses.replace(config, output_dir=str(folder)), newest)
        (folder / DONE).touch()
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            os._exit(stop.code)  # so that no further job of the queue starts
        return f"{folder}: train.py failed\n{said.getvalue()[-2000:]}"
    except Exception as error:  # noqa: BLE001 - the study reports it
        if may_break_off and isinstance(error, loop.DivergedError):
            storage.write(folder / BROKEN_OFF, f"{error}\n")
            (folder / DONE).touch()
            return None
        text = str(error) if messages.is_told(error) else traceback.format_exc()[-2000:]
        return f"{folder}: train.py failed\n{text}"
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own handler would wait for its next step
    return None
