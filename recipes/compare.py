r"""Does a regularizer of tangent features help, when, and at what cost, beside those that everybody has?

The same network, data and budget without a regularizer, with weight decay, label smoothing, a penalty on the trace of
the Fisher information, and each loss of alignreg; each alone, and on top of the best weight decay. Every method is
tuned over five weights by its accuracy at the end of training on validation examples, whose labels are redrawn as
those to train on are: no clean label is used, and no test example. Then fresh seeds, for the test accuracy at the end.

    python recipes/compare.py                                 # digits: four tasks, MLP and CNN, ten seeds; an hour
    python recipes/compare.py --short                         # one task, a few methods and seeds; a minute
    python recipes/compare.py --tasks few100 --networks mlp --methods none,weight_decay,alignment --seeds 20
    python recipes/compare.py --variants --networks mlp       # what helps the losses of alignreg, and what does not
    python recipes/compare.py --config recipes/configs/compare/mnist-mlp.yaml --data_path FOLDER
    python recipes/compare.py --report FOLDER                 # table, figures and findings of a comparison's folder again

The folder holds a run of train.py for each task, network, method, weight and seed, comparison.json with all that the
tables say, table.md, findings.md and figures. Stopped, it goes on with --resume FOLDER, also to more --seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, final

import _comparison
import _cost
import _flags
import _jobs
import _run
import train


@final
class Method(NamedTuple):
    """A regularizer: flags of train.py with a place for the weight, and the weights to choose from."""

    flags: str
    weights: tuple[float, ...]


STRIDE = "--reg_every 3"  # the losses' own default
ALIGNMENT = f"{STRIDE} --regularizer alignment --weight {{}}"
COMPLEXITY = f"{STRIDE} --regularizer complexity --weight {{}}"
LARGE, SMALL = (0.03, 0.1, 0.2, 0.4, 0.8), (0.004, 0.008, 0.016, 0.032, 0.064)
NONE, DECAY, ON_TOP = "none", "weight_decay", "+weight_decay"
METHODS = {
    NONE: Method("", ()),
    DECAY: Method("--weight_decay {}", (0.001, 0.003, 0.01, 0.02, 0.04)),
    "label_smoothing": Method("--label_smoothing {}", (0.05, 0.1, 0.2, 0.4, 0.6)),
    "fisher": Method(f"{STRIDE} --regularizer fisher --weight {{}}", (0.001, 0.002, 0.004, 0.008, 0.016)),
    "alignment": Method(ALIGNMENT, LARGE),
    "complexity": Method(COMPLEXITY, SMALL),
    "participation_ratio": Method(
        f"{STRIDE} --regularizer participation_ratio --weight {{}}", (0.003, 0.01, 0.03, 0.1, 0.3)
    ),
    "kare": Method(f"{STRIDE} --reg_examples 16 --regularizer kare --weight {{}}", (0.1, 0.3, 1, 3, 10)),
}
VARIANTS = {
    NONE: METHODS[NONE],
    DECAY: METHODS[DECAY],
    "alignment": METHODS["alignment"],
    "alignment:every_step": Method(f"{ALIGNMENT} --reg_every 1", LARGE),
    "alignment:whole_batch": Method(f"{ALIGNMENT} --reg_examples 64", LARGE),
    "alignment:32_probes": Method(f"{ALIGNMENT} --reg_probes 32", LARGE),
    "alignment:uncentered": Method(f"{ALIGNMENT} --no-reg_centered", LARGE),
    "alignment:per_layer": Method(f"{ALIGNMENT} --reg_per_layer", LARGE),
    "alignment:hidden_layers": Method(f"{ALIGNMENT} --reg_layers hidden", LARGE),
    "alignment:last_layer": Method(f"{ALIGNMENT} --reg_layers last", LARGE),
    "alignment:first_third": Method(f"{ALIGNMENT} --reg_until 0.333", LARGE),
    "alignment:last_two_thirds": Method(f"{ALIGNMENT} --reg_from 0.333", LARGE),
    "alignment:fixed_examples": Method(f"{ALIGNMENT} --reg_pool 32", LARGE),
    "complexity": METHODS["complexity"],
    "complexity:every_step": Method(f"{COMPLEXITY} --reg_every 1", SMALL),
    "complexity:uncentered": Method(f"{COMPLEXITY} --no-reg_centered", SMALL),
    "complexity:hidden_layers": Method(f"{COMPLEXITY} --reg_layers hidden", SMALL),
    "complexity:last_layer": Method(f"{COMPLEXITY} --reg_layers last", SMALL),
}
TASKS = {
    "noise40": "--label_noise 0.4",
    "noise20": "--label_noise 0.2",
    "few100": "--train_size 100",
    "few300": "--train_size 300",
}
NETWORKS = {"mlp": "--model mlp", "cnn": "--model cnn --hidden 16"}
BUNDLED = "--cpu --val_size 300 --steps 1000"
TUNING = "--measure= --log_spacing 4 --no-figure"
FINAL = "--measure held_out,ranks,path --log_spacing 2 --no-figure"
FIRST_SEED = 100
"""Of the runs that count: none of those that weights are chosen by."""
SHORT = {
    "tasks": ["noise40"],
    "networks": ["mlp"],
    "methods": [NONE, DECAY, "complexity"],
    "seeds": 3,
    "tuning_seeds": 1,
    "on_top": False,
    "weights": 2,
    "further": ["--steps", "600"],
}


def main() -> None:
    """Run a comparison from the command line: the runs that are not there yet, then table, figures and findings."""
    arguments, further = _parser().parse_known_args()
    if arguments.report:
        _comparison.report(arguments.report)
        return
    started = time.monotonic()
    try:
        plan = _known(arguments, further) if arguments.resume else _new(arguments, further)
        settings = _settings(plan)
        for flags in settings.values():
            for name in plan["methods"]:
                _parse(flags, _flags_of(plan, name, None))  # refuses wrong flags before there is a folder
        folder = arguments.resume or _claim(arguments.output_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if "costs" not in plan:
        print("timing a step of each method ...", flush=True)
        plan["costs"] = {label: _cost.of(_timed(plan, flags), arguments.jobs) for label, flags in settings.items()}
    _save(folder, plan)
    _announce(plan, settings, arguments.jobs)
    try:
        weights = _tune(plan, settings, folder, arguments.jobs)
        finals = {
            (label, *row): [
                (_place(folder, label, "final", *row) / f"seed-{seed}", [*run, "--seed", str(FIRST_SEED + seed)])
                for seed in range(plan["seeds"])
            ]
            for label, flags in settings.items()
            for row in _rows(plan)
            for run in [_flags_with(plan, flags, *row, weights[label], FINAL)]
        }
        _jobs.run_all([job for jobs in finals.values() for job in jobs], arguments.jobs, folder, "runs of fresh seeds")
    finally:
        plan["minutes"] = plan.get("minutes", 0) + (time.monotonic() - started) / 60
        _save(folder, plan)
    found = {
        "command": plan["command"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": plan["versions"],
        "minutes": round(plan["minutes"], 1),
        "runs": _count(plan, settings),
        "seeds": plan["seeds"],
        "tuning_seeds": plan["tuning_seeds"],
        "settings": [_collected(plan, folder, label, settings[label], weights[label], finals) for label in settings],
    }
    (folder / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    _comparison.report(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other flags go to train.py, for every run",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, help="runs that count of each method (default: 10, or those there were)")
    parser.add_argument("--tuning_seeds", type=int, help="runs of each weight to choose it by (default: 2)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: 2)")
    parser.add_argument("--tasks", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--networks", help=f"some of {','.join(NETWORKS)} (default: both); not with --config")
    parser.add_argument("--methods", help=f"some of {','.join(METHODS)}, or of the variants (default: all)")
    parser.add_argument("--variants", action="store_true", help="alignment and complexity losses with other options")
    parser.add_argument("--on_top", action=argparse.BooleanOptionalAction, help="also on top of the best weight decay")
    parser.add_argument("--short", action="store_true", help="a minute's look: no evidence")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--output_dir", type=Path, help="the comparison's folder; a new one under runs/ by default")
    place.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a comparison where it was left")
    place.add_argument("--report", type=Path, metavar="FOLDER", help="only draw and tell what a comparison found")
    return parser


def _new(arguments: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    configured = "--config" in further
    if configured and arguments.networks:
        raise ValueError("--networks: expected the network of the configuration alone; leave it out.")
    if "--seed" in further:
        raise ValueError("--seed: the seeds are given by --seeds and --tuning_seeds, how many of each.")
    known = {**METHODS, **VARIANTS}
    default = list(VARIANTS if arguments.variants else METHODS)
    plan: dict[str, Any] = {
        "comparison": 1,
        "command": shlex.join(["python", "recipes/compare.py", *_without_places(sys.argv[1:])]),
        "versions": _run.versions(),
        "tasks": _chosen("--tasks", arguments.tasks, list(TASKS), list(TASKS)),
        "networks": [] if configured else _chosen("--networks", arguments.networks, list(NETWORKS), list(NETWORKS)),
        "methods": _chosen("--methods", arguments.methods, list(known), default),
        "seeds": 10,
        "tuning_seeds": 2,
        "on_top": not arguments.variants,
        "weights": None,
        "further": further,
    }
    if arguments.short:
        plan |= {**SHORT, "further": [*SHORT["further"], *further]}
    for name in ("seeds", "tuning_seeds", "on_top"):
        if getattr(arguments, name) is not None:
            plan[name] = getattr(arguments, name)
    if plan["seeds"] < 2 or plan["tuning_seeds"] < 1 or arguments.jobs < 1:
        raise ValueError("--seeds: expected at least 2 (intervals need them), --tuning_seeds and --jobs at least 1.")
    if not {NONE, DECAY} <= set(plan["methods"]):
        raise ValueError(f"--methods: expected {NONE} and {DECAY} among them: the others are compared with these.")
    return plan


def _known(arguments: argparse.Namespace, further: list[str]) -> dict[str, Any]:
    """Return the plan of a comparison that goes on, with more seeds if the user wants them."""
    file = arguments.resume / "plan.json"
    if not file.is_file():
        raise ValueError(f"--resume: expected the folder of a comparison, but there is no {file}.")
    plan: dict[str, Any] = json.loads(file.read_text())
    given = ("tuning_seeds", "tasks", "networks", "methods", "on_top")
    if further or arguments.variants or arguments.short or any(getattr(arguments, name) is not None for name in given):
        raise ValueError("--resume: expected no further flags but --seeds and --jobs: the others are the comparison's.")
    if arguments.seeds is not None and arguments.seeds < plan["seeds"]:
        raise ValueError(f"--seeds: expected at least the {plan['seeds']} of the comparison, got {arguments.seeds}.")
    return {**plan, "seeds": arguments.seeds or plan["seeds"]}


def _chosen(flag: str, value: str | None, known: list[str], default: list[str]) -> list[str]:
    names = default if value is None else [name.strip() for name in value.split(",")]
    odd = [name for name in names if name not in known]
    if odd:
        raise ValueError(f"{flag}: expected some of {', '.join(known)}, got {', '.join(odd)}.")
    return list(dict.fromkeys(names))


def _without_places(arguments: list[str]) -> list[str]:
    """Leave out the flags that change nothing of what is compared."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--output_dir", "--jobs"):
            kept.append(argument)
        skip = not skip and argument in ("--output_dir", "--jobs")
    return kept


