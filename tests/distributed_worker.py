"""One of two gloo processes: `python distributed_worker.py RANK STORE OUT`. Writes what it found as json."""

import copy
import gc
import json
import sys
from pathlib import Path

import oracles
import torch
import torch.distributed as dist
from cases import build
from torch import nn

from alignreg.metrics import TangentAlignment


def shares(n, uneven):
    """Batches of 20 by rank: even, uneven, or none on rank 1."""
    cuts = [slice(i, min(i + 20, n)) for i in range(0, n, 20)]
    if uneven == "even":
        return [cuts[0::2], cuts[1::2]]
    return [cuts[:4], cuts[4:]] if uneven == "uneven" else [cuts, []]


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
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
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    gc.collect()  # the time it takes lets gloo drop its last work, which aborts while the interpreter exits
