"""Measure how much of a loss's effect on clean test accuracy its stride and sub-batch preserve.

    python benchmarks/loss_defaults.py [--seeds 10] [--jobs 2] [--json benchmarks/loss_defaults.json]

The MLP of recipes/train.py is trained on digits for 1500 steps of 64 examples, with 40 % of 1000 training labels
redrawn, or with 100 clean examples. Each loss has its default weight and runs in two versions: with its defaults, on
some examples of every n-th batch, and on all examples of every batch. A gain is the final accuracy minus that of the
run with the same seed and no loss; the share that the defaults keep is a ratio of mean gains, with the 95 % interval of
a bootstrap over seeds. --report prints the table of an earlier run's json and trains nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from alignreg.losses import AlignmentLoss, ComplexityPenalty, ParticipationRatioLoss

TRAIN = Path(__file__).parent.parent / "recipes" / "train.py"
NOISY, FEW = "40 % label noise, 1000 examples", "100 clean examples"
SETTINGS = {NOISY: "--label_noise 0.4", FEW: "--train_size 100"}
LOSSES = {
    "complexity": ComplexityPenalty,
    "alignment": AlignmentLoss,
    "participation_ratio": ParticipationRatioLoss,
}
# The settings that each loss is meant for (participation ratio: both), and the multiple of --seeds that makes its gain
# visible.
ROWS = {
    (NOISY, "complexity"): 1,
    (FEW, "alignment"): 6,
    (NOISY, "participation_ratio"): 1,
    (FEW, "participation_ratio"): 1,
}


def last_accuracy(setting, loss, version, seed):
    flags = f"--cpu --measure= --no-figure {SETTINGS[setting]} --seed {seed}"
    if loss != "none":
        reg = LOSSES[loss](nn.Linear(1, 1))
        examples, every = (reg.examples, reg.every_n_steps) if version == "defaults" else (64, 1)
        flags += f" --regularizer {loss} --weight {reg.weight} --reg_examples {examples} --reg_every {every}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *flags.split(), "--output_dir", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603 - our own recipe
        log = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return json.loads(log[-1])["test/accuracy"]


def interval(gains, whole, draws=10_000):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(gains), (draws, len(gains)), generator=generator)
    ratios = torch.tensor(gains)[rows].mean(1) / torch.tensor(whole)[rows].mean(1)
    return [float(torch.quantile(ratios, q)) for q in (0.025, 0.975)]


def report(rows):
    for row in rows:
        none = row["none"]
        shown = [f"{row['loss']:20} {row['setting']:32} {len(none)} seeds  none {statistics.mean(none):.3f}"]
        gains = {
            version: [a - b for a, b in zip(row[version], none, strict=True)] for version in ("every step", "defaults")
        }
        for version, values in gains.items():
            error = statistics.stdev(values) / len(values) ** 0.5
            shown.append(f"{version} {statistics.mean(values):+.4f} ± {error:.4f}")
        whole, kept = (statistics.mean(values) for values in gains.values())
        if whole > 0:
            low, high = interval(gains["defaults"], gains["every step"])
            shown.append(f"kept {kept / whole:.2f} [{low:.2f}, {high:.2f}]")
        print("  ".join(shown))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def main():
    args = arguments()
    if args.report:
        report(json.loads(args.json.read_text())["rows"])
        return
    runs = {(setting, "none", ""): max(n for row, n in ROWS.items() if row[0] == setting) for setting in SETTINGS}
    runs |= {(*row, version): times for row, times in ROWS.items() for version in ("every step", "defaults")}
    jobs = [(*run, seed) for run, times in runs.items() for seed in range(args.seeds * times)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda job: last_accuracy(*job), jobs)
        found = dict(zip(jobs, track(results, total=len(jobs), description="runs"), strict=True))
    rows = []
    for (setting, loss), times in ROWS.items():
        row = {"setting": setting, "loss": loss, "weight": LOSSES[loss].default_weight}
        for version, name in (("", "none"), ("every step", "every step"), ("defaults", "defaults")):
            kind = loss if version else "none"
            row[name] = [found[setting, kind, version, seed] for seed in range(args.seeds * times)]
        rows.append(row)
    report(rows)
    args.json.write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
