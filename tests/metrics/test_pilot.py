"""Directions of a pilot: what they are, that they leave a sketch unbiased, and who has the same ones."""

import copy
import warnings

import oracles
import pytest
import torch
from metric_rows import NUMBERS, feed, problem
from torch import nn

from alignreg import TangentFeatures, sketches
from alignreg.metrics import TangentAlignment, TangentTrace, pilot

ALL = list(NUMBERS)


def flat(directions):
    return torch.cat([value.flatten(1) for value in directions.tensors.values()], dim=1)


@pytest.mark.parametrize("centered", [True, False])
def test_directions_are_the_leading_eigenvectors(centered):
    model, x, *_ = problem()
    features, S = TangentFeatures(model), sketches.rademacher(5, 0)
    found = pilot.of(features, x[:8], 6, S, centered=centered)
    jac = oracles.jacobian(model, x[:8])
    phi = oracles.matrix(oracles.centered_features(jac) if centered else jac).flatten(0, -2)
    Q = flat(found.directions)
    expected = torch.linalg.svd(phi, full_matrices=False)
    torch.testing.assert_close(Q @ Q.T, torch.eye(6, dtype=Q.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close((phi @ Q.T).norm(dim=0), expected.S[:6], rtol=1e-8, atol=0)
    drawn = torch.cat([S.block(name, p.detach(), 0, 5).flatten(1) for name, p in features.parameters.items()], dim=1)
    torch.testing.assert_close(found.overlap, Q @ drawn.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sketch", ["rademacher", "gaussian", "factored"])
@pytest.mark.parametrize("kind", ALL)
def test_sketches_with_a_pilot_are_unbiased_and_far_closer(kind, sketch):
    """The pilot sees 6 examples, so that much is left to the sketch; a quotient may be off by a tenth of its error."""
    model, x, y, _ = problem()
    exact = NUMBERS[kind](oracles.jacobian(model, x), oracles.one_hot(y, 3), True)
    values = {}
    for examples in (x[:6], False):
        draws = [
            feed(kind(model, 3, pilot=examples, sketch=sketch, seed=seed), x, y, size=60).compute()
            for seed in range(60)
        ]
        values[examples is False] = torch.stack(draws) / exact - 1
    spread = values[False].std()
    assert spread < values[True].std() / 1.3
    assert abs(values[False].mean()) < 3.5 * spread / 60**0.5 + spread / 10


def test_standard_errors_leave_the_pilot_alone():
    model, x, y, _ = problem()
    exact = NUMBERS[TangentTrace](oracles.jacobian(model, x), None, True)
    metrics = [feed(TangentTrace(model, 3, pilot=x[:4], seed=seed), x, y, size=60) for seed in range(100)]
    inside = [abs(metric.compute() - exact) < 2 * metric.standard_error() for metric in metrics]
    assert 0.88 <= torch.stack(inside).double().mean() <= 1


@pytest.mark.parametrize("unbiased", [False, True])
def test_batches_and_merged_metrics_with_one_pilot_are_one(unbiased):
    model, x, y, group = problem()
    options = {"pilot": x[:20], "groups": 2, "unbiased": unbiased, "target_mean": [0.4, 0.3, 0.3]}
    whole = feed(TangentAlignment(model, 3, **options), x, y, group, size=60)
    parts = [TangentAlignment(model, 3, **options) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 25), slice(25, 60)), strict=True):
        feed(part, x[rows], y[rows], group[rows])
    parts[0].merge_state(parts[1])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts[0].compute()[name], value, rtol=1e-9, atol=0)


def test_several_pilots_leave_the_random_directions():
    model, x, y, _ = problem()
    parts = [feed(TangentTrace(model, 3), x[rows], y[rows]) for rows in (slice(0, 30), slice(30, 60))]
    parts[0].merge_state(parts[1])
    plain = feed(TangentTrace(model, 3, pilot=False, sketch_dim=32), x, y)
    with pytest.warns(UserWarning, match="several pilots"):
        torch.testing.assert_close(parts[0].compute(), plain.compute(), rtol=1e-9, atol=0)
    one, other = (feed(TangentAlignment(model, 3, unbiased=True), x[i:], y[i:]) for i in (0, 30))
    one.merge_state(other)
    with pytest.raises(RuntimeError, match="the same pilot"):
        one.compute()
    with pytest.raises(ValueError, match="merge_state: expected the state of a TangentTrace with the same options"):
        TangentTrace(model, 3, pilot=x[:9]).merge_state(TangentTrace(model, 3, pilot=x[:8]))


