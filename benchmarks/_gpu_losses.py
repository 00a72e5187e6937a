"""Training steps with each loss, relative to plain steps."""

import math
import statistics

import torch
from _gpu_networks import SIZES, peak, release, reset_peak
from exact_kernel import INPUTS, Transformer, resnet
from losses import LOSSES, STRIDE, Training

METHODS = ("plain", *LOSSES)
EXPECTED = {("ResNet18", "kare"): 500.0}
"""Expected plain steps per step: with batch statistics KARE needs the rows of the whole Jacobian."""


def networks(size):
    """Return the constructor and the input shape of each network, by name."""
    resnet_width, width = SIZES["ResNet18"][size], SIZES["Transformer"][size]
    return {
        "ResNet18": (lambda c: resnet(resnet_width, c), INPUTS["resnet"]),
        "Transformer": (lambda c: Transformer(width, c), INPUTS["transformer"]),
    }


def begin(name, network, autocast, batch, device, share, note):
    """Return the training and the memory of each method; record the methods that are too slow."""
    trainings, memory, plain = {}, {}, 0.0
    for method in METHODS:
        expected = EXPECTED.get((name, method), 0.0)
        if expected * plain > share:
            note(method, f"a step needs about {expected:.0f} plain steps")
            continue
        training = Training(network, method, device, batch=batch, autocast=autocast)
        before = reset_peak(device)
        first = training.step()  # applies the loss
        memory[method] = max(0.0, peak(device) - before)
        if method != "plain" and 3 * first > share / len(METHODS):
            note(method, f"the first step took {first:.1f} s")
            continue
        taken = [training.step() for _ in range(2 * STRIDE - 1)]
        if method == "plain":
            plain = statistics.median(taken)
        trainings[method] = training
    return trainings, memory


def measure(name, network, autocast, batch, device, budget, share, part):
    fixed = {"network": name, "precision": "float32" if autocast is None else str(autocast).removeprefix("torch.")}

    def note(method, why):
        part.row(**fixed, method=method, batch=batch, not_run=why)

    start = budget.left
    trainings, memory = begin(name, network, autocast, batch, device, share, note)
    strides = {method: [] for method in trainings}
    longest = 0.0
    while len(strides["plain"]) < 20 and (not longest or start - budget.left + longest < share):
        before = budget.left
        for method, training in trainings.items():
            strides[method].append([training.step() for _ in range(STRIDE)])
        longest = max(longest, before - budget.left)
    plain = [statistics.mean(steps) for steps in strides["plain"]]
    for method, taken in strides.items():
        part.row(
            **fixed,
            method=method,
            batch=batch,
            ms_a_step=1000 * statistics.median(statistics.mean(steps) for steps in taken),
            over_a_stride=statistics.median(statistics.mean(s) / p for s, p in zip(taken, plain, strict=True)),
            where_applied=statistics.median(s[0] / p for s, p in zip(taken, plain, strict=True)),
            memory_mib=memory[method],
        )
    losses = {method: training.last for method, training in trainings.items()}
    finite = all(math.isfinite(value) for value in losses.values())
    part.check(f"{name}, {autocast or 'float32'}: losses are finite", 0.0 if finite else math.nan, 0.0)


def run(device, small, budget, part):
    """Run this part."""
    settings = [
        (name, network, autocast)
        for autocast in (None, torch.bfloat16)
        for name, network in networks("small" if small else "full").items()
    ]
    for place, (name, network, autocast) in enumerate(settings):
        if not budget.allows(5):
            part.skipped(f"{name}, {autocast or 'float32'}", "no time left")
            continue
        share = 0.8 * budget.left / (len(settings) - place)
        if small:
            share = min(share, 8.0)
        try:
            measure(name, network, autocast, 16 if small else 128, device, budget, share, part)
        except torch.OutOfMemoryError:
            part.skipped(f"{name}, {autocast or 'float32'}", "out of memory")
        release(device)
