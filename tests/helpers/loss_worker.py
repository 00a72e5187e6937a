"""Losses on one of two gloo processes: `python loss_worker.py RANK STORE OUT`. Writes what it found as json."""

import types
import warnings

import torch
import torch.distributed as dist
from distributed_worker import batch, replica
from loss_cases import LOSSES, make
from loss_matrix import ROWS, build, close, gradient, plain, train_step
from notices import told
from ranks import report
from shards import shard, shard_at_once
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures
from alignreg.metrics import TangentAlignment


def gathered(values):
    everyone = [torch.zeros_like(values) for _ in range(2)]
    dist.all_gather(everyone, values)
    return everyone


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def trained(model, kind, rank, steps):
    """Train with a loss, gradients clipped, and return the loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    reg = make(kind, model, weight=0.1, examples=8, every_n_steps=2)
    for step in range(steps):
        x, y = batch(rank, step)
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + reg(x, y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return reg


def losses(rank):
    found = {}
    x, y = batch(rank, 0, n=12 + 3 * rank)
    for kind in LOSSES:
        for options in ({}, {"examples": 7, "centered": False}):
            model = replica()
            ddp = nn.parallel.DistributedDataParallel(model)
            alone = replica()
            own = cross_entropy(alone(x), y) + make(kind, alone, weight=0.3, **options)(x, y)
            grads = gathered(flat(torch.autograd.grad(own, list(alone.parameters()), materialize_grads=True)))
            reg = make(kind, ddp, weight=0.3, **options)
            (cross_entropy(ddp(x), y) + reg(x, y)).backward()
            got = flat(p.grad for p in model.parameters())
            key = f"{kind}/gradient/{'sub-batch' if options else 'plain'}"
            found[key] = float((got - (grads[0] + grads[1]) / 2).norm() / got.norm())
            found[f"{key}/ranks"] = float((grads[0] - grads[1]).norm() / got.norm())
        ddp = nn.parallel.DistributedDataParallel(replica())
        reg = trained(ddp, kind, rank, steps=20)
        weights = gathered(flat(ddp.parameters()))
        found[f"{kind}/replicas"] = [bool(torch.equal(*weights)), int(reg.step)]
        found[f"{kind}/ways"] = {name: outcome(way, kind, rank) for name, way in WAYS.items()}
    x, _ = batch(0, 7)  # the same examples on both ranks: probes and choice of examples are each rank's own
    sample = make("complexity", ddp, examples=8)._sample(x, None, None, 0)
    one, other = gathered(sample.x.contiguous())
    found["own examples"] = float((one != other).double().mean())
    one, other = gathered(make("complexity", ddp)(x).detach())
    found["own probes"] = float(one) != float(other)
    with told() as caught:
        reg = make("complexity", replica())
        reg(x)
        reg(x)
    found["bare model"] = [message for message in caught if "DistributedDataParallel" in message]
    return found


def together(ddp, reg, x, y):
    (cross_entropy(ddp(x), y) + reg(x, y)).backward()


def alone(ddp, reg, x, y):
    reg(x, y).backward()


def task_first(ddp, reg, x, y):
    cross_entropy(ddp(x), y).backward()
    reg(x, y).backward()


def regularizer_first(ddp, reg, x, y):
    task, extra = cross_entropy(ddp(x), y), reg(x, y)
    extra.backward()
    task.backward()


def regularizer_first_no_sync(ddp, reg, x, y):
    with ddp.no_sync():
        reg(x, y).backward()
    cross_entropy(ddp(x), y).backward()


def accumulated(ddp, reg, x, y):
    with ddp.no_sync():
        together(ddp, reg, x[:6], y[:6])
    together(ddp, reg, x[6:], y[6:])


def past_the_wrapper(ddp, reg, x, y):
    (cross_entropy(ddp.module(x), y) + reg(x, y)).backward()


WAYS = {
    fn.__name__: fn
    for fn in (
        together,
        alone,
        task_first,
        regularizer_first,
        regularizer_first_no_sync,
        accumulated,
        past_the_wrapper,
    )
}
COMPILED = {
    "compiled": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager"),
    "compiled inside": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="aot_eager")),
    "static graph": lambda model: nn.parallel.DistributedDataParallel(model, static_graph=True),
    "bucket views": lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True),
}


class Opaque(nn.Module):
    """Returns an object that torch knows no way into."""

    def __init__(self):
        super().__init__()
        self.net = replica()

    def forward(self, x):
        return types.SimpleNamespace(logits=self.net(x))


def opaque_output(rank):
    model = Opaque()
    # DDP finds no tensors in such outputs either: it has to take all parameters as used.
    ddp = nn.parallel.DistributedDataParallel(model)
    reg = make("alignment", ddp, weight=0.3, forward_fn=lambda m, x: m(x).logits)
    x, y = batch(rank, 3)
    (cross_entropy(ddp(x).logits, y) + reg(x, y)).backward()
    return {"wrapper/opaque output": bool(torch.equal(*gathered(flat(p.grad for p in model.parameters()))))}


def outcome(way, kind, rank, wrap=nn.parallel.DistributedDataParallel):
    """Whether gradients came out equal on both ranks, or what was raised."""
    model = replica()
    ddp = wrap(model)
    reg = make(kind, ddp, weight=0.3)
    x, y = batch(rank, 3)
    try:
        way(ddp, reg, x, y)
    except RuntimeError as error:
        return str(error)
    return bool(torch.equal(*gathered(flat(p.grad for p in model.parameters()))))


def wrappers(rank):
    return {f"wrapper/{name}": outcome(together, "alignment", rank, wrap) for name, wrap in COMPILED.items()}


SHARES = {"even": (6, 6), "uneven": (9, 3)}
SYNC = {
    "whole": {},
    "uncentered": {"centered": False},
    "layers": {"per_layer": True},
    "single": {"dtype": torch.float32},
}


def whole_batch(share, dtype):
    """Twelve examples; of those of rank 1, if there are three, all have the same target."""
    x, _ = batch(0, 9)
    y = torch.tensor([0, 1, 2, 0, 1, 0, 2, 0, 0, 1, 1, 1])
    cut = SHARES[share][0]
    return x.to(dtype), y, (slice(0, cut), slice(cut, 12))


def synced(rank):
    """Gradients of the global loss, and how many numbers went over the wire."""
    found = {}
    for kind in LOSSES:
        for name, given in SYNC.items():
            options = dict(given)
            dtype = options.pop("dtype", torch.float64)
            for share in SHARES:
                x, y, cuts = whole_batch(share, dtype)
                model = replica().to(dtype)
                ddp = nn.parallel.DistributedDataParallel(model)
                reg = make(kind, ddp, weight=0.3, probes=8, sync=True, **options)
                task = 0 * ddp(x[cuts[rank]]).sum()
                sent, value = counted(lambda reg=reg, x=x[cuts[rank]], y=y[cuts[rank]]: reg(x, y))
                (task + value).backward()
                found[f"{kind}/{name}/{share}"] = gradient(model).tolist()
                found[f"{kind}/{name}/{share}/value"] = float(value.detach())
                found[f"{kind}/{name}/{share}/sent"] = [sent, sum(p.numel() for p in model.parameters())]
    model = replica()
    ddp = nn.parallel.DistributedDataParallel(model)
    reg = make("alignment", ddp, weight=0.3, probes=8, sync=True, gradient_accumulation_steps=2)
    x, y, cuts = whole_batch("even", torch.float64)
    mine = x[cuts[rank]], y[cuts[rank]]
    with ddp.no_sync():
        (0 * ddp(mine[0]).sum() + reg(*mine)).backward()
    (0 * ddp(mine[0]).sum() + reg(*mine)).backward()
    found["accumulated"] = gradient(model).tolist()
    return found


def normalized(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 3)).double().train()


def normalized_over_ranks(rank):
    """With sync=True the statistics of SyncBatchNorm are those of all ranks, without it those of the rank's own."""
    found = {}
    for kind in LOSSES:
        for share in SHARES:
            x, y, cuts = whole_batch(share, torch.float64)
            model = normalized(nn.SyncBatchNorm)
            make(kind, model, weight=0.3, probes=8, sync=True)(x[cuts[rank]], y[cuts[rank]]).backward()
            grads = gathered(gradient(model))
            found[f"{kind}/{share}"] = ((grads[0] + grads[1]) / 2).tolist()
        model, own = normalized(nn.SyncBatchNorm), normalized(nn.BatchNorm1d)
        values = [float(make(kind, net, weight=0.3, probes=8)(*batch(rank, 0)).detach()) for net in (model, own)]
        found[f"{kind}/own"] = abs(values[0] - values[1])
    return found


