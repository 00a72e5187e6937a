"""A study: runs of train.py over settings and seeds, in parallel, with one figure and the findings from their logs."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

from studies.jobs import Workers, add_flags, of_seeds, opened, slug
from training import flags, messages, plots, run_folder, storage
from training.config import Config
from training.plots import Log

Runs = dict[str, list[Path]]
"""The folders of the runs of each setting, one per seed."""
Settings = dict[str, Any]
"""Fields of a run's Config."""


@final
class Study(NamedTuple):
    """The settings of a study, and the functions that evaluate its runs."""

    name: str
    always: Settings
    """Settings of all runs."""
    bundled: Settings
    """Further settings if the user gives no --config: data and a network that train in minutes."""
    settings: dict[str, Settings]
    """Further settings, by label."""
    draw: Callable[[Runs], Any]
    """Draws the figure from the logs alone."""
    findings: Callable[[Runs], list[str]]
    """Returns what the logs show, one sentence each."""
    configured: dict[str, Settings] | None = None
    """Settings by label with the user's --config, if they differ."""

    def by_label(self, *, configured: bool) -> dict[str, Settings]:
        """Return all settings by label, with or without a configuration of the user's."""
        settings = self.configured if configured and self.configured is not None else self.settings
        common = self.always if configured else {**self.always, **self.bundled}
        return {label: {**common, **own} for label, own in settings.items()}


@messages.in_words()
def main(study: Study, doc: str | None) -> None:
    """Run a study from the command line: the missing runs, then the figure and the findings."""
    arguments, further = _arguments(doc)
    plots.pyplot()  # fails before the work, not after it
    plan = _plan(study, arguments, further)
    # This refuses wrong flags before there is a folder.
    configs = {label: flags.parse(Config, None, plan["further"], own)[0] for label, own in plan["settings"].items()}
    with opened(arguments.resume, arguments.output_dir, study.name) as folder:
        started = time.monotonic()
        storage.write(folder / "study.json", json.dumps(plan, indent=1) + "\n")
        jobs = {label: of_seeds(folder / slug(label), configs[label], plan["seeds"]) for label in configs}
        with Workers(arguments.jobs, folder) as workers:
            workers.run([job for of_label in jobs.values() for job in of_label])
        runs = {label: [run for run, _ in of_label] for label, of_label in jobs.items()}
        figure = folder / "figure.png"
        plots.save(study.draw(runs), figure)
        findings = study.findings(runs)
        storage.write(folder / "findings.txt", "\n".join(findings) + "\n")
        print("\n".join(findings))
        print(f"figure: {figure}\n{(time.monotonic() - started) / 60:.1f} minutes")


def _arguments(doc: str | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags are passed to train.py, for every run",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, help="runs of each setting (default: 3, or as many as before)")
    add_flags(parser, "study")
    arguments, further = parser.parse_known_args()
    if arguments.jobs < 1 or (arguments.seeds is not None and arguments.seeds < 1):
        parser.error("--seeds, --jobs: expected at least 1 of each.")
    if "--seed" in further:
        parser.error("--seed: the seeds of a study are 0, 1, ...; choose their number with --seeds.")
    return arguments, further


def _plan(study: Study, arguments: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Return the plan of a new study, or of a resumed one, possibly with more seeds."""
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
        raise ValueError(f"--resume: expected the folder of a study, but {file} is truncated or not a plan.") from None
    if name != study.name:
        raise ValueError(f"--resume: expected a study of {study.name}, but {file} is one of {name}.")
    if further and further != plan["further"]:
        raise ValueError(
            f"--resume: expected the further flags of the resumed study, {was}, got {' '.join(further)}. "
            "Omit them, or start a new study."
        )
    if arguments.seeds is not None and arguments.seeds < seeds:
        raise ValueError(f"--seeds: expected at least the {seeds} of the study, got {arguments.seeds}.")
    return {**plan, "seeds": arguments.seeds or seeds}


def logs(runs: Runs) -> dict[str, list[Log]]:
    """Return the logs of the runs of each setting."""
    return {label: [run_folder.read(folder) for folder in folders] for label, folders in runs.items()}


def columns(seeds: list[Log], key: str) -> dict[int, list[float]]:
    """Return the finite values of all seeds at each step that all of them logged."""
    steps = sorted(set.intersection(*({int(line["step"]) for line in log} for log in seeds)))
    values = [[line[key] for line in log if line["step"] in steps] for log in seeds]
    defined = [[value for value in column if math.isfinite(value)] for column in zip(*values, strict=True)]
    return dict(zip(steps, defined, strict=True))


def means(seeds: list[Log], key: str) -> list[float]:
    """Return the means over seeds at the steps that all of them logged."""
    return [statistics.mean(column) if column else math.nan for column in columns(seeds, key).values()]


def spread(values: list[float]) -> float:
    """Return the standard deviation over seeds, 0 for a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def band(axis: Any, seeds: list[Log], key: str, *, style: str = "-", **line: Any) -> None:
    """Draw the mean over seeds, with a band of one standard deviation around it."""
    values = columns(seeds, key)
    steps = [step + 1 for step in values]
    plots.shade(axis, steps, means(seeds, key), [*map(spread, values.values())], style, **line)


def over_seeds(values: list[float]) -> str:
    """Return the mean and standard deviation of the finite values as text."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "undefined"
    error = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{error}"
