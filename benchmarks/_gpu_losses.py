"""Steps of training with each loss, over plain ones."""

import math
import statistics

import torch
from _gpu_networks import SIZES, peak, release, reset_peak
from exact_kernel import INPUTS, Transformer, resnet
from losses import LOSSES, STRIDE, Training

METHODS = ("plain", *LOSSES)


def networks(size):
    """Return the networks of this part by name: how to build them, and the shape of an input."""
    resnet_width, width = SIZES["ResNet18"][size], SIZES["Transformer"][size]
    return {
        "ResNet18": (lambda c: resnet(resnet_width, c), INPUTS["resnet"]),
        "Transformer": (lambda c: Transformer(width, c), INPUTS["transformer"]),
    }


def measure(name, network, autocast, batch, device, budget, share, part):
    trainings, memory = {}, {}
    for method in METHODS:
        trainings[method] = Training(network, method, device, batch=batch, autocast=autocast)
        for _ in range(STRIDE):
            trainings[method].step()
        before = reset_peak(device)
        for _ in range(STRIDE):
            trainings[method].step()
        memory[method] = peak(device) - before
    strides, start = {method: [] for method in METHODS}, budget.left
    longest = 0.0
    while len(strides["plain"]) < 20 and (not longest or (start - budget.left + longest < share)):
        before = budget.left
        for method, training in trainings.items():
            strides[method].append([training.step() for _ in range(STRIDE)])
        longest = max(longest, before - budget.left)
    plain = [statistics.mean(steps) for steps in strides["plain"]]
    for method, taken in strides.items():
        part.row(
            network=name,
            precision="float32" if autocast is None else str(autocast).removeprefix("torch."),
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
            share = min(share, 4.0)
        try:
            measure(name, network, autocast, 16 if small else 128, device, budget, share, part)
        except torch.OutOfMemoryError:
            part.skipped(f"{name}, {autocast or 'float32'}", "out of memory")
        release(device)
