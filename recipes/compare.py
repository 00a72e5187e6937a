r"""Does a regularizer of tangent features help, when, and at what cost, compared with common regularizers?

This recipe trains the same network on the same data and budget without a regularizer, with weight decay, with label
smoothing, with a penalty on the trace of the Fisher information, and with each loss of alignreg, each alone and on top
of the best weight decay. It tunes every method over five weights by the final accuracy on validation examples, whose
labels are redrawn like the training labels, so tuning uses no clean label and no test example. Runs with fresh seeds
then give the final test accuracy.

    python recipes/compare.py                                 # digits: four tasks, MLP and CNN, ten seeds; over an hour
    python recipes/compare.py --short                         # one task, a few methods and seeds; half a minute
    python recipes/compare.py --tasks few100 --networks mlp --methods none,weight_decay,alignment --seeds 20
    python recipes/compare.py --variants --networks mlp       # options of the losses of alignreg
    python recipes/compare.py --config recipes/configs/compare/mnist-mlp.yaml --data_path FOLDER
    python recipes/compare.py --report FOLDER                 # only the report of a finished comparison

The folder holds a run of train.py for each task, network, method, weight and seed, comparison.json with everything in
the tables, table.md, findings.md and figures. A stopped comparison continues with --resume FOLDER, optionally with more
--seeds.
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

sys.path.insert(0, str(Path(__file__).parent))  # python -m does not look here

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


@messages.in_words()
def main() -> None:
    """Run a comparison from the command line: the missing runs, then table, figures and findings."""
    arguments, further = _parser().parse_known_args()
    plots.pyplot()  # fails before the work, not after it
    if arguments.report:
        report.report(arguments.report, arguments.into)
        return
    started = time.monotonic()
    plan = _known(arguments, further) if arguments.resume else _new(arguments, further)
    # This refuses wrong flags before there is a folder.
    configs = {s: {name: plan.config(s, Row(name)) for name in plan.methods} for s in plan.settings}
    if not plan.costs:
        print("timing a step of each method ...", flush=True)
        plan.costs = {setting: cost.of(of_setting, arguments.jobs) for setting, of_setting in configs.items()}
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
            workers.run(finals, "runs with fresh seeds", may_break_off=True)
    finally:
        plan.minutes += (time.monotonic() - started) / 60
        plan.save(folder)
    text = json.dumps(_found(plan, folder, chosen), indent=1)
    # The values of all seeds go on one line.
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    storage.write(folder / "comparison.json", f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags are passed to train.py, for every run: --config, with a --val_size, --steps, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, help="final runs of each method (default: 10, or as many as before)")
    parser.add_argument("--tuning_seeds", type=int, help="tuning runs of each weight (default: 2)")
    parser.add_argument("--tasks", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--networks", help=f"some of {','.join(NETWORKS)} (default: both); not with --config")
    parser.add_argument(
        "--methods",
        help=f"none, weight_decay, and some of {', '.join(KNOWN)} (default: those without a colon)",
    )
    parser.add_argument("--variants", action="store_true", help="also the losses of alignreg with other options")
    parser.add_argument("--on_top", action=argparse.BooleanOptionalAction, help="also on top of the best weight decay")
    parser.add_argument("--short", action="store_true", help="a quick look of half a minute, not evidence")
    parser.add_argument("--into", type=Path, nargs="+", default=[], metavar="FILE", help="texts to put tables into")
    add_flags(parser, "comparison").add_argument(
        "--report", type=Path, metavar="PLACE", help="only report the comparison in this folder or json"
    )
    return parser


def _new(arguments: argparse.Namespace, further: list[str]) -> Plan:
    configured = "--config" in further
    if configured and arguments.networks:
        raise ValueError("--networks: expected no such flag with --config, which names the network. Omit it.")
    if "--seed" in further:
        raise ValueError("--seed: expected --seeds and --tuning_seeds instead, the numbers of seeds.")
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
        raise ValueError("--seeds: expected at least 2, for intervals, and --tuning_seeds and --jobs at least 1.")
    if not {NONE, DECAY} <= set(plan.methods):
        raise ValueError(f"--methods: expected {NONE} and {DECAY} among them, to compare the others with.")
    return plan


def _known(arguments: argparse.Namespace, further: list[str]) -> Plan:
    """Return the plan of a resumed comparison, possibly with more seeds."""
    plan = Plan.load(arguments.resume)
    given = ("tuning_seeds", "tasks", "networks", "methods", "on_top")
    if further or arguments.variants or arguments.short or any(getattr(arguments, name) is not None for name in given):
        raise ValueError("--resume: expected no other flags than --seeds, --jobs and --into; it has its own.")
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
    """Return the flags without those that do not affect the results."""
    free = ("--output_dir", "--jobs")
    pairs = zip(arguments, ["", *arguments], strict=False)
    return [one for one, before in pairs if one.partition("=")[0] not in free and before not in free]


def _choose(plan: Plan, folder: Path, workers: Workers) -> dict[str, Weights]:
    """Return the weights with the highest mean validation accuracy for each setting; the smaller one wins a tie."""
    chosen: dict[str, Weights] = {setting: {} for setting in plan.settings}
    for on_top in (False, True):  # the second pass needs the best weight decay from the first
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
    """Return the data for tables and findings."""
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