def not_finite(rank):
    """What becomes of a batch with NaN on one rank: the same on both, which go on together."""
    found = {}
    x, y, cuts = whole_batch("even", torch.float64)
    x = x.clone()
    x[7] = torch.nan  # on rank 1
    for kind in LOSSES:
        for policy in ("raise", "skip"):
            reg = make(kind, replica(), weight=0.3, sync=True, on_nonfinite=policy)
            try:
                outcome = float(reg(x[cuts[rank]], y[cuts[rank]]).detach())
            except ValueError as error:
                outcome = type(error).__name__
            again, _, _ = whole_batch("even", torch.float64)
            value = float(reg(again[cuts[rank]], y[cuts[rank]]).detach())
            found[f"{kind}/{policy}"] = [outcome, int(reg.step), value]
    return found


def clipped(rank):
    """How far the mean over ranks of clipped gradients is from the direction of the whole gradient, and its length."""
    found = {}
    x, y, cuts = whole_batch("uneven", torch.float64)
    for kind in LOSSES:
        means = []
        for clip in (None, 1.0):
            model = replica()
            make(kind, model, weight=1e4, sync=True, clip=clip)(x[cuts[rank]], y[cuts[rank]]).backward()
            grads = gathered(gradient(model))
            means.append((grads[0] + grads[1]) / 2)
        ratio = float(means[1].norm() / means[0].norm())
        found[kind] = [float((means[1] - ratio * means[0]).norm() / means[1].norm()), ratio]
    return found


