"""All that is differentiated of a model, in value and slope, against rows of the Jacobian and their differences."""

import copy

import oracles
import torch
from loss_cases import LOSSES, make

from alignreg import TangentFeatures, sketches

STEP = 1e-5
PROBES = 4


def random_like(params, seed, m=None):
    """Fixed random numbers by name, ``(m, *shape)``."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*(() if m is None else (m,)), *p.shape, generator=g, dtype=torch.float64)
        for name, p in params.items()
    }


def formulas(jac, y, omega, directions):
    """Every quantity from the dense Jacobian."""
    n, c = next(iter(jac.values())).shape[:2]
    rows = {name: value.reshape(n * c, -1) for name, value in jac.items()}
    phi = oracles.matrix(jac)
    back = {name: omega.flatten(1) @ value for name, value in rows.items()}
    S = torch.cat([d.reshape(d.shape[0], -1) for d in directions.values()], 1)
    probes = sketches.probes(PROBES, n, c, seed=0, like=torch.empty(0, dtype=torch.float64))
    return {
        "kernel": (phi @ phi.T).reshape(n, c, n, c),
        "trace": phi.square().sum(),
        "grams": torch.stack([b @ b.T for b in back.values()]),
        "pullback": torch.cat(list(back.values()), 1),
        "pushforward": (phi @ S.T).reshape(n, c, -1),
        **{
            kind: torch.as_tensor(LOSSES[kind].formula(phi, y, probes, n, c, True))
            for kind in ("complexity", "alignment", "kare")
        },
    }


def ours(model, x, y, omega, directions, create_graph):
    """The same, as functions that compute them."""
    features = TangentFeatures(model)
    options = {"create_graph": create_graph}
    asked = {
        "kernel": lambda: features.kernel(x, **options),
        "trace": lambda: features.trace(x, **options),
        "grams": lambda: torch.stack(list(features.grams(x, omega, **options).values())),
        "pullback": lambda: torch.cat([b.flatten(1) for b in features.pullback(x, omega, **options).values()], 1),
        "pushforward": lambda: features.pushforward(x, directions, **options),
    }
    if create_graph:
        asked |= {
            kind: lambda kind=kind: make(kind, model, weight=1.0, probes=PROBES)(x, y)
            for kind in ("complexity", "alignment", "kare")
        }
    return asked


def compare(model, x, labels, *, rtol=1e-9, atol=1e-10, slopes=1e-5):
    """Return by quantity ``"right"``, the error that came, or what is wrong.

    The slope of each along a random direction of the parameters is that of a random linear form of it.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    along = random_like(params, 1)
    for path, module in model.named_modules():
        if getattr(module, "padding_idx", None) is not None:  # a row that stays as it is
            along[f"{path}.weight"][module.padding_idx] = 0

    def moved(amount):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in along:
                    p.add_(along[name].to(p), alpha=amount)
        return oracles.jacobian(other, x)

    here, plus, minus = moved(0.0), moved(STEP), moved(-STEP)
    n, c = next(iter(here.values())).shape[:2]
    g = torch.Generator().manual_seed(2)
    omega = torch.randn(2, n, c, generator=g, dtype=torch.float64)
    directions = random_like(params, 3, 2)
    expected, up, down = (formulas(jac, labels, omega, directions) for jac in (here, plus, minus))
    found = {}
    for create_graph in (False, True):
        for name, ask in ours(model, x, labels, omega, directions, create_graph).items():
            key = name + ("'" if create_graph else "")
            try:
                value = ask()
                found[key] = off(value, expected[name], rtol, atol)
                if found[key] == "right" and create_graph:
                    form = torch.randn(value.shape, generator=g.manual_seed(4), dtype=torch.float64)
                    gradient = torch.autograd.grad((form * value).sum(), list(params.values()), materialize_grads=True)
                    slope = sum((s * along[key]).sum() for s, key in zip(gradient, params, strict=True))
                    true = (form * (up[name] - down[name])).sum() / (2 * STEP)
                    size = form.abs().mul((up[name] - down[name]).abs()).sum() / (2 * STEP)
                    found[key] = off(slope, true, slopes, 1e-6 + slopes * float(size), "slope ")
            except Exception as error:  # noqa: BLE001 - what is said is looked at by the caller
                found[key] = error
    return found


def off(value, expected, rtol, atol, what=""):
    value = value.detach().double()
    if value.shape != expected.shape:
        return f"{what}shape {tuple(value.shape)} for {tuple(expected.shape)}"
    difference = (value - expected).norm()
    if difference <= atol + rtol * expected.norm():
        return "right"
    return f"{what}{float(value.norm()):.5g} for {float(expected.norm()):.5g}, off by {float(difference):.2g}"
