"""Networks, options and formulas that the tests of losses share: a new loss is a row in LOSSES and a formula."""

from fnmatch import fnmatchcase

import oracles
import torch
from torch import nn

from alignreg import sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss

LOSSES = {
    "alignment": AlignmentLoss,
    "complexity": ComplexityPenalty,
    "participation ratio": ParticipationRatioLoss,
    "kare": KARELoss,
}


def make(kind, model, **options):
    """A loss of the whole batch at every step, unless told otherwise; probes where it has any."""
    options = {"examples": None, "every_n_steps": 1, "clip": None, **options}
    if kind == "kare":
        options.pop("probes", None)
    return LOSSES[kind](model, **options)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 4)


def cnn():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    return net, torch.randn(7, 1, 6, 6)


def batchnorm():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).train()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net, torch.randn(7, 1, 4, 4)


NETS = {"mlp": mlp, "cnn": cnn, "batchnorm in train mode": batchnorm}
OPTIONS = {
    "defaults": {},
    "uncentered": {"centered": False},
    "params": {"params": ["0.*"]},
    "sub-batch": {"examples": 5},
    "sub-batch, uncentered": {"examples": 5, "centered": False},
    "stride": {"every_n_steps": 3},
    "layers": {"per_layer": True},
    "all": {
        "params": "*weight",
        "examples": 4,
        "every_n_steps": 2,
        "centered": False,
        "seed": 3,
        "per_layer": True,
    },
}


def problem(net="mlp"):
    model, x = NETS[net]()
    return model.double(), x.double(), torch.tensor([0, 1, 2, 0, 1, 0, 2])


def formula(
    kind,
    model,
    x,
    y,
    weight=1.0,
    examples=None,
    every_n_steps=1,
    probes=8,
    seed=0,
    centered=True,
    params=None,
    per_layer=False,
    forward_fn=oracles.call,
    c=3,
    offset=0,
    trained=True,
):
    """The loss at step 0, from rows of the Jacobian."""
    n = len(y)
    rows = sketches.subset(n, examples, seed=seed) if examples else torch.arange(n)
    patterns = ["*"] if params is None else [params] if isinstance(params, str) else params
    names = {
        k
        for k, p in model.named_parameters()
        if p.requires_grad and any(fnmatchcase(k, pattern) for pattern in patterns)
    }
    jac = oracles.jacobian(model, oracles.take(x, rows), forward_fn, names, trained=trained)
    s = len(rows)
    omega = sketches.probes(probes, s, c, seed=seed, offset=offset, like=torch.empty(0, dtype=torch.float64))
    layers = {}
    for name in jac:
        layers.setdefault(name.rpartition(".")[0] if per_layer else "", []).append(name)
    values = [
        _of_features(kind, oracles.matrix({name: jac[name] for name in some}), y[rows], omega, n, c, centered)
        for some in layers.values()
    ]
    defined = [value for value in values if value is not None]
    return weight * every_n_steps * sum(defined) / len(defined)


def _of_features(kind, phi, y, omega, n, c, centered):
    s, probes = len(y), len(omega)
    target = oracles.one_hot(y, c)
    if kind == "kare":
        phi = phi.reshape(s, c, -1)
        phi = phi - phi.mean(0) if centered else phi
        K = torch.einsum("ikp,jlp->ikjl", phi, phi)
        return torch.tensor(oracles.kare(K, target, 0.1), dtype=torch.float64)
    omega = omega - omega.mean(1, keepdim=True) if centered else omega
    g = omega.reshape(probes, -1) @ phi
    if kind == "complexity":
        value = (g**2).sum() / probes / (s * c)
        return value * s / (s - 1) * (n - 1) / n if centered else value
    pairs = [(a, b) for a in range(probes) for b in range(probes) if a != b]
    squares = (g**2).sum(1)
    norm2 = sum((g[a] @ g[b]) ** 2 for a, b in pairs) / len(pairs)
    norm2 = max(norm2, squares.mean() ** 2 / ((s - 1) * c if centered else s * c))
    if kind == "participation ratio":
        trace2 = sum(squares[a] * squares[b] for a, b in pairs) / len(pairs)
        return trace2.log() - min(norm2, trace2).log() if trace2 > 0 else None
    target = (target - target.mean(0)).reshape(-1)
    projection = (phi.T @ target).square().sum()
    return (norm2.sqrt() * target.square().sum() / projection).log() if projection > 0 else None


def slopes_of(value, model, formula, directions=2, eps=1e-6):
    """Slopes of a loss along random directions: of its gradient, and by central differences of a formula."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(value, parameters, materialize_grads=True)
    slopes, expected = [], []
    for _ in range(directions):
        step = [torch.randn_like(p) for p in parameters]
        slopes.append(float(sum((g * s).sum() for g, s in zip(gradient, step, strict=True))))
        ends = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for p, s in zip(parameters, step, strict=True):
                    p.add_(s, alpha=sign * eps)
            ends.append(float(formula()))
        expected.append((ends[0] - ends[1]) / (2 * eps))
    return slopes, expected
