"""Measure the cost of a training step with each loss, beside a plain step and the exact kernel of torch.func.

    python benchmarks/losses.py [--repeats 5] [--threads 1] [--device cpu] [--json benchmarks/losses.json]

A step is one forward and backward pass of 128 examples and an update by SGD, for an MLP 784-256-256-10 and ResNet18 of
width 16 with BatchNorm, in training mode and float32, with c = 10. Losses have their default options. In each repeat
the methods alternate, each with one whole stride, the number of steps in which a loss applies once. The rows show the
mean over a stride and the applied step alone, each as the median over repeats, relative to plain steps of the same
repeat. "torch.func" is the alignment loss from the exact kernel of as many examples at the same stride, computed by
`vmap(jacrev)` and a matrix product and differentiated twice. Times are CPU seconds (on a GPU: seconds). Memory is the
peak of a separate process that runs one step, minus that of a plain step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from exact_kernel import resnet
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy

from alignreg import functional
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss

BATCH = 128
LOSSES = {
    "complexity": ComplexityPenalty,
    "alignment": AlignmentLoss,
    "participation ratio": ParticipationRatioLoss,
    "kare": KARELoss,
}
METHODS = ("plain", *LOSSES, "torch.func")
STRIDE, EXAMPLES = 3, 32


def mlp(c):
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, c)]
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {
    "MLP": (mlp, (1, 28, 28)),
    "ResNet18-16": (lambda c: resnet(16, c), (3, 32, 32)),
}


class ByTorchFunc:
    """The alignment loss, written with torch.func."""

    def __init__(self, net):
        self.net, self.step = net, 0

    def __call__(self, x, y):
        self.step += 1
        if (self.step - 1) % STRIDE:
            return 0.0
        x, y = x[:EXAMPLES], y[:EXAMPLES]
        params, buffers = dict(self.net.named_parameters()), dict(self.net.named_buffers())
        training = self.net.training
        self.net.eval()

        def outputs(p, one):
            return functional_call(self.net, {**p, **buffers}, (one[None],))[0]

        jac = vmap(jacrev(outputs), (None, 0))(params, x)
        self.net.train(training)
        flat = torch.cat([value.flatten(0, 1).flatten(1) for value in jac.values()], dim=1)
        kernel = (flat @ flat.T).reshape(len(x), -1, len(x), flat.shape[0] // len(x))
        return -STRIDE * 0.1 * functional.alignment(kernel, y).log()


class Training:
    """Timed training steps with one method."""

    def __init__(self, network, method, device, *, batch=BATCH, autocast=None):
        build, shape = network
        torch.manual_seed(0)
        self.net = build(10).to(device).train()
        self.x, self.y = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-3, 0.9)
        # A tiny weight costs the same and keeps the networks together.
        self.reg = None
        if method == "torch.func":
            self.reg = ByTorchFunc(self.net)
        elif method != "plain":
            self.reg = LOSSES[method](self.net, weight=1e-6).to(device)
        self.device, self.autocast = device, autocast
        self.last = None

    def step(self):
        start = self.clock()
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            loss = cross_entropy(self.net(self.x), self.y)
            if self.reg is not None:
                loss = loss + self.reg(self.x, self.y)
        loss.backward()
        self.optimizer.step()
        taken = self.clock() - start
        self.last = float(loss.detach())
        return taken

    def clock(self):
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def peak(network, method, device):
    """Return the peak memory of the first step, in MiB."""
    training = Training(NETWORKS[network], method, device)
    if device == "cpu":
        training.step()
        # The maximum of getrusage would include the memory of the parent process.
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    torch.cuda.reset_peak_memory_stats()
    training.step()
    return torch.cuda.max_memory_allocated() / 2**20


def memory(network, method, args):
    command = [sys.executable, __file__, "--peak", network, method, "--threads", str(args.threads)]
    result = subprocess.run([*command, "--device", args.device], check=True, capture_output=True, text=True)  # noqa: S603
    return float(result.stdout)


def measure(network, args):
    trainings = {method: Training(NETWORKS[network], method, args.device) for method in METHODS}
    for training in trainings.values():
        for _ in range(STRIDE):
            training.step()
    from rich.progress import track

    strides = {method: [] for method in METHODS}
    for _ in track(range(args.repeats), description=network):
        for method, training in trainings.items():
            strides[method].append([training.step() for _ in range(STRIDE)])
    plain = [statistics.mean(steps) for steps in strides["plain"]]
    rows, base = [], memory(network, "plain", args)
    for method, taken in strides.items():
        row = {
            "network": network,
            "method": method,
            "seconds": statistics.median(statistics.mean(steps) for steps in taken),
            "stride": statistics.median(statistics.mean(s) / p for s, p in zip(taken, plain, strict=True)),
            "applied": statistics.median(s[0] / p for s, p in zip(taken, plain, strict=True)),
            "memory_mib": memory(network, method, args) - base,
        }
        rows.append(row)
        print(
            f"{network:12} {method:20} {1e3 * row['seconds']:8.2f} ms a step  {row['stride']:5.2f}x plain over a "
            f"stride  {row['applied']:6.2f}x where applied  {row['memory_mib']:+7.0f} MiB",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(*args.peak, args.device))
        return
    rows = [row for network in NETWORKS for row in measure(network, args)]
    result = {"torch": torch.__version__, "device": args.device, "threads": args.threads, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
