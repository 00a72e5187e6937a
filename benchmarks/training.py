"""Measure the effect of the losses on networks with each kind of normalization.

    python benchmarks/training.py [--parts penalty examples cost networks] [--seeds 3] [--into docs/losses.md]

Networks are trained on 1,000 digits, with 797 held out, for 400 steps of 64 images by SGD with learning rate 0.05 and
momentum 0.9 (the Transformer: Adam, 0.003). `labels` is the share of training labels that is redrawn. Losses have their
default options except those named by a column. `accuracy` is the final accuracy in evaluation mode; `by batch` is that
of the same weights normalized by the statistics of the 797 images; `stale` is the mean of |v − s²|/s² over channels,
where v is the running variance and s² that of the training set, and is empty where s² is 0; `diverged` counts the seeds
that ended in NaN or inf.

Part `penalty` uses the complexity penalty on a CNN with BatchNorm (16 and 32 channels), normalized as in training, by
running statistics, or by those of the whole batch as constants (detached). Part `examples` uses batches of 128 and the
penalty on some of them; bias and spread of its value and gradient are over draws of examples and probes, relative to
the mean over all 128. These two parts clip no gradient. Part `cost` shows the cost of an evaluation and its backward
pass, in plain steps, with batch statistics and with running statistics. Part `networks` uses each loss at 0.1, 1 and 3
times its default weight.

Rows are written at once, and the same command continues an interrupted run. --report puts tables between the marks of
the texts named by --into, and trains nothing.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import torch
from _digits import build, cnn, digits, redrawn
from _training_tables import filled, mean
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss
from alignreg.tangents.finite import NonFiniteGradientError, NonFiniteOutputError

LOSSES = {
    "complexity penalty": ComplexityPenalty,
    "alignment": AlignmentLoss,
    "participation ratio": ParticipationRatioLoss,
    "KARE": KARELoss,
}
NOISE = 0.4
ROWS = [
    ("CNN", "BatchNorm", 0),
    ("CNN", "BatchNorm", NOISE),
    ("MLP", "BatchNorm", 0),
    ("MLP", "none", 0),
    ("MLP", "none", NOISE),
    ("ResNet", "BatchNorm", 0),
    ("Transformer", "LayerNorm", 0),
    ("MLP", "LayerNorm", 0),
    ("CNN", "GroupNorm", 0),
    ("MLP", "weight norm", 0),
    ("CNN", "none", 0),
    ("ResNet", "GroupNorm", 0),
    ("CNN", "weight norm", 0),
]
FACTORS = (1, 3, 0.1)
CLEAN_WEIGHTS = (0.001, 0.004, 0.01)
NOISY_WEIGHTS = (0.004, 0.01, 0.02, 0.04, 0.08)
TRAIN, TEST = digits()


def train(model, labels, seed, steps, *, batch=64, adam=False, reg=None, around=lambda _: nullcontext()):
    """Train in place, and return whether a value that is not finite ended the training."""
    images, given = TRAIN[0], redrawn(TRAIN[1], labels, seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.003) if adam else torch.optim.SGD(model.parameters(), 0.05, 0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        loss = cross_entropy(model(images[rows]), given[rows])
        if reg is not None:
            try:
                with around(images[rows]):
                    loss = loss + reg(images[rows], given[rows])
            except (NonFiniteOutputError, NonFiniteGradientError):
                return True
        if not bool(torch.isfinite(loss)):
            return True
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return False


@torch.no_grad()
def outcome(model, *, diverged):
    """Return the results of a trained network."""

    def accuracy(net):
        return round(float((net(TEST[0]).argmax(1) == TEST[1]).float().mean()), 4)

    norms = batch_norms(model)
    found = {"accuracy": accuracy(model.eval())}
    if norms:
        by_batch = deepcopy(model).train()
        found["by_batch"] = accuracy(by_batch)
        with statistics_of(by_batch, TRAIN[0]):
            pairs = zip(norms, batch_norms(by_batch), strict=True)
            off = torch.cat([(old.running_var / new.running_var - 1).abs() for old, new in pairs])
        found["stale"] = float(f"{float(off.mean()):.3g}")
    return {**found, "diverged": diverged}


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@contextmanager
def statistics_of(model, x):
    """Set the running statistics to those of a batch, as constants, inside the block."""
    norms = batch_norms(model)
    before = [(norm.momentum, dict(norm.named_buffers())) for norm in norms]
    for norm, (_, buffers) in zip(norms, before, strict=True):
        norm.momentum = 1.0
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())  # the graph of the task holds the other buffers
    with torch.no_grad():
        model(x)
    try:
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def run_penalty(seed, args, *, labels, weight, normalized_by="batch"):
    torch.manual_seed(seed)
    model = cnn("BatchNorm", (16, 32))
    how = "training" if normalized_by == "batch" else "running"
    reg = ComplexityPenalty(model, weight=weight, seed=seed, statistics=how, clip=None) if weight else None
    detached = {"around": lambda x: statistics_of(model, x)} if normalized_by == "batch, detached" else {}
    return outcome(model, diverged=train(model, labels, seed, args.steps, reg=reg, **detached))


def run_network(seed, args, *, network, normalization, labels, loss, weight):
    torch.manual_seed(seed)
    model = build(network, normalization)
    reg = LOSSES[loss](model, weight=weight, seed=seed) if weight else None
    adam = network == "Transformer"
    return outcome(model, diverged=train(model, labels, seed, args.steps, reg=reg, adam=adam))


def run_examples(seed, args, *, network, normalization, examples):
    """Return accuracies with clean and noisy labels, and the errors of the penalty on some of 128 images."""
    found = {}
    for name, labels, weight in (("clean", 0, 0.01), ("noisy", NOISE, 0.04)):
        torch.manual_seed(seed)
        model = build(network, normalization)
        reg = ComplexityPenalty(model, weight=weight, examples=examples, seed=seed, clip=None)
        diverged = train(model, labels, seed, args.steps, batch=128, reg=reg)
        found[f"accuracy_{name}"] = outcome(model, diverged=diverged)["accuracy"]
    model, every = reference(seed, network, normalization, args.steps, args.draws)
    some = draws(model, examples, args.draws, 1)
    return {**found, **{key: float(f"{value:.3g}") for key, value in off(some, every).items()}}


@cache
def reference(seed, network, normalization, steps, count):
    """Return a network trained without the penalty, and draws of the penalty on all 128 images."""
    torch.manual_seed(seed)
    model = build(network, normalization)
    train(model, NOISE, seed, steps, batch=128)
    return model, draws(model, 128, count, 0)


def draws(model, examples, count, seed):
    """Return values ``(count,)`` and gradients ``(count, P)`` of the penalty at fixed weights on 128 images."""
    x = TRAIN[0][:128]
    reg = ComplexityPenalty(model, weight=1, examples=examples, every_n_steps=1, probes=8, seed=seed)
    parameters = list(model.parameters())
    values, gradients = [], []
    for _ in range(count):
        loss = reg(x)
        found = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        values.append(float(loss.detach()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    return torch.tensor(values), torch.stack(gradients)


def off(some, every):
    """Return bias and spread relative to the mean over all images.

    The squared norm of a mean is the product of the means of two halves of the draws, which is unbiased.
    """

    def square(gradients):
        one, other = gradients.chunk(2)
        return float(one.mean(0) @ other.mean(0))

    (value, gradient), (whole, all_gradients) = some, every
    norm2 = square(all_gradients)
    return {
        "value_bias": float(value.mean() / whole.mean()) - 1,
        "value_spread": float(value.std() / whole.mean()),
        "gradient_bias": (max(square(gradient - all_gradients), 0) / norm2) ** 0.5,
        "gradient_spread": (float(gradient.var(0).sum()) / norm2) ** 0.5,
    }


def run_cost(seed, _args, *, network, normalization, loss):
    """Return the cost of an evaluation and its backward pass, in plain steps of 64 images."""
    torch.manual_seed(seed)
    model = build(network, normalization)
    (x, y), kind = (part[:64] for part in TRAIN), LOSSES[loss]
    regs = {how: kind(model, statistics=how, every_n_steps=1) for how in ("training", "running")}
    calls = {"plain": lambda: cross_entropy(model(x), y), **{how: partial(reg, x, y) for how, reg in regs.items()}}
    taken = {how: [] for how in calls}
    for _ in range(4):
        for how, call in calls.items():
            start = time.process_time()
            call().backward()
            taken[how].append(time.process_time() - start)
    plain, *others = (statistics.median(seconds[1:]) for seconds in taken.values())
    return {how: float(f"{seconds / plain:.3g}") for how, seconds in zip(regs, others, strict=True)}


def penalty_rows():
    for labels, weights in ((0, CLEAN_WEIGHTS), (NOISE, NOISY_WEIGHTS)):
        yield {"labels": labels, "weight": 0}
        for how in ("batch", "running", "batch, detached"):
            yield from ({"labels": labels, "weight": weight, "normalized_by": how} for weight in weights)


def example_rows():
    for network, normalization in (("MLP", "BatchNorm"), ("CNN", "BatchNorm"), ("CNN", "GroupNorm")):
        for examples in (8, 16, 32, 64, 128):
            yield {"network": network, "normalization": normalization, "examples": examples}


def cost_rows():
    for network in ("MLP", "CNN", "ResNet"):
        for loss in LOSSES:
            yield {"network": network, "normalization": "BatchNorm", "loss": loss}


def network_rows():
    """Yield the rows, with all networks at the default weights first."""
    late = []
    for factor in FACTORS:
        for network, normalization, labels in ROWS:
            row = {"network": network, "normalization": normalization, "labels": labels}
            if factor == 1:
                yield {**row, "loss": "none", "weight": 0}
            for loss, kind in LOSSES.items():
                of_loss = {**row, "loss": loss, "weight": round(factor * kind.default_weight, 6)}
                if loss != "KARE" or normalization != "BatchNorm":
                    yield of_loss
                elif factor == 1 and not labels:
                    late.append(of_loss)  # its kernel uses rows of the Jacobian, which is slow
    yield from late


PARTS = {
    "penalty": (penalty_rows, run_penalty, 5),
    "examples": (example_rows, run_examples, 3),
    "cost": (cost_rows, run_cost, 3),
    "networks": (network_rows, run_network, 3),
}


def measure(args, found):
    """Add the missing rows, and write each of them at once."""
    for part in args.parts:
        settings, run, seeds = PARTS[part]
        rows, settings = found.setdefault(part, []), list(settings())
        for index, setting in enumerate(settings, 1):
            if any(setting.items() <= row.items() for row in rows):
                continue
            runs = [run(seed, args, **setting) for seed in range(args.seeds or seeds)]
            row = {**setting, **{key: [r[key] for r in runs] for key in runs[0] if key != "diverged"}}
            if "diverged" in runs[0]:
                row["diverged"] = sum(r["diverged"] for r in runs)
            if not all(map(torch.isfinite, torch.tensor(row.get("stale", [])))):
                row["stale"] = None
            rows.append(row)
            shown = "  ".join(f"{key} {mean(value)}" for key, value in row.items())
            print(f"{part} {index}/{len(settings)}  {shown}", flush=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, help="seeds (default: 5 for penalty, 3 for others)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=100, help="draws of examples and probes, for bias and spread")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--into", type=Path, nargs="+", default=[], metavar="FILE", help="texts to put tables into")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    found = json.loads(args.json.read_text()) if args.json.exists() else {"torch": torch.__version__}
    if not args.report:
        measure(args, found)
    for file in args.into:
        file.write_text(filled(file.read_text(), found))


if __name__ == "__main__":
    main()