def test_a_pilot_that_the_model_cannot_take_is_refused():
    model, x, *_ = problem()
    for wrong in (x[:, :3], x * torch.nan):
        metric = TangentTrace(model, 3, pilot=wrong)
        with pytest.raises(ValueError, match="pilot: expected inputs that the model takes"):
            metric.update(x)
        assert metric._source.pilot is None
    with pytest.warns(UserWarning, match="found 6 of 32 directions"):
        TangentTrace(model, 3, pilot=x[:3]).update(x)


def test_the_first_update_brings_the_pilot():
    """Examples of the first update, until ``reset`` at the weights of the moment; ``forward`` and copies keep it."""
    model, x, y, _ = problem()
    given, first = TangentTrace(model, 3, pilot=x[: pilot.EXAMPLES]), TangentTrace(model, 3)
    for metric in (given, first):
        feed(metric, x, y, size=40)
    assert torch.equal(given.compute(), first.compute())
    again = copy.deepcopy(first)
    again.update(x[:10])
    first(x[:10])
    torch.testing.assert_close(first.compute(), again.compute(), rtol=1e-12, atol=0)
    before = first._source.pilot
    first.reset()
    with torch.no_grad():
        model[0].weight.mul_(2)
    first.update(x)
    assert first._source.pilot is not before
    fresh = TangentTrace(model, 3)
    fresh.update(x)
    assert torch.equal(first.compute(), fresh.compute())


def test_a_batch_that_fails_leaves_no_pilot():
    model, x, y, _ = problem()
    metric = TangentAlignment(model, 3)
    for bad in (x * torch.nan, x[:, :3]):
        with pytest.raises((ValueError, RuntimeError)):
            metric.update(bad, y)
        assert metric._source.pilot is None
    with pytest.raises(ValueError, match="class"):
        metric.update(x, y + 7)
    assert metric._source.pilot is None


def test_how_many():
    """At least 24 random directions; fewer where P is large, none in half precision, for small sketches, on request."""
    net = nn.Linear(4, 3)
    sizes = {m: TangentTrace(net, 3, sketch_dim=m).pilots for m in (3, 24, 30, 64, 128)}
    assert sizes == {3: 0, 24: 0, 30: 6, 64: 32, 128: 64}
    assert TangentTrace(net, 3, pilot=False).pilots == TangentTrace(net, 3, method="exact").pilots == 0
    assert TangentTrace(nn.Linear(4, 3).bfloat16(), 3).pilots == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilot, "NUMBERS", 100)
        assert TangentTrace(net, 3).pilots == 100 // 15
    for wrong in ("x", 3, None):
        with pytest.raises(TypeError, match="pilot: expected"):
            TangentTrace(net, 3, pilot=wrong)


def test_few_examples_and_features_that_are_constant():
    """A pilot with fewer directions has zeros for the rest."""
    model, x, *_ = problem()
    metric = TangentTrace(model, 3)
    metric.update(x[:1])
    metric.update(x[1:])
    exact = NUMBERS[TangentTrace](oracles.jacobian(model, x), None, True)
    assert abs(metric.compute() - exact) < 4 * metric.standard_error()
    net = nn.Linear(4, 3)
    constant = TangentTrace(net, 3)
    constant.update(torch.ones(5, 4))
    assert constant.compute() == pytest.approx(0, abs=1e-4)


def test_models_without_a_kernel_have_a_sketch_without_a_pilot():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return torch.einsum("ni,ij->nj", x - x.mean(0), self.weight)

    model, x = Mixed(), torch.randn(20, 4)
    metric = TangentTrace(model, 3, centered=False)
    with pytest.warns(UserWarning, match="found no directions"):
        metric.update(x)
    exact = 3 * (x - x.mean(0)).square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(metric.compute() - exact) < 4 * metric.standard_error()
