"""One of two gloo processes: `python distributed_worker.py RANK STORE OUT`. Writes what it found as json."""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import oracles
import torch
import torch.distributed as dist
from cases import build
from shards import shard, shard_at_once
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg.metrics import (
    LayerwiseAlignment,
    PathComplexity,
    TangentAlignment,
    TangentParticipationRatio,
    TangentSpectrum,
    TangentTrace,
)

SKETCHES = {
    "alignment": (TangentAlignment, {}),
    "unbiased": (TangentAlignment, {"unbiased": True}),
    "factored": (TangentAlignment, {"sketch": "factored"}),
    "trace": (TangentTrace, {}),
    "ratio": (TangentParticipationRatio, {}),
}


def shares(n, uneven):
    """Batches of 20 by rank: even, uneven, or none on rank 1."""
    cuts = [slice(i, min(i + 20, n)) for i in range(0, n, 20)]
    if uneven == "even":
        return [cuts[0::2], cuts[1::2]]
    return [cuts[:4], cuts[4:]] if uneven == "uneven" else [cuts, []]


def alignment(rank):
    model, _, _ = build("mlp")
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(110, 4, dtype=torch.float64, generator=generator)
    y = torch.arange(110) % 7 % 3
    wrapped = nn.parallel.DistributedDataParallel(model)
    exact = oracles.alignment(oracles.jacobian(model, x), oracles.one_hot(y, 3))
    found = {"oracle": exact}
    for method in ("sketch", "exact"):
        for uneven in ("even", "uneven", "empty"):
            metric = TangentAlignment(wrapped, 3, sketch_dim=16, method=method)
            for cut in shares(110, uneven)[rank]:
                metric.update(x[cut], y[cut])
            local = {
                k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in metric.metric_state.items()
            }
            first = float(metric.standard_error())
            value = float(metric.compute())
            for key, state in metric.metric_state.items():  # the sums of this rank are back
                torch.testing.assert_close(state, local[key], rtol=0, atol=0)
            found[f"{method}/{uneven}"] = [value, first]
            found[f"{method}/{uneven}/again"] = float(metric.standard_error())
    # Constant on the whole: the error leaves every rank with its own sums, ready to go on.
    metric = TangentAlignment(wrapped, 3, sketch_dim=16)
    cuts = shares(110, "even")[rank]
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
    # sync_on_compute=False: this rank alone.
    metric = TangentAlignment(wrapped, 3, sketch_dim=16, sync_on_compute=False)
    metric.update(x[cuts[0]], y[cuts[0]])
    found["alone"] = [float(metric.compute()), float(metric.standard_error())]
    return found


PROBE_SETS = {
    "spectrum": lambda model, **options: TangentSpectrum(model, 3, k=[2, 10], per_layer=True, **options),
    "layers": lambda model, **options: LayerwiseAlignment(model, 3, **options),
}


def probes():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(110, 4, dtype=torch.float64, generator=generator), torch.arange(110) % 7 % 3


def probe_sets(rank):
    """Shares of one set, and more examples than are kept, handed out in turn."""
    found = {}
    x, y = probes()
    for kind, make in PROBE_SETS.items():
        for uneven in ("even", "uneven", "empty"):
            metric = make(nn.parallel.DistributedDataParallel(replica()), max_examples=200)
            for cut in shares(110, uneven)[rank]:
                metric.update(x[cut], y[cut])
            found[f"{kind}/{uneven}"] = {name: float(value) for name, value in metric.compute().items()}
            rows = next(value for name, value in metric.metric_state.items() if "records" in name)
            found[f"{kind}/{uneven}/kept"] = len(rows)
        metric = make(nn.parallel.DistributedDataParallel(replica()), max_examples=30)
        for start in range(0, 55, 11):
            metric.update(x[rank::2][start : start + 11], y[rank::2][start : start + 11])
        found[f"{kind}/in turn"] = {name: float(value) for name, value in metric.compute().items()}
    return found


def replica():
    torch.manual_seed(0)
    return build("mlp")[0].double()


def batch(rank, step, n=12):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def path(rank):
    """The same walk on both ranks, with batches of a moment shared in several ways."""
    found = {}
    for share in ("even", "uneven", "empty", "now and then"):
        for each_step in (False, True):
            model = replica()
            metric = PathComplexity(nn.parallel.DistributedDataParallel(model))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            for step in range(7):
                for index, cut in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
                    mine = {
                        "even": index % 2 == rank,
                        "uneven": (index == 2) == (rank == 1),
                        "empty": rank == 0,
                        "now and then": rank == (index == 2 and step % 3 == 1),
                    }[share]
                    if mine:
                        metric.update(batch(0, 50)[0][cut])
                x, y = batch(0, step)
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                if each_step:
                    metric.step()
            found[f"path/{share}/{each_step}"] = [float(metric.compute()), metric.history().traces.tolist()]
            found[f"path/{share}/{each_step}/again"] = float(metric.compute())
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
                metrics = {
                    kind: make(model, 3, sketch_dim=8, forward_fn=forward_fn, **options)
                    for kind, (make, options) in SKETCHES.items()
                }
                for metric in metrics.values():
                    metric.update(x[own], (torch.arange(n) % 3)[own])
                    model(x[own])  # leaves parameters of a sharded model whole
                    metric.update(x[:2], torch.arange(2))
                    values.setdefault(wrap, []).extend([float(metric.compute()), float(metric.standard_error())])
            whole, parts = values.values()
            found[f"sharded/{name}/{how.__name__}"] = max(
                abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True)
            )
    model = shard(replica())
    metric = TangentAlignment(model, 3, sketch_dim=8)
    x, y = probes()
    metric.update(x, y)
    before = float(metric.compute())
    cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.update(x, y)
    found["sharded/changed"] = [str(w.message) for w in caught if "weights changed" in str(w.message)]
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


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {
        **alignment(rank),
        **probe_sets(rank),
        **path(rank),
        **sharded(rank),
    }
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    os._exit(0)  # gloo's threads outlive its group, and abort a process that they see exit
