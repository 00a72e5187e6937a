"""Networks, options and formulas that the tests of losses share."""

from fnmatch import fnmatchcase

import oracles
import torch
from torch import nn

from alignreg import sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty

LOSSES = {"alignment": AlignmentLoss, "complexity": ComplexityPenalty}


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
    "uncentred": {"centered": False},
    "params": {"params": ["0.*"]},
    "sub-batch": {"examples": 5},
    "sub-batch, uncentred": {"examples": 5, "centered": False},
    "stride": {"every_n_steps": 3},
    "all": {"params": "*weight", "examples": 4, "every_n_steps": 2, "centered": False, "seed": 3},
}


def problem(net="mlp"):
    model, x = NETS[net]()
    return model.double(), x.double(), torch.tensor([0, 1, 2, 0, 1, 0, 2])


def formula(kind, model, x, y, weight, examples=None, every_n_steps=1, probes=8, seed=0, centered=True, params=None):
    """The loss at step 0, from rows of the Jacobian."""
    n = len(x)
    rows = sketches.subset(n, examples, seed=seed) if examples else torch.arange(n)
    patterns = ["*"] if params is None else [params] if isinstance(params, str) else params
    names = {k for k, _ in model.named_parameters() if any(fnmatchcase(k, p) for p in patterns)}
    phi = oracles.matrix(oracles.jacobian(model, x[rows], names=names))
    s = len(rows)
    omega = sketches.probes(probes, s, 3, seed=seed, like=x)
    if centered:
        omega = omega - omega.mean(1, keepdim=True)
    g = omega.reshape(probes, -1) @ phi
    if kind == "complexity":
        value = (g**2).sum() / probes / (s * 3)
        if centered:
            value = value * s / (s - 1) * (n - 1) / n
        return weight * every_n_steps * value
    target = oracles.one_hot(y[rows], 3)
    target = (target - target.mean(0)).reshape(-1)
    pairs = [(a, b) for a in range(probes) for b in range(probes) if a != b]
    norm2 = sum((g[a] @ g[b]) ** 2 for a, b in pairs) / len(pairs)
    least = ((g**2).sum(1).mean()) ** 2 / ((s - 1) * 3 if centered else s * 3)
    alignment = (phi.T @ target).square().sum() / (max(norm2, least).sqrt() * target.square().sum())
    return -weight * every_n_steps * alignment.log()
