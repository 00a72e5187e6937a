"""Measure sketched metrics on small samples, with many parameters and with many outputs.

    python benchmarks/scale.py [--part samples|hash|factored|large|outputs|memory] [--json benchmarks/scale.json]

samples  shows the alignment on n = 50 to 1600 of the 1,797 digits, with m = 64, as the paper defines it and unbiased,
         for the trained MLP and CNN of sketch_metrics.py: mean and standard error over random subsets, each with
         directions of its own, beside the mean standard error that the metrics report.
hash     shows ‖hash‖²/‖Φᵀy‖² − 1 over seeds, where the MLP's product with the targets of 200 digits is hashed to 2^10
         to 2^16 numbers.
factored shows the alignment on 20 images or sequences for the networks of exact_kernel.py with 1, 2, 10 and 100
         outputs, from directions and from factored sketches, with ``sketch_dim`` 64: mean and spread over draws
         relative to the exact alignment, CPU seconds of a draw, and the CPU seconds that an error of 5 % needs (the
         error falls like one over the root of the cost).
large    shows the wall time and peak memory of a separate process, for a Transformer of 100 million random weights on
         256 sequences of 8 tokens, with m = 32.
outputs  shows the same for ResNet18 of width 16 with 1,000 outputs, n = 64, m = 32.
memory   shows the same for an MLP 784-w-w-c in batches of 100 examples, with m = 32, against the number of examples,
         the width and the number of outputs, varied one at a time.

All parts use float32; samples, hash and factored use one thread, the others all threads.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import exact_kernel
import torch
from rich.progress import track
from sketch_metrics import cnn, digits, mlp, run_parts, train
from torch import nn

from alignreg import TangentFeatures, sketches
from alignreg.metrics import TangentAlignment

SUBSETS = {50: 64, 100: 32, 200: 16, 400: 16, 800: 8, 1600: 8}
KINDS = {"sample": False, "unbiased": True}


def samples():
    torch.set_num_threads(1)
    rows = []
    for name, build in (("MLP", mlp), ("CNN", cnn)):
        x, y = digits()
        torch.manual_seed(0)
        net = train(build(), x, y, 500)
        for n, subsets in SUBSETS.items():
            found = {kind: [] for kind in KINDS}
            for seed in track(range(subsets), description=f"{name}, n = {n}"):
                chosen = sketches.subset(len(x), n, seed=seed, step=n)
                for kind, unbiased in KINDS.items():
                    metric = TangentAlignment(net, 10, seed=seed, unbiased=unbiased)
                    for part in chosen.split(100):
                        metric.update(x[part], y[part])
                    found[kind].append((float(metric.compute()), float(metric.standard_error())))
            for kind, pairs in found.items():
                values, errors = torch.tensor(pairs, dtype=torch.float64).T
                row = {"network": name, "n": n, "subsets": subsets, "kind": kind, "mean": float(values.mean())}
                row["standard_error"] = float(values.std() / subsets**0.5)
                row["mean_reported"] = float(errors.mean())
                rows.append(row)
                print(
                    f"{name} n={n:<5}{kind:9} {row['mean']:.4f} ± {row['standard_error']:.4f} over {subsets} subsets; "
                    f"mean standard error of a sketch {row['mean_reported']:.4f}",
                    flush=True,
                )
    return rows


def hashing(draws):
    torch.set_num_threads(1)
    x, y = digits()
    torch.manual_seed(0)
    net = train(mlp(), x, y, 500)
    target = torch.nn.functional.one_hot(y[:200], 10).float()
    back = TangentFeatures(net).pullback(x[:200], (target - target.mean(0))[None])
    exact = sum(float(value.double().square().sum()) for value in back.values())
    numbers = sum(value.numel() for value in back.values())
    rows = []
    for bits in (10, 12, 14, 16):
        errors = torch.tensor(
            [float(sketches.count_sketch(back, 2**bits, seed=s).square().sum()) / exact - 1 for s in range(draws)]
        )
        row = {"size": 2**bits, "numbers": numbers, "mean_error": float(errors.mean()), "spread": float(errors.std())}
        row["bound"] = (2 / 2**bits) ** 0.5
        rows.append(row)
        print(
            f"{numbers} numbers to {2**bits:6}: mean error {row['mean_error']:+.2%}, spread {row['spread']:.2%}, "
            f"at most {row['bound']:.2%}"
        )
    return rows


def factored(draws):
    torch.set_num_threads(1)
    rows = []
    for network in ("mlp", "vgg", "resnet", "transformer"):
        for c in (1, 2, 10, 100):
            net, x = exact_kernel.problem(network, n=20, c=c)
            # A single output has real targets, several outputs have classes.
            y = torch.arange(20) % 2 * 1.0 if c == 1 else torch.arange(20) % c
            exact = TangentAlignment(net, c, method="exact")
            exact.update(x, y)
            expected, costs = float(exact.compute()), {}
            for sketch in ("gaussian", "factored"):
                values, start = [], time.process_time()
                for seed in track(range(draws), description=f"{network}, {c} outputs, {sketch}"):
                    metric = TangentAlignment(net, c, seed=seed, sketch=sketch, pilot=False)
                    metric.update(x, y)
                    values.append(float(metric.compute()) / expected)
                found = torch.tensor(values)
                row = {"network": network, "outputs": c, "sketch": sketch, "draws": draws, "mean": float(found.mean())}
                row |= {"spread": float(found.std()), "seconds": (time.process_time() - start) / draws}
                costs[sketch] = row["seconds"] * (row["spread"] / 0.05) ** 2
                rows.append(row | {"seconds_to_5_percent": costs[sketch]})
                print(
                    f"{network:12}{c:4} outputs, {sketch:9} mean {row['mean']:.3f}, spread {row['spread']:.1%}, "
                    f"{row['seconds']:.3f} s; to 5 % {costs[sketch]:.3f} s",
                    flush=True,
                )
            rows[-1] |= {"times_cheaper": costs["gaussian"] / costs["factored"]}
            rows[-1] |= {"chosen": TangentAlignment(net, c, sketch="auto").sketch}
            print(
                f"{network:12}{c:4} outputs: factored {rows[-1]['times_cheaper']:.1f} times as cheap; 'auto' chooses "
                f"{rows[-1]['chosen']}",
                flush=True,
            )
    return rows


class Tokens(nn.Module):
    """A Transformer encoder with 100 million weights and ten classes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19_500, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12)
        self.head = nn.Linear(768, 10)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def measured(what, n=100, width=256, c=10):
    torch.manual_seed(0)
    if what == "large":
        net, c, n, batch = Tokens(), 10, 256, 128
        x = torch.randint(19_500, (n, 8))
    elif what == "outputs":
        net, c, n, batch = exact_kernel.resnet(16, 1000).eval(), 1000, 64, 64
        x = torch.randn(n, 3, 32, 32)
    else:
        layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, c)
        net, batch, x = nn.Sequential(*layers), 100, torch.randn(n, 784)
    y = torch.arange(n) % c
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    metric = TangentAlignment(net, c, sketch_dim=32)
    start = time.perf_counter()
    for part in torch.arange(n).split(batch):
        metric.update(x[part], y[part])
    value, error = float(metric.compute()), float(metric.standard_error())
    row = {"what": what, "parameters": sum(p.numel() for p in net.parameters()), "outputs": c, "examples": n}
    row |= {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row |= {"before_mib": before, "value": value, "standard_error": error}
    return row


def in_process(what, **sizes):
    """Measure in a process of its own, so that nothing else affects its peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        row = pool.submit(measured, what, **sizes).result()
    print(
        f"{what}: {row['parameters'] / 1e6:.1f} M parameters, {row['outputs']} outputs, {row['examples']} examples: "
        f"{row['seconds']:.0f} s with {row['threads']} threads, peak {row['peak_mib']:.0f} MiB, of which "
        f"{row['before_mib']:.0f} before; alignment {row['value']:.4f} ± {row['standard_error']:.4f}"
    )
    return [row]


def memory():
    sizes = [{"n": 100}, {"n": 1000}, {"n": 10_000}, {"width": 1024}, {"width": 4096}, {"c": 100}, {"c": 1000}]
    return [row for size in sizes for row in in_process("memory", **size)]


PARTS = {
    "samples": lambda _: samples(),
    "hash": lambda args: hashing(args.draws),
    "factored": lambda args: factored(max(8, args.draws // 12)),
    "large": lambda _: in_process("large"),
    "outputs": lambda _: in_process("outputs"),
    "memory": lambda _: memory(),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="run this part alone and keep the rows of the others")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    run_parts(PARTS, args)


if __name__ == "__main__":
    main()
