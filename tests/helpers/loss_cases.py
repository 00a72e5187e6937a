"""A row for each loss, and networks, options and the oracle that tests of losses share."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import oracles
import torch
from torch import nn

from alignreg import functional, sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss


def _pulled(phi, omega, centered):
    omega = omega - omega.mean(1, keepdim=True) if centered else omega
    return omega.flatten(1) @ phi


def _norm2(g):
    """‖K‖² from Gaussian probes: the mean of the squared products of different ones, over all rotations of them."""
    G, m = g @ g.T, len(g)
    return (G.square().sum() - G.trace() ** 2 / m) / ((m - 1) * (m + 2))


def _complexity(phi, y, omega, n, c, centered):
    s = len(y)
    value = _pulled(phi, omega, centered).square().sum() / len(omega) / (s * c)
    return value * s / (s - 1) * (n - 1) / n if centered else value


def _alignment(phi, y, omega, n, c, centered):
    target = oracles.one_hot(y, c)
    target = (target - target.mean(0)).reshape(-1)
    u = target / target.square().sum().sqrt()
    omega = omega - omega.mean(1, keepdim=True) if centered else omega
    omega = omega.flatten(1) @ (torch.eye(len(u), dtype=torch.float64) - torch.outer(u, u))
    along, g = phi.T @ u, omega @ phi
    projection = along.square().sum()
    norm2 = projection**2 + 2 * (g @ along).square().mean() + _norm2(g)
    trace = projection + g.square().sum(1).mean()
    least = trace**2 / ((len(y) - centered) * c)  # what the trace leaves possible
    return (max(norm2, least).sqrt() / projection).log() if projection > 0 else None


def _participation_ratio(phi, y, omega, n, c, centered):
    g = _pulled(phi, omega, centered)
    trace = g.square().sum(1).mean()
    trace2 = trace**2 - 2 * _norm2(g) / len(g)
    norm2 = max(_norm2(g), trace**2 / ((len(y) - centered) * c))
    return trace2.log() - min(norm2, trace2).log() if trace2 > 0 else None


def _kare(phi, y, omega, n, c, centered):
    phi = phi.reshape(len(y), c, -1)
    phi = phi - phi.mean(0) if centered else phi
    K = torch.einsum("ikp,jlp->ikjl", phi, phi)
    return torch.tensor(oracles.kare(K, oracles.one_hot(y, c), 0.1), dtype=torch.float64)


class Row(NamedTuple):
    kind: type
    formula: Callable
    """It gives the loss of features ``(s·c, P)``, targets of s of n examples, and probes ``(m, s, c)``, or None."""
    weight: float
    """Its default."""
    trained: float
    """A weight with which training lowers ``number``."""
    number: Callable
    """What of a kernel and its targets it is there to lower."""
    refused: list
    """Options of its own that are refused, and the message."""
    probes: bool = True
    """It comes from probes."""
    labeled: bool = False
    """It needs targets."""
    examples: int = 32
    """How many it looks at by default."""
    costs: bool = True
    """A default weight may cost accuracy, and says so."""


NO_PROBE = ({"probes": 0}, "probes: expected (a positive|an) integer")
THREE_PROBES = ({"probes": 3}, "probes: expected an integer of at least 4, got 3")
LOSSES = {
    "alignment": Row(
        AlignmentLoss,
        _alignment,
        weight=0.1,
        trained=0.2,
        number=lambda K, y: -functional.alignment(K, y),
        refused=[NO_PROBE, THREE_PROBES],
        labeled=True,
    ),
    "complexity": Row(
        ComplexityPenalty,
        _complexity,
        weight=0.01,
        trained=0.05,
        number=lambda K, _: torch.einsum("ikik->", functional.center(K)),
        refused=[NO_PROBE],
    ),
    "participation ratio": Row(
        ParticipationRatioLoss,
        _participation_ratio,
        weight=0.01,
        trained=0.3,
        number=lambda K, _: functional.participation_ratio(functional.center(K)),
        refused=[NO_PROBE, THREE_PROBES],
    ),
    "kare": Row(
        KARELoss,
        _kare,
        weight=1.0,
        trained=3.0,
        number=lambda K, y: functional.kare(functional.center(K), y, 0.1),
        refused=[({"ridge": 0.0}, "ridge: expected a positive number")],
        probes=False,
        labeled=True,
        examples=16,
        costs=False,
    ),
}
PROBED = [kind for kind, row in LOSSES.items() if row.probes]


def make(kind, model, **options):
    """A loss of the whole batch at every step, unless told otherwise; probes where it has any."""
    options = {"examples": None, "every_n_steps": 1, "clip": None, **options}
    if not LOSSES[kind].probes:
        options.pop("probes", None)
    return LOSSES[kind].kind(model, **options)


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
        LOSSES[kind].formula(oracles.matrix({name: jac[name] for name in some}), y[rows], omega, n, c, centered)
        for some in layers.values()
    ]
    defined = [value for value in values if value is not None]
    return weight * every_n_steps * sum(defined) / len(defined)


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
