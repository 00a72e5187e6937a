"""Losses and features with the statistics of the batch."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import BasicBlock
from loss_cases import LOSSES, formula, make, slopes_of
from notices import silent
from oracles import jacobian, kernel, matrix
from small_networks import X, Y, gradients
from torch import nn

from alignreg import TangentFeatures, sketches
from alignreg.losses import ComplexityPenalty


class HandWritten(nn.Module):
    """A batch normalization of one's own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("running_mean", torch.full((width,), 0.3))
        self.register_buffer("running_var", torch.full((width,), 1.7))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var.mul_(0.9).add_(0.1 * var.detach())
        else:
            mean, var = self.running_mean, self.running_var
        return self.scale * (x - mean) / (var + 1e-5).sqrt()


def _block():
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), BasicBlock(2), nn.Flatten(), nn.Linear(8, 3))
    return net.double()


class SyncedAct(nn.SyncBatchNorm):
    """With its activation, as in networks of vision."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class Act(nn.BatchNorm1d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def _scripted():
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net[1] = torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).double())
    return net


NORMALIZED = {
    "torch's": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "hand-written": lambda: nn.Sequential(nn.Linear(4, 6), HandWritten(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "synced": lambda: nn.Sequential(nn.Linear(4, 6), nn.SyncBatchNorm(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "synced, with activation": lambda: nn.Sequential(nn.Linear(4, 6), SyncedAct(6), nn.Linear(6, 3)).double(),
    "scripted, with dropout": _scripted,
    "without affine part": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)
    ).double(),
    "block": _block,
}


class ByTheBatch(HandWritten):
    def forward(self, x):
        return self.scale * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


AS_TRAINED = {nn.SyncBatchNorm: nn.BatchNorm1d, SyncedAct: Act, HandWritten: ByTheBatch}


def _as_trained(model):
    """A twin that the oracle, in evaluation mode but for torch's own classes on the CPU, takes as it is trained."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = AS_TRAINED.get(type(module), type(module))
    if isinstance(twin[1], torch.jit.ScriptModule):
        twin[1] = nn.BatchNorm1d(6).double()
        twin[1].load_state_dict({key.removeprefix("0."): value for key, value in model[1].state_dict().items()})
    return twin


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", NORMALIZED)
def test_losses_differentiate_the_function_that_is_trained(name, kind):
    torch.manual_seed(2)
    model = NORMALIZED[name]().train()
    state = copy.deepcopy(model.state_dict())
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    value = make(kind, model, weight=1.0, probes=8)(X, Y)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [type(m) for m in model.modules()] == classes
    assert [m.training for m in model.modules()] == modes
    reference = _as_trained(model)
    assert float(value.detach()) == pytest.approx(float(formula(kind, reference, X, Y)), rel=1e-9)
    own = gradients(model, value)
    pairs = zip(reference.parameters(), own, strict=True)
    slopes, expected = slopes_of(
        sum((p * g).sum() for p, g in pairs), reference, lambda: formula(kind, reference, X, Y)
    )
    scale = float(sum(g.square().sum() for g in own)) ** 0.5
    assert slopes == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


@pytest.mark.parametrize("kind", LOSSES)
def test_running_statistics_are_an_option_and_those_of_evaluation_mode(kind):
    torch.manual_seed(2)
    model = NORMALIZED["torch's"]().train()
    model(X)
    values = []
    for training, statistics in ((True, "running"), (False, "running"), (False, "training"), (True, "training")):
        reg = make(kind, model.train(training), weight=1.0, statistics=statistics)
        values.append(float(reg(X, Y).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] == pytest.approx(values[2], rel=1e-12)
    assert values[0] != pytest.approx(values[3], rel=1e-3)


def test_scripts_in_training_mode_predict_inside():
    torch.manual_seed(2)
    model = _scripted().train()
    for _ in range(2):
        model(X)
    state, expected = copy.deepcopy(model.state_dict()), jacobian(_as_trained(model), X)
    features = TangentFeatures(model)
    torch.testing.assert_close(features.kernel(X), kernel(expected), rtol=1e-9, atol=1e-12)
    assert float(features.trace(X)) == pytest.approx(float(matrix(expected).square().sum()), rel=1e-9)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model[1].training


def test_products_of_a_batch_as_one_function():
    torch.manual_seed(2)
    model = NORMALIZED["torch's"]().train()
    oracle = jacobian(model, X, trained=True)
    features = TangentFeatures(model, statistics="training")
    with silent():
        for create_graph in (False, True):
            K = features.kernel(X, create_graph=create_graph).detach()
            torch.testing.assert_close(K, kernel(oracle), rtol=1e-9, atol=1e-11)
            trace = float(sum(value.square().sum() for value in oracle.values()))
            assert float(features.trace(X, create_graph=create_graph).detach()) == pytest.approx(trace, rel=1e-9)
            S = sketches.gaussian(3, seed=0)
            Z = features.pushforward(X, S, create_graph=create_graph).detach()
            parts = [
                value.flatten(2) @ S.block(name, p, 0, 3).flatten(1).T
                for (name, value), p in zip(oracle.items(), model.parameters(), strict=True)
            ]
            torch.testing.assert_close(Z, sum(parts), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="statistics: expected 'running' or 'training', got 'batch'"):
        TangentFeatures(model, statistics="batch")


def test_training_with_the_penalty_keeps_a_normalized_network_in_step():
    """The function that is trained and the one that predicts stay the same: not so with running statistics inside."""
    drift = {}
    for statistics in ("training", "running"):
        torch.manual_seed(0)
        x = torch.randn(256, 8)
        y = (x[:, :2].prod(1) > 0).long()
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        reg = ComplexityPenalty(model, weight=0.1, every_n_steps=1, statistics=statistics)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step, rows in zip(range(60), itertools.cycle(torch.arange(256).split(64))):  # noqa: B007
            optimizer.zero_grad()
            (F.cross_entropy(model(x[rows]), y[rows]) + reg(x[rows])).backward()
            optimizer.step()
        with torch.no_grad():
            trained = model.train()(x)
            drift[statistics] = float((model.eval()(x) - trained).norm() / trained.norm())
    assert drift["training"] < 0.3
    assert drift["running"] > 2 * drift["training"]
