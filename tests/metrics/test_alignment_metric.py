"""TangentAlignment against the exact alignment of all examples, and as a citizen of torchmetrics."""

import copy
import pickle

import oracles
import pytest
import torch
from cases import build
from devices import CUDA
from metric_rows import feed, problem
from small_networks import calls_of
from torch import nn
from torchmetrics import MetricCollection

from alignreg import TangentFeatures, functional
from alignreg.metrics import Estimate, TangentAlignment


@pytest.mark.parametrize("sizes", [[60], [20, 20, 20], [1, 58, 1]])
@pytest.mark.parametrize("centered", [True, False])
def test_exact_is_the_functional_on_all_rows(centered, sizes):
    model, x, y, _ = problem()
    metric = feed(TangentAlignment(model, 3, method="exact", centered=centered), x, y, size=sizes)
    expected = oracles.alignment(oracles.jacobian(model, x), oracles.one_hot(y, 3), centered)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-10)
    assert float(functional.alignment(TangentFeatures(model).kernel(x), y, centered)) == pytest.approx(
        expected, rel=1e-10
    )
    assert metric.standard_error() == 0


@pytest.mark.parametrize("target_mean", [None, [0.4, 0.3, 0.3]])
@pytest.mark.parametrize("sizes", [[60], [20, 20, 20], [1] * 60, [7, 53]])
@pytest.mark.parametrize("centered", [True, False])
def test_sketch_is_within_its_error(centered, sizes, target_mean):
    model, x, y, _ = problem()
    metric = TangentAlignment(model, 3, sketch_dim=256, centered=centered, target_mean=target_mean)
    feed(metric, x, y, size=sizes)
    expected = oracles.alignment(oracles.jacobian(model, x), oracles.one_hot(y, 3), centered)
    error = metric.standard_error()
    assert abs(metric.compute() - expected) < 3.5 * error
    assert 0 < error < 0.35 * expected


def test_order_of_batches_changes_nothing():
    model, x, y, _ = problem()
    forth = feed(TangentAlignment(model, 3, sketch_dim=8), x, y, size=[20, 30, 10])
    back = feed(TangentAlignment(model, 3, sketch_dim=8), x.flip(0), y.flip(0), size=[10, 30, 20])
    torch.testing.assert_close(forth.compute(), back.compute(), rtol=1e-10, atol=0)


def test_nothing_is_drawn_from_the_global_state_and_seeds_matter():
    model, x, y, _ = problem()
    values = {}
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.get_rng_state()
        value = float(feed(TangentAlignment(model, 3, sketch_dim=8, seed=seed), x, y, size=[60]).compute())
        assert torch.equal(state, torch.get_rng_state())
        assert values.setdefault(seed, value) == value
    assert values[0] != values[1]


@pytest.mark.parametrize("labels", [lambda v: v, lambda v: 2 * v - 1, lambda v: v.double(), lambda v: v[:, None]])
@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_single_output_takes_labels_as_values(method, labels):
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 2
    metric = TangentAlignment(model, 1, sketch_dim=400, method=method)
    metric.update(x, labels(y))
    expected = oracles.alignment(oracles.jacobian(model, x), y[:, None].double())
    assert abs(metric.compute() - expected) < 3.5 * metric.standard_error() + 1e-10


def test_regression_targets():
    model, x, *_ = problem()
    y = torch.randn(60, 3, dtype=torch.float64)
    metric = feed(TangentAlignment(model, 3, method="exact"), x, y, size=[30, 30])
    assert float(metric.compute()) == pytest.approx(oracles.alignment(oracles.jacobian(model, x), y), rel=1e-10)


