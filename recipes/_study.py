"""Several runs of train.py as one study: over settings and seeds, in parallel, and what their logs show together."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import _run
import matplotlib as mpl
from rich.progress import track

mpl.use("Agg")

Log = list[dict[str, float]]
Runs = dict[str, list[Path]]
"""Folders of the runs of each setting, one a seed."""
TRAIN = Path(__file__).parent / "train.py"


class Study(ABC):
    """What is varied, and what is made of it."""

    name: str
    always: str
    """Flags of train.py for all runs."""
    bundled: str
    """Further ones where the user gives no --config: data and network that take minutes."""
    settings: ClassVar[dict[str, str]]
    """Further ones by label."""
    configured: ClassVar[dict[str, str] | None] = None
    """Those with the user's --config, where they are others."""

    def flags_by_label(self, *, configured: bool) -> dict[str, str]:
        """Return the flags of each setting, in order, with or without a configuration of the user's."""
        settings = self.configured if configured and self.configured is not None else self.settings
        common = self.always if configured else f"{self.always} {self.bundled}"
        return {label: f"{common} {flags}".strip() for label, flags in settings.items()}

    @abstractmethod
    def draw(self, runs: Runs, figure: Path) -> None:
        """Draw the figure from the logs alone."""

    @abstractmethod
    def findings(self, runs: Runs) -> list[str]:
        """Return what the numbers of the logs say, a sentence each."""


def main(study: Study, doc: str | None) -> None:
    """Run a study from the command line: the runs that are not there yet, then figure and findings."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags go to train.py, for every run",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: 2)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output_dir", type=Path, help="the study's folder; a new one under runs/ by default")
    place.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a study where it was left")
    arguments, further = parser.parse_known_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds, --jobs: expected at least 1 of each.")
    if "--seed" in further:
        parser.error("--seed: the seeds of a study are 0, 1, ...; choose how many with --seeds.")
    started = time.monotonic()
    settings = study.flags_by_label(configured="--config" in further)
    plan = {"study": study.name, "settings": settings, "further": further}
    try:
        folder, seeds = _open(plan, arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    runs = {label: [folder / _slug(label) / f"seed-{seed}" for seed in range(seeds)] for label in settings}
    jobs = [
        (run, [*shlex.split(settings[label]), *further, "--seed", str(seed)])
        for label, of_label in runs.items()
        for seed, run in enumerate(of_label)
    ]
    missing = [job for job in jobs if not (job[0] / "figure.png").exists()]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    print(f"{len(missing)} of {len(jobs)} runs to do, {arguments.jobs} at a time", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for failure in track(pool.map(lambda job: _train(*job, threads), missing), "runs", len(missing)):
            if failure:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{failure}\ngo on with --resume {folder}")
    figure = folder / "figure.png"
    study.draw(runs, figure)
    findings = study.findings(runs)
    (folder / "findings.txt").write_text("\n".join(findings) + "\n")
    print("\n".join(findings))
    print(f"figure: {figure}\n{(time.monotonic() - started) / 60:.1f} minutes")


def _open(plan: dict[str, Any], arguments: argparse.Namespace) -> tuple[Path, int]:
    if arguments.resume is not None:
        file = arguments.resume / "study.json"
        if not file.is_file():
            raise ValueError(f"--resume: expected the folder of a study, but there is no {file}.")
        known = json.loads(file.read_text())
        seeds = known.pop("seeds")
        if known != plan:
            odd = ", ".join(key for key in plan if known.get(key) != plan[key])
            raise ValueError(f"--resume: expected a study like this one, but {file} has other {odd}.")
        return arguments.resume, seeds
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = arguments.output_dir or Path("runs") / f"{plan['study']}-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--output_dir: expected a new or empty folder, but {folder} holds something. Try --resume.")
    (folder / "study.json").write_text(json.dumps({**plan, "seeds": arguments.seeds}, indent=1) + "\n")
    return folder, arguments.seeds


def _train(folder: Path, flags: list[str], threads: int) -> str | None:
    """Run train.py, from the newest checkpoint if there is one; return what it said if it failed."""
    if (folder / "checkpoints").is_dir():
        command = ["--resume_from_checkpoint", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # begun by this study, and not far
        command = [*flags, "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(  # noqa: S603 - our own recipe
        [sys.executable, str(TRAIN), *command], capture_output=True, text=True, check=False, env=environment
    )
    return None if result.returncode == 0 else f"{folder}: train.py failed\n{result.stderr[-2000:]}"


def _slug(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label).strip("-")


def logs(folders: list[Path]) -> list[Log]:
    """Return the logs of runs."""
    return [_run.read(folder) for folder in folders]


def band(axis: Any, of_seeds: list[Log], key: str, *, color: str, label: str | None = None, style: str = "-") -> None:
    """Draw the mean over seeds, and a standard deviation around it, at the steps that all of them logged."""
    steps = sorted(set.intersection(*({int(line["step"]) for line in log} for log in of_seeds)))
    values = [[line[key] for line in log if line["step"] in steps] for log in of_seeds]
    means = [statistics.mean(column) for column in zip(*values, strict=True)]
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*values, strict=True)]
    x = [step + 1 for step in steps]
    axis.plot(x, means, style, color=color, label=label)
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def finish(axis: Any, title: str, *, bottom: float | None = 0, legend: bool = True) -> None:
    """Label an axis of optimizer steps."""
    axis.set_xscale("log")
    if bottom is not None:
        axis.set_ylim(bottom=bottom)
    axis.set_xlabel("optimizer steps + 1")
    axis.set_title(title, fontsize=10)
    if legend:
        axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def over_seeds(values: list[float]) -> str:
    """Return mean and standard deviation in words, of what is defined."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "undefined"
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"
