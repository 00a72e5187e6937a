r"""Does a regularizer of tangent features help, when, and at what cost, beside those that everybody has?

The same network, data and budget without a regularizer, with weight decay, label smoothing, a penalty on the trace of
the Fisher information, and each loss of alignreg; each alone, and on top of the best weight decay. Every method is
tuned over five weights by its accuracy at the end of training on validation examples, whose labels are redrawn as
those to train on are: no clean label is used, and no test example. Then fresh seeds, for the test accuracy at the end.

    python recipes/compare.py                                 # digits: four tasks, MLP and CNN, ten seeds; over an hour
    python recipes/compare.py --short                         # one task, a few methods and seeds; half a minute
    python recipes/compare.py --tasks few100 --networks mlp --methods none,weight_decay,alignment --seeds 20
    python recipes/compare.py --variants --networks mlp       # what helps the losses of alignreg, and what does not
    python recipes/compare.py --config recipes/configs/compare/mnist-mlp.yaml --data_path FOLDER
    python recipes/compare.py --report FOLDER                 # only table, figures and findings of one that is done

The folder holds a run of train.py for each task, network, method, weight and seed, comparison.json with all that the
tables say, table.md, findings.md and figures. Stopped, it goes on with --resume FOLDER, also to more --seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # where python -m does not look

from comparison import cost, report
from comparison.methods import DECAY, KNOWN, METHODS, NETWORKS, NONE, TASKS, VARIANTS, base
from comparison.plan import Plan, Row, Weights
from studies.jobs import Job, Workers, add_flags, broken_off, opened
from training import flags, messages, plots, run_folder, storage

SHORT: dict[str, Any] = {
    "tasks": ["noise40"],
    "networks": ["mlp"],
    "methods": [NONE, DECAY, "complexity"],
    "seeds": 3,
    "tuning_seeds": 1,
    "on_top": False,
}


def main() -> None:
    """Run a comparison from the command line: the runs that are not there yet, then table, figures and findings."""
    with messages.in_words():
        arguments, further = _parser().parse_known_args()
        plots.pyplot()  # missing, it is missed before the work
        if arguments.report:
            report.report(arguments.report, arguments.into)
            return
        started = time.monotonic()
        plan = _known(arguments, further) if arguments.resume else _new(arguments, further)
        for setting in plan.settings:
            for name in plan.methods:
                plan.config(setting, Row(name))  # refuses wrong flags before there is a folder
        if not plan.costs:
            print("timing a step of each method ...", flush=True)
            plan.costs = {
                setting: cost.of({name: plan.config(setting, Row(name)) for name in plan.methods}, arguments.jobs)
                for setting in plan.settings
            }
        with opened(arguments.resume, arguments.output_dir, "compare") as folder:
            _compare(plan, folder, arguments.jobs, started)
            report.report(folder, arguments.into)


def _compare(plan: Plan, folder: Path, at_once: int, started: float) -> None:
    plan.save(folder)
    minutes = max(1, round(plan.estimated_minutes(at_once)))
    print(f"{plan.runs} runs, about {minutes} min in all with {at_once} at a time", flush=True)
    try:
        with Workers(at_once, folder) as workers:
            chosen = _choose(plan, folder, workers)
            finals = [
                job
                for setting in plan.settings
                for row in plan.rows
                for job in plan.final(folder, setting, row, chosen[setting])
            ]
            workers.run(finals, "runs of fresh seeds", may_break_off=True)
    finally:
        plan.minutes += (time.monotonic() - started) / 60
        plan.save(folder)
    text = json.dumps(_found(plan, folder, chosen), indent=1)
    # Values of seeds in one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    storage.write(folder / "comparison.json", f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags go to train.py, for every run: --config, with a --val_size, --steps, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, help="runs that count of each method (default: 10, or those there were)")
    parser.add_argument("--tuning_seeds", type=int, help="runs of each weight to choose it by (default: 2)")
    parser.add_argument("--tasks", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--networks", help=f"some of {','.join(NETWORKS)} (default: both); not with --config")
    parser.add_argument(
        "--methods",
        help=f"none and weight_decay, and some of {', '.join(KNOWN)} (default: those before the first colon)",
    )
    parser.add_argument("--variants", action="store_true", help="the losses of alignreg with other options as well")
    parser.add_argument("--on_top", action=argparse.BooleanOptionalAction, help="also on top of the best weight decay")
    parser.add_argument("--short", action="store_true", help="half a minute's look: no evidence")
    parser.add_argument("--into", type=Path, nargs="+", default=[], metavar="FILE", help="put tables between its marks")
    add_flags(parser, "comparison").add_argument(
        "--report", type=Path, metavar="PLACE", help="only show what the comparison of a folder found, or its json"
    )
    return parser


def _new(arguments: argparse.Namespace, further: list[str]) -> Plan:
    configured = "--config" in further
    if configured and arguments.networks:
        raise ValueError("--networks: expected the network of the configuration alone; leave it out.")
    if "--seed" in further:
        raise ValueError("--seed: expected --seeds and --tuning_seeds, how many of each; the seeds follow.")
    default = [NONE, DECAY, *dict.fromkeys(map(base, VARIANTS)), *VARIANTS]
    methods = _some("--methods", arguments.methods, list(KNOWN), default if arguments.variants else list(METHODS))
    plan = Plan(
        command=shlex.join(["python", "recipes/compare.py", *_what(sys.argv[1:])]),
        tasks=_some("--tasks", arguments.tasks, list(TASKS), list(TASKS)),
        networks=[] if configured else _some("--networks", arguments.networks, list(NETWORKS), list(NETWORKS)),
        methods=methods,
        grids={name: list(KNOWN[name].weights) for name in methods},
        further=further,
        versions=run_folder.versions(),
        on_top=not arguments.variants,
    )
    if arguments.short:
        grids = {name: list(KNOWN[name].weights[2:4]) for name in SHORT["methods"]}
        plan = dataclasses.replace(plan, **SHORT, grids=grids, further=["--steps", "600", *further])
    for name in ("seeds", "tuning_seeds", "on_top"):
        if getattr(arguments, name) is not None:
            setattr(plan, name, getattr(arguments, name))
    if plan.seeds < 2 or plan.tuning_seeds < 1 or arguments.jobs < 1:
        raise ValueError("--seeds: expected at least 2 (intervals need them), --tuning_seeds and --jobs at least 1.")
    if not {NONE, DECAY} <= set(plan.methods):
        raise ValueError(f"--methods: expected {NONE} and {DECAY} among them: the others are compared with these.")
    return plan


def _known(arguments: argparse.Namespace, further: list[str]) -> Plan:
    """Return the plan of a comparison that goes on, with more seeds if the user wants them."""
    plan = Plan.load(arguments.resume)
    given = ("tuning_seeds", "tasks", "networks", "methods", "on_top")
    if further or arguments.variants or arguments.short or any(getattr(arguments, name) is not None for name in given):
        raise ValueError("--resume: expected no further flags but --seeds, --jobs and --into: it has its own.")
    if arguments.seeds is not None and arguments.seeds < plan.seeds:
        raise ValueError(f"--seeds: expected at least the {plan.seeds} of the comparison, got {arguments.seeds}.")
    plan.seeds = arguments.seeds or plan.seeds
    return plan


def _some(flag: str, value: str | None, known: list[str], default: list[str]) -> list[str]:
    names = default if value is None else [name.strip() for name in value.split(",")]
    odd = [name for name in names if name not in known]
    if odd:
        raise ValueError(f"{flag}: expected some of {', '.join(known)}, got {', '.join(odd)}.")
    return list(dict.fromkeys(names))


def _what(arguments: list[str]) -> list[str]:
    """Return the flags without those that change nothing of what is compared."""
    free = ("--output_dir", "--jobs")
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [one for one, before in pairs if one.partition("=")[0] not in free and before not in free]


def _choose(plan: Plan, folder: Path, workers: Workers) -> dict[str, Weights]:
    """Return the weights of each setting: of the highest mean validation accuracy, the smaller of equals."""
    chosen: dict[str, Weights] = {setting: {} for setting in plan.settings}
    for on_top in (False, True):  # on top of the weight decay that was best
        rows = [row for row in plan.rows if row.on_top == on_top and plan.grid(row)]
        jobs = {
            (setting, row, weight): plan.tuning(folder, setting, row, weight, chosen[setting])
            for setting in plan.settings
            for row in rows
            for weight in plan.grid(row)
        }
        if jobs:
            what = f"runs to choose weights{' on top of weight decay' if on_top else ''}"
            workers.run([job for runs in jobs.values() for job in runs], what, may_break_off=True)
        for setting in plan.settings:
            for row in rows:
                validated = {weight: _validated(jobs[setting, row, weight]) for weight in plan.grid(row)}
                chosen[setting][row] = max(validated, key=lambda weight: validated[weight])
    return chosen


def _validated(jobs: list[Job]) -> float:
    return statistics.mean(report.log_of(run)[-1]["val/accuracy"] for run, _ in jobs)


def _found(plan: Plan, folder: Path, chosen: dict[str, Weights]) -> dict[str, Any]:
    """Return all that tables and findings are made of."""
    settings = []
    for setting, fields in plan.settings.items():
        weights, costs = chosen[setting], plan.costs[setting]
        logs = {row: [report.log_of(run) for run, _ in plan.final(folder, setting, row, weights)] for row in plan.rows}
        rows = [
            {
                "method": row.method,
                "on_top": row.on_top,
                "weight": weights.get(row),
                "validation": {
                    f"{weight:g}": round(_validated(plan.tuning(folder, setting, row, weight, weights)), 4)
                    for weight in plan.grid(row)
                },
                "cost": round(costs[row.method]["step"] / costs[NONE]["step"], 3),
                "broken_off": sum(broken_off(run) for run, _ in plan.final(folder, setting, row, weights)),
                "values": report.reached(logs[row], logs[Row(NONE)]),
            }
            for row in plan.rows
        ]
        settings.append(
            {"setting": setting, "flags": shlex.join([*flags.arguments_of(fields), *plan.further]), "rows": rows}
        )
    return {
        "command": plan.command,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": plan.versions,
        "minutes": round(plan.minutes, 1),
        "runs": plan.runs,
        "seeds": plan.seeds,
        "tuning_seeds": plan.tuning_seeds,
        "settings": settings,
    }


if __name__ == "__main__":
    main()