@pytest.mark.parametrize("method", ["sketch", "exact"])
@pytest.mark.parametrize("kind", ["tuple inputs", "dict inputs", "transformer, dict output"])
def test_structured_inputs(method, kind):
    model, x, forward_fn = build(kind)
    n = len(oracles.call(model, x)["logits"] if forward_fn else oracles.call(model, x))
    y = torch.arange(n) % 3
    metric = TangentAlignment(model, 3, sketch_dim=400, method=method, forward_fn=forward_fn)
    for rows in (slice(0, 1), slice(1, n)):
        metric.update(oracles.take(x, rows), y[rows])
    jac = oracles.jacobian(model, x, forward_fn or oracles.call)
    expected = oracles.alignment(jac, oracles.one_hot(y, 3))
    assert abs(metric.compute() - expected) < 3.5 * metric.standard_error() + 1e-5


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_one_class_batches(method):
    """Legal, also in forward, whose own value is NaN; undefined only if everything is one class."""
    model, x, y, _ = problem()
    order = y.argsort()
    x, y = x[order], y[order]
    metric = TangentAlignment(model, 3, sketch_dim=400, method=method)
    assert metric(x[y == 0], y[y == 0]).isnan()
    with pytest.raises(ValueError, match="constant"):
        metric.compute()
    metric.update(x[y == 1], y[y == 1])
    metric.update(x[y == 2], y[y == 2])
    expected = oracles.alignment(oracles.jacobian(model, x), oracles.one_hot(y, 3))
    assert abs(metric.compute() - expected) < 3.5 * metric.standard_error() + 1e-10


def test_failing_forward_loses_nothing():
    model, x, y, _ = problem()
    metric = feed(TangentAlignment(model, 3, sketch_dim=8), x, y, size=[60])
    before = metric.compute()
    with pytest.raises(ValueError, match="one row for each"):
        metric(x, y[:3])
    assert metric.update_count == 1
    metric._computed = None
    torch.testing.assert_close(metric.compute(), before, rtol=0, atol=0)
    metric.update(x, y)  # as usable as before
    assert metric.update_count == 2


def test_weights_that_change_between_updates():
    model, x, y, _ = problem()
    exact, sketch = (TangentAlignment(model, 3, sketch_dim=8, method=m) for m in ("exact", "sketch"))
    for metric in (exact, sketch):
        metric.update(x, y)
    before = exact.compute()
    with torch.no_grad():
        model[0].weight.add_(0.1)
    for call in (exact.update, exact):
        with pytest.raises(RuntimeError, match="weights changed"):
            call(x, y)
    exact._computed = None
    with pytest.raises(RuntimeError, match="weights changed"):
        exact.compute()
    for call in (sketch.update, sketch):
        with pytest.warns(UserWarning, match="weights changed"):
            call(x, y)
        sketch.reset()
        sketch.update(x, y)
        with torch.no_grad():
            model[0].weight.add_(0.1)
    exact.reset()
    exact.update(x, y)
    assert exact.compute() != before


def test_what_is_unpickled_and_bound_elsewhere_shares_nothing():
    model, x, y, _ = problem()
    metric = feed(TangentAlignment(model, 3, sketch_dim=8), x, y)
    value = metric.compute()
    restored = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(restored.compute(), value)
    restored.bind(copy.deepcopy(model))
    restored.reset()
    before, after = (
        next(value for name, value in one.metric_state.items() if "binding" in name) for one in (metric, restored)
    )
    assert not torch.equal(before, after)  # so that a collection does not let them share


