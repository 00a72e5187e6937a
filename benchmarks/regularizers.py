"""Clean test accuracy under each regularizer of recipes/train.py, over seeds.

    python benchmarks/regularizers.py [--seeds 5] [--jobs 2] [--json benchmarks/regularizers.json]

Digits, the recipe's MLP and 1500 steps; 40 % of 1000 training labels redrawn, or 100 clean examples. A seed changes
initialisation, batches, training subset and redrawn labels. Weights were not tuned on held-out data: all are shown, and
picking the best one flatters every regularizer alike. Below the table, paired over seeds: each regularizer at its best
weight minus each other. --report prints the table of an earlier run's json and trains nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

TRAIN = Path(__file__).parent.parent / "recipes" / "train.py"
# Measurements other than accuracy at their least.
FAST = "--cpu --sketch_dim 3 --probe_size 10 --kernel_size 2"
SETTINGS = {
    "40 % label noise, 1000 examples": (
        "--label_noise 0.4",
        {"none": [0], "weight_decay": [0.0025, 0.005, 0.01, 0.02], "complexity": [0.008, 0.016, 0.032]},
    ),
    "100 clean examples": (
        "--train_size 100",
        {"none": [0], "weight_decay": [0.002, 0.005, 0.01], "alignment": [0.03, 0.1, 0.3]},
    ),
}


def accuracies(flags, regularizer, weight, seed):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *FAST.split(), *flags.split(), "--seed", str(seed)]
        command += ["--output_dir", folder]
        if regularizer == "weight_decay":
            command += ["--weight_decay", str(weight)]
        elif regularizer != "none":
            command += ["--regularizer", regularizer, "--weight", str(weight)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603 - our own recipe
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    test = [line["test/accuracy"] for line in log]
    return {"last": test[-1], "best": max(test), "train": log[-1]["train/accuracy"]}


def report(rows):
    for row in rows:
        spread = "  ".join(f"{key} {row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" for key in ("last", "best", "train"))
        print(f"{row['setting']:32} {row['regularizer']:>12} {row['weight']:<6g} {spread}")
    print("\nlast accuracy at the best weights, mean ± s.d. of the differences between runs of the same seed")
    for setting in SETTINGS:
        best = {}
        for row in sorted((r for r in rows if r["setting"] == setting), key=lambda r: r["last"]["mean"]):
            best[row["regularizer"]] = row
        for one, other in itertools.permutations(best.values(), 2):
            pairs = zip(one["last"]["values"], other["last"]["values"], strict=True)
            differences = [a - b for a, b in pairs]
            if statistics.mean(differences) > 0:
                names = (f"{row['regularizer']} {row['weight']:g}" for row in (one, other))
                mean, sd = statistics.mean(differences), statistics.stdev(differences)
                print(f"{setting:32} {' - '.join(names):40} {mean:+.3f} ± {sd:.3f}")


def arguments(doc, file, seeds):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(file).with_suffix(".json"))
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def main():
    args = arguments(__doc__, __file__, seeds=5)
    if args.report:
        report(json.loads(args.json.read_text())["rows"])
        return
    jobs = [
        (setting, regularizer, weight, seed)
        for setting, (_, methods) in SETTINGS.items()
        for regularizer, weights in methods.items()
        for weight in weights
        for seed in range(args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = pool.map(lambda job: accuracies(SETTINGS[job[0]][0], *job[1:]), jobs)
        results = dict(zip(jobs, track(runs, total=len(jobs), description="runs"), strict=True))
    rows = []
    for setting, regularizer, weight in dict.fromkeys(job[:3] for job in jobs):
        found = [results[setting, regularizer, weight, seed] for seed in range(args.seeds)]
        row = {"setting": setting, "regularizer": regularizer, "weight": weight}
        for key in ("last", "best", "train"):
            values = [run[key] for run in found]
            row[key] = {"mean": statistics.mean(values), "sd": statistics.stdev(values), "values": values}
        rows.append(row)
    report(rows)
    args.json.write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
