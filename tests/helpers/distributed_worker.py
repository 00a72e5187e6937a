"""One of two gloo processes: `python distributed_worker.py RANK STORE OUT`. Writes what it found as json."""

import copy

import torch
from cases import build
from metric_rows import METRICS, feed, numbers, problem
from notices import told
from ranks import report
from shards import shard, shard_at_once
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.metrics import (
    LayerwiseAlignment,
    PathComplexity,
    TangentAlignment,
)


def alignment(rank):
    """Constant on the whole: the error leaves every rank with its own sums, ready to go on."""
    found = {}
    model, x, y, _ = problem(110)
    cuts = [slice(start, start + 20) for start in range(20 * rank, 110, 40)]
    metric = TangentAlignment(nn.parallel.DistributedDataParallel(model), 3, sketch_dim=16)
    metric.update(x[cuts[0]], torch.ones(20, dtype=torch.long))
    count = copy.deepcopy(metric.metric_state)
    for call in (metric.compute, metric.standard_error):
        try:
            call()
        except ValueError as error:
            found["constant"] = str(error)
        for key, state in metric.metric_state.items():
            torch.testing.assert_close(state, count[key], rtol=0, atol=0)
    metric.reset()
    for cut in cuts:
        metric.update(x[cut], y[cut])
    found["after constant"] = float(metric.compute())
    return found


PROBE_SETS = [name for name, row in METRICS.items() if "max_examples" in row.different]


def probe_sets(rank):
    """More examples than are kept, handed out in turn."""
    found = {}
    _, x, y, _ = problem(110)
    for name in PROBE_SETS:
        metric = METRICS[name].make(nn.parallel.DistributedDataParallel(replica()), max_examples=30)
        found[f"{name}/in turn"] = numbers(feed(metric, x[rank::2], y[rank::2], size=11).compute())
    return found


def replica():
    torch.manual_seed(0)
    return build("mlp")[0].double()


def batch(rank, step, n=12):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def walk(rank, share, each_step, wrap=lambda model: model):
    """PathComplexity along steps of SGD, which is shown a rank's share of the batches of each moment; and its model."""
    model = replica()
    metric, optimizer = PathComplexity(wrap(model)), torch.optim.SGD(model.parameters(), 0.1)
    for step in range(7):
        for index, inputs in enumerate(batch(0, 50)[0].split(4)):
            mine = {
                "whole": True,
                "even": index % 2 == rank,
                "uneven": (index == 2) == (rank == 1),
                "empty": rank == 0,
                "now and then": rank == (index == 2 and step % 3 == 1),
            }[share]
            if mine:
                metric.update(inputs)
        x, y = batch(0, step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if each_step:
            metric.step()
    return metric, model


def path(rank):
    """The same walk on both ranks, with batches of a moment shared in several ways."""
    found = {}
    for share in ("even", "uneven", "empty", "now and then"):
        for each_step in (False, True):
            metric, model = walk(rank, share, each_step, nn.parallel.DistributedDataParallel)
            found[f"path/{share}/{each_step}"] = [float(metric.compute()), metric.history().traces.tolist()]
            found[f"path/{share}/{each_step}/again"] = float(metric.compute())
    x, _ = batch(0, 0)
    metric = PathComplexity(model)
    metric.update(x)
    with torch.no_grad():
        model[0].weight += 1 + rank
    metric.update(x)
    try:
        metric.compute()
    except RuntimeError as error:
        found["path/parted"] = str(error)
    return found


SKETCHES = [row for row in METRICS.values() if row.of.number and row.scalar and "method" not in row.options]


def sharded(rank):
    """Sketch metrics of models under fully_shard, beside those of the whole model; batches of different sizes."""
    found = {}
    for name in ("mlp", "resnet, batchnorm", "transformer, dict output", "frozen backbone"):
        for how in (shard_at_once, shard):
            values = {}
            for wrap in (lambda model: model, how):
                model, x, forward_fn = build(name)
                n, model = len(x), wrap(model.double())
                x = x if x.dtype == torch.long else x.double()
                own = slice(0, 1) if rank else slice(1, n)
                for metric in [row.make(model, forward_fn=forward_fn) for row in SKETCHES]:
                    metric.update(x[own], (torch.arange(n) % 3)[own])
                    model(x[own])  # leaves parameters of a sharded model whole
                    metric.update(x[:2], torch.arange(2))
                    values.setdefault(wrap, []).append((float(metric.compute()), float(metric.standard_error())))
            # A pilot may leave no error to the sketch but that of rounding.
            found[f"sharded/{name}/{how.__name__}"] = max(
                max(abs(one - two), abs(error - other)) / abs(one)
                for (one, error), (two, other) in zip(*values.values(), strict=True)
            )
    model = shard(replica())
    metric = TangentAlignment(model, 3, sketch_dim=8)
    _, x, y, _ = problem(110)
    metric.update(x, y)
    before = float(metric.compute())
    cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with told() as messages:
        metric.update(x, y)
    found["sharded/changed"] = [message for message in messages if "weights changed" in message]
    metric.reset()
    metric.update(x, y)
    found["sharded/moved"] = abs(float(metric.compute()) - before)
    found["sharded/refused"] = []
    for make in (lambda: LayerwiseAlignment(model, 3), lambda: TangentAlignment(model, 3, method="exact")):
        try:
            make()
        except TypeError as error:
            found["sharded/refused"].append(str(error))
    return found


def work(rank, _):
    return {**alignment(rank), **probe_sets(rank), **path(rank), **sharded(rank)}


if __name__ == "__main__":
    report(work)
