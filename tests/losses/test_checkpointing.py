"""Modules that run again in backward passes, outside of all that held in the forward pass, against plain twins."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from loss_cases import LOSSES, make
from oracles import jacobian, kernel, matrix
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignreg import TangentFeatures, sketches
from alignreg.losses import ComplexityPenalty
from alignreg.metrics import TangentAlignment

X, Y = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 3


class Block(nn.Module):
    """A residual block with parameters for which no rule is known."""

    def __init__(self, *inside):
        super().__init__()
        self.lin, self.inside, self.scale = nn.Linear(4, 4), nn.Sequential(*inside), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return x + self.scale * torch.tanh(self.inside(self.lin(x)))


class Net(nn.Module):
    def __init__(self, inside=lambda: nn.LayerNorm(4), use_reentrant=False):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Block(inside()) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            plain = self.use_reentrant is None
            x = block(x) if plain else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


INSIDE = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "Dropout": nn.Dropout,
    "BatchNorm without momentum": lambda: nn.BatchNorm1d(4, momentum=None),
}
PARAMS = [None, "*weight", "blocks.1.*", ["blocks.*.scale", "stem.bias"]]


def pair(inside):
    """A checkpointed network in training mode, and one that is the same without."""
    model = Net(INSIDE[inside]).double().train()
    twin = copy.deepcopy(model)
    twin.use_reentrant = None
    return model, twin


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("inside", INSIDE)
def test_features_of_checkpointed_modules(inside, params):
    model, twin = pair(inside)
    state = copy.deepcopy(model.state_dict())
    patterns = [params] if isinstance(params, str) else params or ["*"]
    names = {name for name, _ in model.named_parameters() if any(fnmatchcase(name, one) for one in patterns)}
    oracle = jacobian(twin, X, names=names)
    features = TangentFeatures(model, params=params)
    torch.testing.assert_close(features.kernel(X), kernel(oracle), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features.trace(X), matrix(oracle).square().sum(), rtol=1e-9, atol=0)
    omega = torch.randn(2, 7, 3, dtype=torch.float64)
    pulled = torch.cat([value.flatten(1) for value in features.pullback(X, omega).values()], dim=1)
    torch.testing.assert_close(pulled, omega.flatten(1) @ matrix(oracle), rtol=1e-9, atol=1e-11)
    S = sketches.gaussian(3, seed=0)
    parts = [oracle[name].flatten(2) @ S.block(name, p, 0, 3).flatten(1).T for name, p in features.parameters.items()]
    torch.testing.assert_close(features.pushforward(X, S), sum(parts), rtol=1e-9, atol=1e-11)
    values = []
    for net in (model, twin):
        metric = TangentAlignment(net, 3, sketch_dim=4, sketch="factored", params=params)
        metric.update(X, Y)
        values.append(metric.compute())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("inside", INSIDE)
def test_losses_of_checkpointed_modules_leave_buffers_alone(inside, kind):
    model, twin = pair(inside)
    state = copy.deepcopy(model.state_dict())
    for params in PARAMS[:2]:
        found = []
        for net in (model, twin):
            value = make(kind, net, weight=1.0, params=params)(X, Y)
            found.append(torch.autograd.grad(value, list(net.parameters()), materialize_grads=True))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    running = [buffer for _, buffer in model.named_buffers()]
    model(X)
    assert all(a is b for a, b in zip(running, model.buffers(), strict=True))


def test_buffers_that_modules_share_stay_shared():
    class Counting(nn.Module):
        """Writes a buffer that the other module reads."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)
            self.one.register_buffer("scale", torch.ones((), dtype=torch.float64))
            self.two.register_buffer("scale", self.one.scale)

        def forward(self, x):
            x = torch.tanh(self.one(x))
            self.one.scale.fill_(2.0)
            return self.two.scale * self.two(x)

    model = Counting().double()
    oracle = jacobian(model, X)
    torch.testing.assert_close(TangentFeatures(model).trace(X), matrix(oracle).square().sum(), rtol=1e-9, atol=0)
    assert model.one.scale is model.two.scale
    assert float(model.one.scale) == 1


@pytest.mark.parametrize("params", [None, "blocks.1.*"])
def test_reentrant_checkpointing_is_refused(params):
    model = Net(use_reentrant=True).double()
    for attempt in (
        lambda: TangentFeatures(model, params=params).kernel(X),
        lambda: TangentFeatures(model, params=params).pushforward(X, sketches.gaussian(2, seed=0)),
        lambda: TangentAlignment(model, 3, params=params).update(X, Y),
        lambda: ComplexityPenalty(model, params=params, every_n_steps=1)(X),
    ):
        with pytest.raises(ValueError, match="use_reentrant=False, got use_reentrant=True"):
            attempt()