def counted(call):
    """How many numbers the reductions and gathers of a call took."""
    sent, originals = [0], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name):
        def collective(*args, **kwargs):
            sent[0] += (args[0] if name == "all_reduce" else args[1]).numel()
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        value = call()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return sent[0], value


WRAPPERS = {"DDP": nn.parallel.DistributedDataParallel, "fully_shard": shard}


def matrix(rank):
    """Of every loss and model: whether DDP and fully_shard give the mean of the ranks' own gradients."""
    found = {}
    for name, row in ROWS.items():
        for kind in LOSSES:
            own, right = None, False
            for column, wrap in WRAPPERS.items():
                try:
                    if own is None:
                        own, right = plain(name, kind, rank)
                    model, x, y = build(name, rank)
                    wrapped = wrap(model)
                    reg = make(kind, wrapped, weight=1.0, probes=8, forward_fn=row.forward_fn)
                    train_step(name, wrapped, reg, x, y)
                    mean = sum(gathered(own)) / 2
                    found[f"{name}/{kind}/{column}"] = (
                        "right" if right and close(gradient(model), mean, column) else "wrong"
                    )
                except (RuntimeError, ValueError, TypeError) as error:
                    found[f"{name}/{kind}/{column}"] = type(error).__name__
    return found


def sharded(rank):
    """The global loss, its accumulation and training of a model under fully_shard."""
    found = {}
    x, y, cuts = whole_batch("uneven", torch.float64)
    mine = x[cuts[rank]], y[cuts[rank]]
    for kind in LOSSES:
        for order in ("before", "after", "accumulated", "after, at once"):
            model = (shard_at_once if order == "after, at once" else shard)(replica())
            reg = make(kind, model, weight=0.3, probes=8, sync=True, gradient_accumulation_steps=2)
            if order == "accumulated":
                model.set_requires_gradient_sync(False)
                (0 * model(mine[0]).sum() + reg(*mine)).backward()
                model.set_requires_gradient_sync(True)
            if order == "before":
                value = reg(*mine)
                task = 0 * model(mine[0]).sum()
            else:
                task = 0 * model(mine[0]).sum()
                value = reg(*mine)
            (value if order == "after, at once" else task + value).backward()
            found[f"sharded/{kind}/{order}"] = gradient(model).tolist()
        weights = {}
        for name, wrap in WRAPPERS.items():
            model = wrap(replica())
            trained(model, kind, rank, steps=10)
            weights[name] = flat(p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
        found[f"sharded/{kind}/trained"] = float(
            (weights["DDP"] - weights["fully_shard"]).norm() / weights["DDP"].norm()
        )
    model = shard(replica())
    x, y = batch(0, 0)
    one = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "shard"))["shard"]
    for name, attempt in {
        "metric": lambda: TangentAlignment(model, 3, method="exact"),
        "outputs": lambda: TangentFeatures(model).pullback(x, torch.zeros(1, len(x), 3), outputs=model(x)),
        "part": lambda: make("complexity", fully_shard(replica(), mesh=one), sync=True),
        "tensor parallel": lambda: TangentFeatures(_tensor_parallel()),
    }.items():
        try:
            attempt()
        except (TypeError, ValueError) as error:
            found[f"sharded/{name}"] = str(error)
    with told() as caught:
        reg = make("complexity", model, weight=0.01)
        values = [float(reg(x, outputs=outputs).detach()) for outputs in (model(x), None)]
        reg.step.zero_()
        values.append(float(reg(x).detach()))
    found["sharded/reused"] = [values[0] == values[2], [message[:8] for message in caught]]
    exact = TangentFeatures(replica()).kernel(x)
    found["sharded/kernel"] = float((TangentFeatures(model).kernel(x) - exact).norm() / exact.norm())
    return found


def _tensor_parallel():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    return parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})


def work(rank, _):
    warnings.filterwarnings("ignore", message="the model is not wrapped in DistributedDataParallel")
    found = {"matrix": matrix(rank), "synced": synced(rank)}
    found |= {"normalized": normalized_over_ranks(rank), "not finite": not_finite(rank), "clipped": clipped(rank)}
    warnings.resetwarnings()
    found |= {**sharded(rank), **losses(rank), **wrappers(rank), **opaque_output(rank)}
    return found


if __name__ == "__main__":
    report(work)
