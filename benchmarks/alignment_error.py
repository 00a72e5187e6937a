"""How far the sketched alignment is from the exact one, and how honest its error bar is.

    python benchmarks/alignment_error.py [--seeds 100] [--sketch_dim 64] [--json benchmarks/alignment_error.json]

Digits, an MLP 64-256-10, 1000 examples in shuffled batches of 100; at initialisation and trained; balanced classes and
unbalanced ones (class k about 2^(-k/3) as frequent as class 0). Each seed draws new directions. The exact value is that
of the full kernel in float64.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures, functional
from alignreg.metrics import TangentAlignment


def digits(balanced):
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    weights = torch.ones(10) if balanced else 2.0 ** (-torch.arange(10) / 3)
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(weights[y], 1000, generator=generator)
    return x[rows], y[rows]


def network(x, y, *, trained):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(500 if trained else 0):
        rows = torch.arange(64 * step, 64 * step + 64) % len(x)
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net


def exact_alignment(net, x, y):
    net = net.double()
    value = float(functional.alignment(TangentFeatures(net).kernel(x.double()), y))
    net.float()
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--sketch_dim", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    rows = []
    print(f"{'':24}  exact   mean error      z   spread  mean s.e.  within 2 s.e.")
    for trained in (False, True):
        for balanced in (True, False):
            x, y = digits(balanced)
            net = network(x, y, trained=trained)
            exact = exact_alignment(net, x, y)
            values, errors = [], []
            for seed in range(args.seeds):
                metric = TangentAlignment(net, 10, sketch_dim=args.sketch_dim, seed=seed)
                for inputs, target in zip(x.split(100), y.split(100), strict=True):
                    metric.update(inputs, target)
                values.append(metric.compute())
                errors.append(metric.standard_error())
            relative = torch.stack(values) / exact - 1
            error = torch.stack(errors) / exact
            row = {
                "network": "trained" if trained else "initial",
                "classes": "balanced" if balanced else "unbalanced",
                "exact": exact,
                "mean_relative_error": float(relative.mean()),
                "z": float(relative.mean() / (relative.std() / math.sqrt(len(relative)))),
                "spread": float(relative.std()),
                "mean_standard_error": float(error.mean()),
                "coverage": float((relative.abs() <= 2 * error).double().mean()),
            }
            rows.append(row)
            print(
                f"{row['network']:>8}, {row['classes']:<14} {exact:.4f}  {row['mean_relative_error']:+9.2%}  "
                f"{row['z']:+6.2f}  {row['spread']:6.2%}  {row['mean_standard_error']:8.2%}  {row['coverage']:10.0%}",
                flush=True,
            )
    options = {key: value for key, value in vars(args).items() if key != "json"}
    args.json.write_text(json.dumps({**options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
