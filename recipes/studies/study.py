"""Several runs of train.py as one study: over settings and seeds, in parallel, and what their logs show together."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, final

from studies.jobs import Workers, add_flags, opened, slug
from training import flags, messages, plots, run_folder, storage
from training.config import Config
from training.plots import Log

Runs = dict[str, list[Path]]
"""Folders of the runs of each setting, one a seed."""


Settings = dict[str, Any]
"""Fields of a run's Config."""


@final
class Study(NamedTuple):
    """What is varied, and what is made of it."""

    name: str
    always: Settings
    """For all runs."""
    bundled: Settings
    """Further ones where the user gives no --config: data and network that take minutes."""
    settings: dict[str, Settings]
    """Further ones by label."""
    draw: Callable[[Runs, Path], None]
    """Draws the figure from the logs alone."""
    findings: Callable[[Runs], list[str]]
    """Returns what the numbers of the logs say, a sentence each."""
    configured: dict[str, Settings] | None = None
    """Settings with the user's --config, where they are others."""

    def by_label(self, *, configured: bool) -> dict[str, Settings]:
        """Return all that each setting sets, in order, with or without a configuration of the user's."""
        settings = self.configured if configured and self.configured is not None else self.settings
        common = self.always if configured else {**self.always, **self.bundled}
        return {label: {**common, **own} for label, own in settings.items()}


def main(study: Study, doc: str | None) -> None:
    """Run a study from the command line: the runs that are not there yet, then figure and findings."""
    with messages.in_words():
        arguments, further = _arguments(doc)
        plots.pyplot()  # missing, it is missed before the work
        plan = _plan(study, arguments, further)
        _runs(plan)  # refuses wrong flags before there is a folder
        with opened(arguments.resume, arguments.output_dir, study.name) as folder:
            _run_and_draw(study, plan, folder, arguments.jobs)


def _arguments(doc: str | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags go to train.py, for every run",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 3, or as many as there were)")
    add_flags(parser, "study")
    arguments, further = parser.parse_known_args()
    if arguments.jobs < 1 or (arguments.seeds is not None and arguments.seeds < 1):
        parser.error("--seeds, --jobs: expected at least 1 of each.")
    if "--seed" in further:
        parser.error("--seed: the seeds of a study are 0, 1, ...; choose how many with --seeds.")
    return arguments, further


def _run_and_draw(study: Study, plan: dict[str, Any], folder: Path, at_once: int) -> None:
    started = time.monotonic()
    storage.write(folder / "study.json", json.dumps(plan, indent=1) + "\n")
    with Workers(at_once, folder) as workers:
        workers.run([(folder / run, config) for run, config in _runs(plan)])
    figure = folder / "figure.png"
    seeds = range(plan["seeds"])
    runs = {label: [folder / slug(label) / f"seed-{seed}" for seed in seeds] for label in plan["settings"]}
    study.draw(runs, figure)
    findings = study.findings(runs)
    storage.write(folder / "findings.txt", "\n".join(findings) + "\n")
    print("\n".join(findings))
    print(f"figure: {figure}\n{(time.monotonic() - started) / 60:.1f} minutes")


def _plan(study: Study, arguments: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Return the plan of a new study, or of one that goes on, with more seeds if the user wants them."""
    if arguments.resume is None:
        settings = study.by_label(configured="--config" in further)
        return {"study": study.name, "settings": settings, "further": further, "seeds": arguments.seeds or 3}
    file = arguments.resume / "study.json"
    if not file.is_file():
        raise ValueError(f"--resume: expected the folder of a study, but there is no {file}.")
    try:
        plan = dict(json.loads(storage.read(file)))
        plan["settings"] = {label: dict(own) for label, own in plan["settings"].items()}
        name, was, seeds = plan["study"], " ".join(plan["further"]) or "none", int(plan["seeds"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"--resume: expected the folder of a study, but {file} is truncated or none.") from None
    if name != study.name:
        raise ValueError(f"--resume: expected a study of {study.name}, but {file} is one of {name}.")
    if further and further != plan["further"]:
        raise ValueError(
            f"--resume: expected the further flags of the study that goes on, {was}, got {' '.join(further)}. "
            "Leave them out, or start a new study."
        )
    if arguments.seeds is not None and arguments.seeds < seeds:
        raise ValueError(f"--seeds: expected at least the {seeds} of the study, got {arguments.seeds}.")
    return {**plan, "seeds": arguments.seeds or seeds}


def _runs(plan: dict[str, Any]) -> list[tuple[str, Config]]:
    """Return the folder of each run, and its flags."""
    configs = {label: flags.parse(Config, None, plan["further"], own)[0] for label, own in plan["settings"].items()}
    return [
        (f"{slug(label)}/seed-{seed}", replace(config, seed=seed))
        for label, config in configs.items()
        for seed in range(plan["seeds"])
    ]


def logs(folders: list[Path]) -> list[Log]:
    """Return the logs of runs."""
    return [run_folder.read(folder) for folder in folders]


def columns(of_seeds: list[Log], key: str) -> dict[int, list[float]]:
    """Return the values of all seeds at the steps that all of them logged; what is undefined is left out."""
    steps = sorted(set.intersection(*({int(line["step"]) for line in log} for log in of_seeds)))
    values = [[line[key] for line in log if line["step"] in steps] for log in of_seeds]
    defined = [[value for value in column if math.isfinite(value)] for column in zip(*values, strict=True)]
    return dict(zip(steps, defined, strict=True))


def means(of_seeds: list[Log], key: str) -> list[float]:
    """Return the means over seeds, at the steps that all of them logged."""
    return [statistics.mean(column) if column else math.nan for column in columns(of_seeds, key).values()]


def band(axis: Any, of_seeds: list[Log], key: str, *, color: str, label: str | None = None, style: str = "-") -> None:
    """Draw the mean over seeds, and a standard deviation around it."""
    values = columns(of_seeds, key)
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in values.values()]
    steps = [step + 1 for step in values]
    plots.shade(axis, steps, means(of_seeds, key), spread, style, color=color, label=label)


def over_seeds(values: list[float]) -> str:
    """Return mean and standard deviation in words, of what is defined."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "undefined"
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"
