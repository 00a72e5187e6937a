"""Do the tangent features align with easy examples first, and more?

    python benchmarks/easy_difficult.py [--seeds 5] [--json benchmarks/easy_difficult.json]
    python benchmarks/easy_difficult.py --report [--figure docs/images/easy_difficult.png]

An MLP 64-256-256-10 is trained on digits for 3000 steps of SGD (learning rate 0.05, momentum 0.9, batches of 64). Of
1000 training labels 20 % are redrawn uniformly, and about one in ten of these stays correct. They are the difficult
examples; the easy examples are as many others, drawn at random, because alignment depends on the number of examples.
TangentAlignment(groups=("easy", "difficult")) measures the alignment of each group's training labels with its own
kernel, from 128 directions. The seed changes initialization, batches, redrawn labels and the choice of easy examples.

A control separates the effect of difficulty from that of labels: "relabeled" redraws the labels of the easy group in
the measurement alone, so the network has not been trained on them.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.metrics import TangentAlignment

GROUPS = ("easy", "difficult", "relabeled")
STEPS = sorted({0, *(round(1.4**k) for k in range(24)), 3000})


def problem(seed):
    """Return the training data and, for each group, its examples and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[:1000]
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    redrawn, others = torch.arange(200), torch.arange(200, 400)  # rows are in random order
    y[redrawn] = torch.randint(10, (200,), generator=generator)
    groups = {"easy": (others, y[others]), "difficult": (redrawn, y[redrawn])}
    groups["relabeled"] = (others, torch.randint(10, (200,), generator=generator))
    return x, y, groups


def run(seed):
    x, y, groups = problem(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    metric = TangentAlignment(net, 10, groups=GROUPS, sketch_dim=128, seed=seed, return_std_error=True)
    inputs = torch.cat([x[rows] for rows, _ in groups.values()])
    target = torch.cat([labels for _, labels in groups.values()])
    group = torch.arange(3).repeat_interleave(200)
    log = []
    order = torch.randperm(1000)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            metric.reset()
            for batch in torch.randperm(600, generator=torch.Generator().manual_seed(0)).split(100):
                metric.update(inputs[batch], target[batch], group[batch])
            line = {"step": step}
            for name, estimate in metric.compute().items():
                line[name], line[f"{name}_error"] = float(estimate.value), float(estimate.standard_error)
            with torch.no_grad():
                right = (net(inputs).argmax(1) == target).double()
            for index, name in enumerate(GROUPS):
                line[f"{name}_accuracy"] = float(right[group == index].mean())
            log.append(line)
        at = 64 * step % 960
        if at == 0:
            order = torch.randperm(1000)
        rows = order[at : at + 64]
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return log


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def first(log, name, share):
    """Return the first step at which a curve has risen by ``share`` of the way from its start to its maximum."""
    start, highest = log[0][name], max(line[name] for line in log)
    return next(line["step"] for line in log if line[name] >= start + share * (highest - start))


def report(logs):
    print(f"{'step':>5}  {'easy':15}  {'difficult':15}  {'relabeled':15}  {'easy/difficult':15}  accuracy of both")
    for lines in zip(*logs, strict=True):
        ratios = [line["easy"] / line["difficult"] for line in lines]
        accuracy = [statistics.mean(line[f"{name}_accuracy"] for line in lines) for name in ("easy", "difficult")]
        columns = [spread([line[name] for line in lines]) for name in GROUPS]
        print(f"{lines[0]['step']:5}  {'  '.join(columns)}  {spread(ratios)}  {accuracy[0]:.2f}  {accuracy[1]:.2f}")
    for name in GROUPS[:2]:
        peaks = [max(log, key=lambda line: line[name]) for log in logs]
        halves = [first(log, name, 0.5) for log in logs]
        print(
            f"{name}: highest {spread([peak[name] for peak in peaks])} at steps {[peak['step'] for peak in peaks]}; "
            f"halfway up at steps {halves}"
        )
    higher = [sum(line["easy"] > line["difficult"] for line in lines) for lines in zip(*logs, strict=True)]
    print(f"number of seeds, of {len(logs)}, in which the easy group is higher, step by step: {higher}")


def figure(logs, path):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [step + 1 for step in STEPS]
    for name, color in zip(GROUPS, ("#1f6fb4", "#d1661f", "0.6"), strict=True):
        for axis, key in ((axes[0], name), (axes[1], f"{name}_accuracy")):
            curves = [[line[key] for line in log] for log in logs]
            for curve in curves:
                axis.plot(steps, curve, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, [statistics.mean(c) for c in zip(*curves, strict=True)], color=color, label=name)
    axes[0].set(xscale="log", xlabel="optimizer steps + 1", ylabel="alignment of the group", ylim=(0, None))
    axes[1].set(xscale="log", xlabel="optimizer steps + 1", ylabel="accuracy on the group's labels")
    axes[0].legend(frameon=False)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if not args.report:
        logs = [run(seed) for seed in track(range(args.seeds), description="seeds")]
        args.json.write_text(json.dumps(logs, indent=1) + "\n")
    logs = json.loads(args.json.read_text())
    report(logs)
    if args.figure:
        figure(logs, args.figure)


if __name__ == "__main__":
    main()
