"""Measure time and memory of exact tangent kernels, side by side with torch.func and NNGeometry.

    pip install --no-deps nngeometry
    python benchmarks/exact_kernel.py [--rounds 3] [--threads 1] [--device cpu] [--json benchmarks/exact_kernel.json]

The networks are in evaluation mode, in float32, with c = 10 outputs: an MLP 784-256-256-10 (n = 100); VGG11 of base
width 16 and ResNet18 of width 16 with BatchNorm (n = 50, 3x32x32); a Transformer encoder of 4 layers of width 64
(n = 50, 32 positions).

The methods alternate for the given number of rounds, each in processes of its own. A process computes the kernel once
to warm up, and then three times, unless the first took longer than 20 seconds. A method that is more than ten times
slower than ours in the first round is not run again. Times are the median CPU seconds (on a GPU: seconds); memory is
the peak of the process minus its memory before the first kernel. Two more rows show lower bounds: "J Jᵀ" is the matrix
product alone, given the Jacobian, which every method that forms the Jacobian needs (half of it, by symmetry); "our
products" are the Gram products in our method.

    python benchmarks/exact_kernel.py --growth      how our time grows with n, c and width
    python benchmarks/exact_kernel.py --large       ResNet18 of width 64 (11 M parameters), n = 50, two threads
    python benchmarks/exact_kernel.py --figure PNG  draws an earlier run's json

A peer that does not support a network is omitted there, with the reason. Differences are ‖K − K_func‖ / ‖K_func‖.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

SETTINGS = {
    "MLP": {"network": "mlp", "n": 100},
    "VGG11-16": {"network": "vgg", "n": 50},
    "ResNet18-16": {"network": "resnet", "n": 50},
    "Transformer": {"network": "transformer", "n": 50},
}
METHODS = ["alignreg", "torch.func", "nngeometry", "nngeometry jacobian", "J Jᵀ"]
GROWTH = {
    "n": [25, 50, 100, 200],
    "c": [2, 10, 50],
    "width": [16, 32, 64],
}


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Sequential()
        if stride != 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.skip(x))


def resnet(width, c):
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage, after in enumerate(width * factor for factor in (1, 2, 4, 8)):
        layers += [Block(before, after, 2 if stage else 1), Block(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, c))


def vgg(width, c):
    layers, before = [], 3
    for factor in (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8, None):
        if factor is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, factor * width, 3, padding=1), nn.ReLU()]
            before = factor * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, c))


def mlp(width, c):
    w = 16 * width
    return nn.Sequential(nn.Linear(784, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, c))


class Transformer(nn.Module):
    def __init__(self, width, c):
        super().__init__()
        self.embed = nn.Linear(16, 4 * width)
        layer = nn.TransformerEncoderLayer(4 * width, 4, 16 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(4 * width, c)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


NETWORKS = {"mlp": mlp, "vgg": vgg, "resnet": resnet, "transformer": Transformer}
INPUTS = {"mlp": (784,), "vgg": (3, 32, 32), "resnet": (3, 32, 32), "transformer": (32, 16)}


def problem(network, *, n, c=10, width=16, device="cpu"):
    torch.manual_seed(0)
    model = NETWORKS[network](width, c).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.to(device), torch.randn(n, *INPUTS[network]).to(device)


def by_alignreg(model, x):
    from alignreg import TangentFeatures

    features = TangentFeatures(model)
    return lambda: features.kernel(x).flatten(2).flatten(0, 1)


def rows(model):
    """Return a function that computes the Jacobian at inputs, ``(n, c, *shape)`` for each parameter."""
    from torch.func import functional_call, jacrev, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.backends.mha.set_fastpath_enabled(False)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def run(x):
        # This attention kernel can be vectorized; the default one is slower here.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(params, x)

    return run


def jacobian(model, x):
    run = rows(model)
    return lambda: torch.cat([value.flatten(2) for value in run(x).values()], dim=2).flatten(0, 1)


def by_torch_func(model, x):
    run = jacobian(model, x)

    def kernel():
        J = run()
        return J @ J.T

    return kernel


def by_nngeometry(model, x):
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model)
    loader = DataLoader(TensorDataset(x), batch_size=len(x))

    def run():
        gram = GramMatrix(model, loader, function=lambda *d: model(d[0]), layer_collection=layers)
        return gram.to_torch().permute(1, 0, 3, 2).flatten(2).flatten(0, 1)

    return run


def by_nngeometry_jacobian(model, x):
    from nngeometry.jacobian import Jacobian
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model)
    loader = DataLoader(TensorDataset(x), batch_size=len(x))

    def run():
        J = Jacobian(model, loader, function=lambda *d: model(d[0]), layer_collection=layers).to_torch()
        J = J.transpose(0, 1).flatten(0, 1)
        return J @ J.T

    return run


def by_product_alone(model, x):
    from alignreg.tangents.kernel.gram import rows_gram

    J = jacobian(model, x)().unflatten(0, (len(x), -1))

    def run():
        half = rows_gram([(J, None)])
        return (half + half.permute(2, 3, 0, 1)).flatten(2).flatten(0, 1)

    return run


RUNS = {
    "alignreg": by_alignreg,
    "torch.func": by_torch_func,
    "nngeometry": by_nngeometry,
    "nngeometry jacobian": by_nngeometry_jacobian,
    "J Jᵀ": by_product_alone,
}


def products_alone(counted):
    """Record the time inside our Gram products."""
    from alignreg.tangents.kernel import gradients

    for kind in (gradients.Rows, gradients.OuterProducts):
        inner = kind.gram

        def timed(self, other, limit, inner=inner):
            start = time.process_time()
            value = inner(self, other, limit)
            counted.append(time.process_time() - start)
            return value

        kind.gram = timed


def measure(method, setting, *, threads, device, repeats, out):
    """Return times and memory, and write the kernel to a file; this runs in a process of its own."""
    torch.set_num_threads(threads)
    cuda = device == "cuda"
    counted: list[float] = []
    if method == "our products":
        products_alone(counted)
    model, x = problem(**setting, device=device)
    run = RUNS["alignreg" if method == "our products" else method](model, x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1024
    clock = time.perf_counter if cuda else time.process_time
    times, walls = [], []
    for _ in range(repeats + 1):
        counted.clear()
        start, wall = clock(), time.perf_counter()
        kernel = run()
        if cuda:
            torch.cuda.synchronize()
        times.append(sum(counted) if counted else clock() - start)
        walls.append(time.perf_counter() - wall)
        if walls[0] > 20:
            repeats = 0
            break
    peak = torch.cuda.max_memory_allocated() / 1024 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if out:
        torch.save(kernel.cpu(), out)
    kept = slice(1, None) if repeats else slice(None)
    return {"times": times[kept], "walls": walls[kept], "peak_mib": peak / 1024, "memory_mib": (peak - before) / 1024}


def in_process(method, setting, args, *, repeats=3, out=None):
    job = {"method": method, "setting": setting, "repeats": repeats, "out": out and str(out)}
    job |= {"threads": args.threads, "device": args.device}
    done = subprocess.run(  # noqa: S603 - this file
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"exit {done.returncode}"]
        return {"error": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(args):
    rows = []
    for name, setting in SETTINGS.items():
        if args.only not in (None, name):
            continue
        found: dict[str, dict] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.rounds):
                for method in (*METHODS, "our products"):
                    known = found.get(method)
                    if known and ("error" in known or known["times"][0] > 10 * found["alignreg"]["times"][0]):
                        continue
                    new = in_process(method, setting, args, out=Path(folder) / method.replace(" ", "_"))
                    if method in found and "times" in new:
                        found[method]["times"] += new["times"]
                        found[method]["memory_mib"] = max(found[method]["memory_mib"], new["memory_mib"])
                    else:
                        found[method] = new
            kernels = {
                method: torch.load(Path(folder) / method.replace(" ", "_"))
                for method in METHODS
                if "times" in found[method]
            }
        for method, result in found.items():
            row = {"network": name, "method": method}
            if "error" in result:
                row["error"] = result["error"]
            else:
                row["seconds"] = statistics.median(result["times"])
                row["memory_mib"] = result["memory_mib"]
                if method in kernels:
                    reference = kernels["torch.func"].double()
                    row["difference"] = float((kernels[method].double() - reference).norm() / reference.norm())
            rows.append(row)
        report(rows[-len(found) :])
    return rows


def report(rows):
    ours = next(row for row in rows if row["method"] == "alignreg")
    print(f"{rows[0]['network']}\n{'':22}   seconds     ratio   memory MiB   ratio   difference")
    for row in rows:
        if "error" in row:
            print(f"  {row['method']:20}   {row['error']}")
            continue
        line = f"  {row['method']:20} {row['seconds']:9.3f}  {row['seconds'] / ours['seconds']:7.2f}x"
        if "difference" in row and row["method"] != "J Jᵀ":
            line += f"   {row['memory_mib']:9.0f}  {row['memory_mib'] / max(1, ours['memory_mib']):6.2f}x"
            line += f"   {row['difference']:.1e}"
        print(line)
    peers = [row for row in rows if row["method"].startswith(("torch", "nng")) and "seconds" in row]
    best = min(peers, key=lambda row: row["seconds"])
    print(f"  {best['seconds'] / ours['seconds']:.1f}x the best peer ({best['method']})\n", flush=True)


def growth(args):
    """Measure our kernel on ResNet18 with BatchNorm, varying one size at a time from n = 50, c = 10, width 16."""
    rows = []
    for size, values in GROWTH.items():
        times = []
        for value in values:
            setting = {"network": "resnet", "n": 50, "c": 10, "width": 16} | {size: value}
            result = in_process("alignreg", setting, args, repeats=2)
            times.append(statistics.median(result["times"]))
            rows.append({**setting, "varied": size, "seconds": times[-1], "memory_mib": result["memory_mib"]})
            print(f"{size:6} = {value:4}: {times[-1]:8.2f} s, {result['memory_mib']:6.0f} MiB", flush=True)
        logs = [(math.log(value), math.log(t)) for value, t in zip(values, times, strict=True)]
        mean = [sum(part) / len(logs) for part in zip(*logs, strict=True)]
        slope = sum((a - mean[0]) * (b - mean[1]) for a, b in logs) / sum((a - mean[0]) ** 2 for a, _ in logs)
        last = (logs[-1][1] - logs[-2][1]) / (logs[-1][0] - logs[-2][0])
        rows.append({"varied": size, "exponent": slope, "exponent_of_the_last_two": last})
        print(
            f"{size:6}: seconds grow like {size}^{slope:.2f}; between the last two like {size}^{last:.2f}\n", flush=True
        )
    return rows


def large(args):
    args.threads = 2
    setting = {"network": "resnet", "n": 50, "c": 10, "width": 64}
    result = in_process("alignreg", setting, args)
    row = {**setting, "threads": 2, "wall_seconds": result["walls"][-1], "cpu_seconds": result["times"][-1]}
    row |= {"peak_mib": result["peak_mib"], "memory_mib": result["memory_mib"]}
    print(
        f"ResNet18-64, n = 50, c = 10, 2 threads: {row['wall_seconds']:.1f} s, peak of the process "
        f"{row['peak_mib']:.0f} MiB, {row['memory_mib']:.0f} of them for the kernel"
    )
    return row


def figure(rows, path):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    methods = ["alignreg", "torch.func", "nngeometry jacobian", "nngeometry"]
    for axis, key, label in ((axes[0], "seconds", "CPU seconds"), (axes[1], "memory_mib", "peak memory, MiB")):
        for shift, method in enumerate(methods):
            values = [
                next((r.get(key, math.nan) for r in rows if r["network"] == name and r["method"] == method), math.nan)
                for name in SETTINGS
            ]
            axis.bar([i + 0.21 * (shift - 1.5) for i in range(len(values))], values, 0.2, label=method)
        axis.set(yscale="log", ylabel=label)
        axis.set_xticks(range(len(SETTINGS)), list(SETTINGS))
    axes[0].legend()
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=SETTINGS, help="run this network alone and keep the rows of the others")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(**json.loads(args.job))))
        return
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.figure:
        figure(known["compare"]["rows"], args.figure)
        return
    name, run = ("growth", growth) if args.growth else ("large", large) if args.large else ("compare", compare)
    rows = run(args)
    if args.only:
        rows = [row for row in known.get(name, {}).get("rows", []) if row["network"] != args.only] + rows
    result = {"torch": torch.__version__, "device": args.device, "threads": args.threads, "rows": rows}
    args.json.write_text(json.dumps({**known, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