def test_collection_shares_what_is_equal_and_nothing_else():
    model, x, y, _ = problem()
    twin = copy.deepcopy(model)
    variants = {
        "a": TangentAlignment(model, 3, sketch_dim=8),
        "same": TangentAlignment(model, 3, sketch_dim=8, return_std_error=True),
        "uncentered": TangentAlignment(model, 3, sketch_dim=8, centered=False),
        "seed": TangentAlignment(model, 3, sketch_dim=8, seed=1),
        "size": TangentAlignment(model, 3, sketch_dim=9),
        "params": TangentAlignment(model, 3, sketch_dim=8, params="0.*"),
        "mean": TangentAlignment(model, 3, sketch_dim=8, target_mean=[0.3, 0.3, 0.4]),
        "twin": TangentAlignment(twin, 3, sketch_dim=8),
        "function": TangentAlignment(model, 3, sketch_dim=8, forward_fn=lambda model, x: model(x)),
        "exact": TangentAlignment(model, 3, method="exact"),
        "exact uncentered": TangentAlignment(model, 3, method="exact", centered=False),
    }
    names = {key: frozenset(metric.metric_state) for key, metric in variants.items()}
    assert len(set(names.values())) == 6  # "a", "same", "uncentered", "twin", "function" alike, both exact ones alike
    collection = MetricCollection({key: metric.clone() for key, metric in variants.items()})
    for rows in (slice(0, 30), slice(30, 60)):
        collection.update(x[rows], y[rows])
        for metric in variants.values():
            metric.update(x[rows], y[rows])
    groups = {frozenset(group) for group in collection.compute_groups.values()}
    assert frozenset({"a", "same", "uncentered"}) in groups
    assert frozenset({"exact", "exact uncentered"}) in groups
    assert sum(len(group) > 1 for group in groups) == 2
    values = collection.compute()
    for key, metric in variants.items():
        expected = metric.compute()
        if key == "same":
            assert isinstance(expected, Estimate)
            continue
        torch.testing.assert_close(values[key], expected, msg=key)
    alone, shared = calls_of(model), calls_of(twin)
    TangentAlignment(model, 3, sketch_dim=8).update(x, y)
    pair = MetricCollection([TangentAlignment(twin, 3, sketch_dim=8)], prefix="c_")
    pair.add_metrics({"u": TangentAlignment(twin, 3, sketch_dim=8, centered=False)})
    pair.update(x, y)
    first = len(shared)
    pair.update(x, y)
    assert len(shared) - first == len(alone)  # from the second batch on, one pushforward for both


def test_return_std_error():
    model, x, y, _ = problem()
    metric = feed(TangentAlignment(model, 3, sketch_dim=8, return_std_error=True), x, y, size=[60])
    estimate = metric.compute()
    torch.testing.assert_close(estimate.standard_error, metric.standard_error())
    assert estimate.value.dtype == torch.float64


def test_params_and_layers():
    model, x, y, _ = problem()
    metric = feed(TangentAlignment(model, 3, method="exact", params=["2.*"]), x, y, size=[60])
    layer = TangentFeatures(model).kernel(x, per_layer=True)["2"]
    torch.testing.assert_close(metric.compute(), functional.alignment(layer, y))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_devices(dtype, device):
    model, x, y, _ = problem()
    expected = feed(TangentAlignment(model, 3, method="exact"), x, y, size=[60]).compute()
    model = model.to(device, dtype)
    metric = TangentAlignment(model, 3, sketch_dim=400).to(device)
    feed(metric, x.to(device, dtype), y.to(device), size=[30, 30])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert abs(metric.compute().cpu() - expected) < 3.5 * metric.standard_error().cpu() + tolerance * expected
    assert metric.compute().dtype == torch.float64


def test_unknown_keyword_is_refused():
    model, *_ = problem()
    with pytest.raises(ValueError, match="sketchdim"):
        TangentAlignment(model, 3, sketchdim=8)


def test_varied_lengths():
    """Batches padded to different lengths stream through the sketch; the exact method says what to do."""
    model, _, forward_fn = build("transformer, dict output")
    batches = [(torch.randint(11, (4, t)), torch.tensor([0, 1, 2, 1])) for t in (3, 5)]
    sketch = TangentAlignment(model, 3, sketch_dim=4, forward_fn=forward_fn)
    exact = TangentAlignment(model, 3, method="exact", forward_fn=forward_fn)
    for x, y in batches:
        sketch.update(x, y)
    exact.update(*batches[0])
    with pytest.raises(ValueError, match="same shape per example"):
        exact.update(*batches[1])
    assert exact.update_count == 1
    assert 0 <= sketch.compute() <= 1
