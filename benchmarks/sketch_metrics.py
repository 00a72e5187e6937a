"""Measure the error and the cost of sketched metrics.

    python benchmarks/sketch_metrics.py [--part error|pilot|cost|sharing|layers] [--json benchmarks/sketch_metrics.json]

error    compares alignment, trace and participation ratio from m = 16, 32, 64, 128 Gaussian directions with the exact
         kernel, computed in blocks, in one pass over the 1,797 digits in shuffled batches of 100; the 400 draws of each
         come from one large pushforward. The networks are an MLP 64-256-10 and a small CNN, at initialization and
         trained; they also run on 1,000 digits in which class k is 2^(-k/3) times as frequent as class 0. ResNet18 of
         width 16 with BatchNorm runs on 100 digits enlarged to 3x32x32.
pilot    measures the same for 64 directions, half of them from a pilot and the others random signs.
cost     measures the CPU time of that pass in forward and backward passes of the same batches, side by side.
sharing  measures the CPU time of updates of one, two and three metrics in a MetricCollection, from the second update.
layers   compares layer-wise alignment from m probes with the exact one, for VGG11 of base width 16 on digits enlarged
         to 3x32x32.

Errors are relative to the exact value. The rows show their mean over the draws, their spread (root mean square), the
mean standard error that the metric reports, and the share of draws in which ± 2 standard errors cover the exact value.
All parts use one thread and float32.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import exact_kernel
import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torchmetrics import MetricCollection

from alignreg import TangentFeatures, moments, sketches
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentParticipationRatio, TangentTrace, pilot
from alignreg.sketches.directions import JoinedDirections

SIZES = (16, 32, 64, 128)
STATISTICS = {"alignment": TangentAlignment, "trace": TangentTrace, "participation_ratio": TangentParticipationRatio}


def digits(balanced=True):
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    if balanced:
        rows = torch.randperm(len(x), generator=generator)
    else:
        weights = 2.0 ** (-torch.arange(10) / 3)
        rows = torch.multinomial(weights[y], 1000, generator=generator)
    return x[rows], y[rows]


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn():
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def train(net, x, y, steps):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        rows = torch.arange(64 * step, 64 * step + 64) % len(x)
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net


def exact(net, x, y, step=300):
    """Return all three statistics from blocks of the exact kernel, in float64."""
    features = TangentFeatures(net.double())
    x, n = x.double(), len(x)
    target = torch.nn.functional.one_hot(y, 10).double()
    target = target - target.mean(0)
    square = torch.zeros(10, 10, dtype=torch.float64)  # ‖K_kl‖², output by output
    sums = torch.zeros(n, 10, 10, dtype=torch.float64)  # Σ_j K[i, k, j, l]
    trace = numerator = 0.0
    for i in range(0, n, step):
        for j in range(0, i + 1, step):
            K = features.kernel(x[i : i + step], None if i == j else x[j : j + step])
            twice = 1 if i == j else 2
            part = K.square().sum((0, 2))
            square += part if i == j else part + part.T
            sums[i : i + step] += K.sum(2)
            if i != j:
                sums[j : j + step] += K.sum(0).permute(1, 2, 0)
            else:
                trace += float(torch.einsum("ikik->", K))
            numerator += twice * float(torch.einsum("ik,ikjl,jl->", target[i : i + step], K, target[j : j + step]))
    net.float()
    # ‖C K_kl C‖² = ‖K_kl‖² − 2/n ‖K_kl 1‖² + (1ᵀK_kl 1)²/n² summed over k, l, and tr C K_kk C = tr K_kk − 1ᵀK_kk 1 / n.
    total = sums.sum(0)
    norm2 = float(square.sum() - 2 / n * sums.square().sum() + total.square().sum() / n**2)
    trace -= float(total.diagonal().sum()) / n
    alignment = numerator / (norm2**0.5 * float(target.square().sum()))
    return {"alignment": alignment, "trace": trace, "participation_ratio": trace**2 / norm2}


def enlarged(x):
    return interpolate(x.reshape(-1, 1, 8, 8), size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def resnet():
    return nn.Sequential(Enlarge(), exact_kernel.resnet(16, 10))


class Enlarge(nn.Module):
    def forward(self, x):
        return enlarged(x)


def error(args):
    return errors(args, SIZES, pilots=False)


def with_pilot(args):
    return errors(args, (64,), pilots=True)


def errors(args, sizes, *, pilots):
    rows = []
    settings = [("MLP", mlp, 0, True), ("MLP", mlp, 500, True), ("CNN", cnn, 0, True), ("CNN", cnn, 500, True)]
    settings += [("MLP, unbalanced", mlp, 500, False), ("CNN, unbalanced", cnn, 500, False)]
    settings += [("ResNet18-16, 100 digits", resnet, 0, True), ("ResNet18-16, 100 digits", resnet, 60, True)]
    for name, build, steps, balanced in settings:
        x, y = digits(balanced)
        torch.manual_seed(0)
        net = train(build(), x, y, steps).eval()
        if build is resnet:
            x, y = x[:100], y[:100]
        truth = exact(net, x, y)
        features = TangentFeatures(net)
        target = torch.nn.functional.one_hot(y, 10).double()
        batches = list(zip(x.split(100), target.split(100), strict=True))
        S = (sketches.rademacher if pilots else sketches.gaussian)(args.draws * sizes[-1], seed=1)
        Q = pilot.of(features, batches[0][0][: pilot.EXAMPLES], sizes[-1] // 2, S, centered=True)
        known = {m: pilot.most(pilots, m) for m in sizes}
        draws = {m: [None] * args.draws for m in sizes}
        for inputs, values in track(batches, description=f"{name}, {steps} steps"):
            z = features.pushforward(inputs, JoinedDirections(Q.directions, S))
            mean = values.mean(0)
            back = features.pullback(inputs, (values - mean)[None])
            flat = torch.cat([value.flatten() for value in back.values()])
            for m, sums in draws.items():
                for d, before in enumerate(sums):
                    random = z[..., Q.directions.m + d * m :][..., : m - known[m]]
                    some = torch.cat([z[..., : known[m]], random], dim=-1)
                    new = moments.of(some, values, pullback=flat, guess=mean)
                    sums[d] = new if before is None else before.merge(new)
        for m, sums in draws.items():
            for d, some in enumerate(sums):
                sums[d] = some.deflated(Q.overlap[: known[m], d * m :][:, : m - known[m]])
        for statistic, kind in STATISTICS.items():
            for m, sums in draws.items():
                value = torch.stack([getattr(moments, statistic)(some, exact=known[m]) for some in sums])
                value = value / truth[statistic] - 1
                error = kind(net, 10, sketch_dim=m, pilot=pilots)._error  # noqa: SLF001 - the sums are computed here
                bars = torch.stack([error(some) for some in sums])
                bars = bars / truth[statistic]
                row = {
                    "network": name,
                    "steps": steps,
                    "statistic": statistic,
                    "m": m,
                    "pilot": known[m],
                    "exact": truth[statistic],
                    "mean_error": float(value.mean()),
                    "z": float(value.mean() / (value.std() / args.draws**0.5)),
                    "spread": float(value.square().mean().sqrt()),
                    "mean_standard_error": float(bars.mean()),
                    "coverage": float((value.abs() <= 2 * bars).double().mean()),
                }
                rows.append(row)
                print(
                    f"{name:16} {steps:4} steps {statistic:20} m={m:<4} pilot {known[m]:<3} "
                    f"exact {row['exact']:<9.4g} mean error "
                    f"{row['mean_error']:+7.2%} (z {row['z']:+5.1f})  spread {row['spread']:6.2%}  mean s.e. "
                    f"{row['mean_standard_error']:6.2%}  within 2 s.e. {row['coverage']:6.1%}",
                    flush=True,
                )
    return rows


def cpu_seconds(call, *args):
    start = time.process_time()
    call(*args)
    return time.process_time() - start


def forward_backward(net, batches):
    for inputs, target in batches:
        net.zero_grad()
        cross_entropy(net(inputs), target).backward()


def show(metric, batches):
    metric.reset()
    for inputs, target in batches:
        metric.update(inputs=inputs, target=target)


def cost(args):
    rows = []
    for name, build in (("MLP", mlp), ("CNN", cnn)):
        x, y = digits()
        batches = list(zip(x.split(100), y.split(100), strict=True))
        net = build()
        metrics = {m: TangentAlignment(net, 10, sketch_dim=m) for m in SIZES}
        times = {key: [] for key in ("plain", *SIZES)}
        for _ in range(args.repeats):
            passes = [cpu_seconds(forward_backward, net, batches) for _ in range(5)]
            times["plain"].append(statistics.median(passes))
            for m, metric in metrics.items():
                times[m].append(cpu_seconds(show, metric, batches))
        plain = statistics.median(times["plain"])
        for m in SIZES:
            ratio = statistics.median(a / b for a, b in zip(times[m], times["plain"], strict=True))
            rows.append({"network": name, "m": m, "seconds": statistics.median(times[m]), "passes": ratio})
            print(
                f"{name:4} m={m:<4} {rows[-1]['seconds']:6.2f} s, {ratio:6.1f} forward and backward passes "
                f"({ratio / m:.2f} a direction; one pass {plain:.4f} s)",
                flush=True,
            )
    return rows


def sharing(args):
    rows = []
    x, y = digits()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    for name, build in (("MLP", mlp), ("CNN", cnn)):
        net = build()
        kinds = [TangentAlignment, TangentTrace, TangentParticipationRatio]
        collections = {k: MetricCollection([kind(net, 10) for kind in kinds[:k]]) for k in (1, 2, 3)}
        for collection in collections.values():
            collection.update(*batches[0])
        times = {k: [] for k in collections}
        for _ in range(args.repeats):
            for k, collection in collections.items():
                times[k].append(cpu_seconds(show, collection, batches))
        for k in (2, 3):
            ratio = statistics.median(a / b for a, b in zip(times[k], times[1], strict=True))
            rows.append({"network": name, "metrics": k, "ratio_to_one": ratio})
            print(f"{name:4} {k} metrics in a collection: {ratio:.3f}x one", flush=True)
    return rows


def layers(args):
    rows = []
    pixels, y = digits()
    x = interpolate(pixels, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    torch.manual_seed(0)
    net = exact_kernel.vgg(16, 10)
    for steps in (0, 300):
        if steps:
            train(net, x, y, steps)
        for n in (50, 200):
            inputs, target = x[:n], y[:n]
            batches = list(zip(inputs.split(50), target.split(50), strict=True))
            reference = LayerwiseAlignment(net, 10, max_examples=n)
            show(reference, batches)
            start = time.process_time()
            truth = reference.compute()
            exact_seconds = time.process_time() - start
            plain = statistics.median(cpu_seconds(forward_backward, net, batches) for _ in range(5))
            print(f"{steps} steps, n = {n}: exact {exact_seconds:.2f} s, {exact_seconds / plain:.1f} passes")
            for m in (8, 16, 32, 64):
                errors, bars, hits, seconds = [], [], [], []
                for seed in range(args.seeds):
                    metric = LayerwiseAlignment(
                        net, 10, max_examples=n, method="sketch", probes=m, seed=seed, return_std_error=True
                    )
                    show(metric, batches)
                    start = time.process_time()
                    found = metric.compute()
                    seconds.append(time.process_time() - start)
                    errors.append([float(found[layer].value / truth[layer] - 1) for layer in truth])
                    bars.append([float(found[layer].standard_error / truth[layer]) for layer in truth])
                    hits.append([abs(e) <= 2 * b for e, b in zip(errors[-1], bars[-1], strict=True)])
                error, bar = torch.tensor(errors), torch.tensor(bars)
                row = {
                    "steps": steps,
                    "n": n,
                    "m": m,
                    "mean_error": float(error.mean()),
                    "spread": float(error.square().mean().sqrt()),
                    "spread_of_the_worst_layer": float(error.square().mean(0).max().sqrt()),
                    "mean_standard_error": float(bar.mean()),
                    "coverage": float(torch.tensor(hits).double().mean()),
                    "seconds": statistics.median(seconds),
                    "passes": statistics.median(seconds) / plain,
                    "exact_seconds": exact_seconds,
                    "exact_passes": exact_seconds / plain,
                }
                rows.append(row)
                print(
                    f"  m={m:<3} mean error {row['mean_error']:+7.2%}  spread {row['spread']:6.2%} (worst layer "
                    f"{row['spread_of_the_worst_layer']:6.2%})  mean s.e. {row['mean_standard_error']:6.2%}  within 2 "
                    f"s.e. {row['coverage']:6.1%}  {row['seconds']:6.2f} s, {row['passes']:5.1f} passes",
                    flush=True,
                )
    return rows


PARTS = {"error": error, "pilot": with_pilot, "cost": cost, "sharing": sharing, "layers": layers}


def run_parts(parts, args):
    """Run one part or all, write the rows of each at once, and keep the rows of the other parts."""
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in [args.part] if args.part else parts:
        known[name] = parts[name](args)
        args.json.write_text(json.dumps({**known, "torch": torch.__version__}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="run this part alone and keep the rows of the others")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    run_parts(PARTS, args)


if __name__ == "__main__":
    main()