def _claim(wanted: Path | None) -> Path:
    folder = wanted or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--output_dir: expected a new or empty folder, but {folder} holds something. Try --resume.")
    return folder


def _save(folder: Path, plan: dict[str, Any]) -> None:
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")


def _settings(plan: dict[str, Any]) -> dict[str, str]:
    """Return the flags of each task on each network."""
    if not plan["networks"]:
        return {task: TASKS[task] for task in plan["tasks"]}
    return {
        f"{task}-{network}": f"{BUNDLED} {TASKS[task]} {NETWORKS[network]}"
        for task in plan["tasks"]
        for network in plan["networks"]
    }


def _flags_of(plan: dict[str, Any], name: str, weight: float | None) -> str:
    """Return the flags of a method; without a weight, with the middle one."""
    method = {**METHODS, **VARIANTS}[name]
    grid = _weights(plan, name)
    if not grid:
        return method.flags
    return method.flags.format(grid[len(grid) // 2] if weight is None else weight)


def _weights(plan: dict[str, Any], name: str) -> tuple[float, ...]:
    grid = {**METHODS, **VARIANTS}[name].weights
    few = plan["weights"]
    return grid if few is None else grid[-few - 1 : -1]


def _rows(plan: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return the methods, and whether on top of weight decay."""
    alone = [(name, False) for name in plan["methods"]]
    return alone + [(name, True) for name, _ in alone if plan["on_top"] and name not in (NONE, DECAY)]


def _parse(*flags: str) -> train.Config:
    return _flags.parse(train.Config, None, [word for part in flags for word in shlex.split(part)])[0]


def _timed(plan: dict[str, Any], flags: str) -> dict[str, train.Config]:
    further = shlex.join(plan["further"])
    return {name: _parse(flags, _flags_of(plan, name, None), FINAL, further) for name in plan["methods"]}


def _count(plan: dict[str, Any], settings: dict[str, str]) -> int:
    tuning = sum(len(_weights(plan, name)) for name, _ in _rows(plan)) * plan["tuning_seeds"]
    return len(settings) * (tuning + len(_rows(plan)) * plan["seeds"])


def _announce(plan: dict[str, Any], settings: dict[str, str], jobs: int) -> None:
    seconds = 0.0
    for label, flags in settings.items():
        steps = _parse(flags, shlex.join(plan["further"])).steps
        for name, _ in _rows(plan):
            cost = plan["costs"][label][name]
            runs = len(_weights(plan, name)) * plan["tuning_seeds"] + plan["seeds"]
            seconds += runs * (steps * cost["step"] + cost["start"]) + plan["seeds"] * 10 * cost["measure"]
    print(f"{_count(plan, settings)} runs, about {seconds / 60 / jobs:.0f} minutes with {jobs} at a time", flush=True)


def _place(folder: Path, label: str, stage: str, name: str, on_top: bool) -> Path:
    return folder / label / stage / (name.replace(":", "-") + (ON_TOP if on_top else ""))


Weights = dict[tuple[str, bool], float]


def _flags_with(plan: dict[str, Any], flags: str, name: str, on_top: bool, weights: Weights, stage: str) -> list[str]:
    """Return the flags of a method with the weight that was chosen, on top of weight decay or not."""
    decay = _flags_of(plan, DECAY, weights[DECAY, False]) if on_top else ""
    own = _flags_of(plan, name, weights.get((name, on_top)))
    return [*shlex.split(f"{flags} {decay} {own} {stage}"), *plan["further"]]


def _tune(plan: dict[str, Any], settings: dict[str, str], folder: Path, at_once: int) -> dict[str, Weights]:
    """Return the weight of each row in each setting: of the highest mean validation accuracy, the smaller of equals."""
    chosen: dict[str, Weights] = {label: {} for label in settings}
    for stage in (False, True):  # on top of the weight decay that was best
        rows = [(name, on_top) for name, on_top in _rows(plan) if on_top == stage and _weights(plan, name)]
        jobs = {
            (label, row, weight): [
                (_place(folder, label, "tune", *row) / f"{weight:g}" / f"seed-{seed}", [*run, "--seed", str(seed)])
                for seed in range(plan["tuning_seeds"])
            ]
            for label, flags in settings.items()
            for row in rows
            for weight in _weights(plan, row[0])
            for run in [_flags_with(plan, flags, *row, {**chosen[label], row: weight}, TUNING)]
        }
        what = "runs to choose weights" + (" on top of weight decay" if stage else "")
        if jobs:
            _jobs.run_all([job for runs in jobs.values() for job in runs], at_once, folder, what)
        for label in settings:
            for row in rows:
                chosen[label][row] = max(_weights(plan, row[0]), key=lambda w: _validated(jobs[label, row, w]))
    return chosen


def _validated(jobs: list[_jobs.Job]) -> float:
    return statistics.mean(_run.read(run)[-1]["val/accuracy"] for run, _ in jobs)


def _collected(plan: Any, folder: Path, label: str, flags: str, weights: Weights, finals: Any) -> dict[str, Any]:
    """Return what the runs of a setting came to."""
    without = [_run.read(run) for run, _ in finals[label, NONE, False]]
    rows = []
    for name, on_top in _rows(plan):
        logs = [_run.read(run) for run, _ in finals[label, name, on_top]]
        tuned = {
            f"{weight:g}": statistics.mean(
                _run.read(_place(folder, label, "tune", name, on_top) / f"{weight:g}" / f"seed-{seed}")[-1][
                    "val/accuracy"
                ]
                for seed in range(plan["tuning_seeds"])
            )
            for weight in _weights(plan, name)
        }
        rows.append(
            {
                "method": name,
                "on_top": on_top,
                "weight": weights.get((name, on_top)),
                "validation": tuned,
                "cost": plan["costs"][label][name]["step"] / plan["costs"][label][NONE]["step"],
                "values": _comparison.reached(logs, without),
            }
        )
    return {"setting": label, "flags": shlex.join([*shlex.split(flags), *plan["further"]]), "rows": rows}


if __name__ == "__main__":
    main()
