"""The cost of updates of TangentAlignment, in forward and backward passes of the same batch."""

import statistics
from unittest import mock

import torch
from _gpu_networks import NETWORKS, forward_backward, labels, peak, problem, release, reset_peak, seconds

from alignreg import sketches
from alignreg.metrics import TangentAlignment

M = 64
BATCH = {"GPT": 8}
"""Examples per batch; 64 for the other networks."""


def directions_at_a_time(run):
    """Return the largest number of directions that are drawn at once."""
    block, most = sketches.RandomDirections.block, []

    def noted(self, name, like, start, stop):
        most.append(stop - start)
        return block(self, name, like, start, stop)

    with mock.patch.object(sketches.RandomDirections, "block", noted):
        run()
    return max(most)


def repeated(run, device, budget, most=5):
    """Return the median time of up to ``most`` repeats, and at least one."""
    times = [seconds(run, device)]
    while len(times) < most and budget.allows(2 * times[0]) and sum(times) < 3:
        times.append(seconds(run, device))
    return statistics.median(times)


def measure(network, size, m, device, budget, part):
    n = BATCH.get(network, 64) if size == "full" else 8
    model, x = problem(network, n, size, device)
    y = labels(n, device)
    task = forward_backward(model, x, y)
    task()
    before = reset_peak(device)
    unit = repeated(task, device, budget)
    task_memory = max(0.0, peak(device) - before)
    model.zero_grad(set_to_none=True)
    metric = TangentAlignment(model, 10, sketch_dim=m).to(device)
    at_a_time = directions_at_a_time(lambda: metric.update(x, y))
    before = reset_peak(device)
    taken = repeated(lambda: metric.update(x, y), device, budget)
    part.row(
        network=network,
        n=n,
        m=m,
        seconds=taken,
        passes=taken / unit,
        passes_a_direction=taken / unit / m,
        directions_at_a_time=at_a_time,
        memory_mib=max(0.0, peak(device) - before),
        memory_of_a_pass_mib=task_memory,
    )


def run(device, small, budget, part):
    """Run this part."""
    for network in NETWORKS:
        if not budget.allows(4):
            part.skipped(network, "no time left")
            continue
        try:
            measure(network, "small" if small else "full", 8 if small else M, device, budget, part)
        except torch.OutOfMemoryError:
            part.skipped(network, "out of memory")
        release(device)
