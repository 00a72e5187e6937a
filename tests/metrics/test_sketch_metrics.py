"""Groups, one pushforward for all, and layers from probes: against oracles and against each other."""

import oracles
import pytest
import torch
from cases import build
from metric_rows import NUMBERS, feed, problem
from torchmetrics import MetricCollection

from alignreg import TangentFeatures, moments, sketches
from alignreg.metrics import (
    Estimate,
    LayerwiseAlignment,
    TangentAlignment,
    TangentParticipationRatio,
    TangentTrace,
)
from alignreg.metrics.records import canonical_order

ALL = list(NUMBERS)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_exact_groups(kind, centered):
    model, x, y, group = problem()
    metric = feed(kind(model, 3, groups=2, method="exact", centered=centered), x, y, group)
    found = metric.compute()
    assert list(found) == ["group_0", "group_1", "total"]
    jac = oracles.jacobian(model, x)
    for name, rows in (("group_0", group == 0), ("group_1", group == 1), ("total", group >= 0)):
        part = {key: value[rows] for key, value in jac.items()}
        expected = NUMBERS[kind](part, oracles.one_hot(y[rows], 3), centered)
        assert float(found[name]) == pytest.approx(expected, rel=1e-10)
        assert metric.standard_error()[name] == 0


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_sketched_groups_are_within_their_errors(kind, centered):
    model, x, y, group = problem()
    options = {"groups": ("a", "b"), "centered": centered}
    exact = feed(kind(model, 3, method="exact", **options), x, y, group).compute()
    found = feed(kind(model, 3, sketch_dim=256, return_std_error=True, **options), x, y, group).compute()
    assert list(found) == ["a", "b", "total"]
    for name, (value, error) in found.items():
        assert abs(value - exact[name]) < 3.5 * error
        assert 0 < error < 0.35 * exact[name]


MOMENTS = {
    TangentAlignment: moments.alignment,
    TangentTrace: moments.trace,
    TangentParticipationRatio: moments.participation_ratio,
}


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", MOMENTS)
def test_values_and_errors_are_those_of_the_moments(kind, centered):
    model, x, y, _ = problem()
    metric = kind(model, 3, sketch_dim=8, centered=centered, return_std_error=True)
    metric.update(x, y)
    ((sums,),) = metric._moments()
    value, error = metric.compute()
    assert value == MOMENTS[kind](sums, centered=centered)
    without = torch.stack([MOMENTS[kind](left_out(sums, a), centered=centered) for a in range(8)])
    torch.testing.assert_close(error, ((without - without.mean()).square().sum() * 7 / 8).sqrt(), rtol=1e-10, atol=0)


def left_out(sums, column):
    """The sums of a sketch that never had the column."""
    rest = [a for a in range(len(sums.gram)) if a != column]
    each = {name: getattr(sums, name)[..., rest] for name in ("features", "features_targets", "guess")}
    return sums._replace(gram=sums.gram[rest][:, rest], **each)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("target_mean", [None, [0.4, 0.3, 0.3]])
def test_a_group_is_the_metric_of_its_examples(kind, target_mean):
    """Also where batches hold one group alone, or none of it."""
    model, x, y, group = problem()
    group[15:30] = 1
    options = {"sketch_dim": 8, "target_mean": target_mean, "return_std_error": True}
    found = feed(kind(model, 3, groups=3, **options), x, y, group).compute()
    for name, member in (("group_0", 0), ("group_1", 1)):
        alone = kind(model, 3, **options)
        for start in range(0, 60, 15):
            rows = torch.arange(start, start + 15)[group[start : start + 15] == member]
            if len(rows):
                alone.update(x[rows], y[rows])
        torch.testing.assert_close(found[name], alone.compute(), rtol=1e-10, atol=0)
    assert all(part.isnan() for part in found["group_2"])
    total = feed(kind(model, 3, **options), x, y).compute()
    torch.testing.assert_close(found["total"], total, rtol=1e-10, atol=0)


def test_with_one_centering_groups_sum_to_the_total():
    model, x, y, group = problem()
    metric = feed(TangentAlignment(model, 3, sketch_dim=8, groups=2, target_mean=[0.4, 0.3, 0.3]), x, y, group)
    states = {name.rpartition("_")[0]: value for name, value in metric.metric_state.items()}
    assert states["gram"].shape == (3, 8, 8)
    for name in ("n", "features", "gram", "features_targets", "targets", "targets2", "pullback", "guess"):
        torch.testing.assert_close(states[name][0], states[name][1:].sum(0), rtol=1e-10, atol=1e-10, msg=name)


class Counter:
    """Counts calls of a method of TangentFeatures, and what `of` says of their arguments."""

    def __init__(self, monkeypatch, method, of=lambda *_: 1):
        self.count = 0
        inner = getattr(TangentFeatures, method)

        def counted(features, *args, **options):
            self.count += of(*args)
            return inner(features, *args, **options)

        monkeypatch.setattr(TangentFeatures, method, counted)


def test_a_group_costs_a_backward_pass_where_it_divides_a_batch(monkeypatch):
    model, x, y, group = problem()
    group[:15] = 1
    passes = Counter(monkeypatch, "pullback", of=lambda x, cotangents: len(cotangents))
    pushes = Counter(monkeypatch, "pushforward")
    feed(TangentAlignment(model, 3, sketch_dim=4, groups=2), x, y, group)
    assert (passes.count, pushes.count) == (1 + 3 * 3, 4)
    feed(TangentTrace(model, 3, sketch_dim=4, groups=2), x, y, group)
    assert (passes.count, pushes.count) == (2 * (1 + 3 * 3), 8)
    metric = TangentTrace(model, 3, sketch_dim=4)
    metric.update(x)
    assert (passes.count, pushes.count) == (20, 9)  # nothing to pull back without targets


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_collected_metrics_share_one_pushforward(monkeypatch, order):
    """K metrics over B updates: B + k − 1 pushforwards at first, B after reset()."""
    model, x, y, _ = problem()
    collection = MetricCollection([ALL[index](model, 3, sketch_dim=8) for index in order])
    pushes = Counter(monkeypatch, "pushforward")
    for expected in (4 + 3 - 1, 4):
        pushes.count = 0
        feed(collection, x, y)
        assert pushes.count == expected
        found = collection.compute()
        for kind in (ALL[index] for index in order):
            alone = feed(kind(model, 3, sketch_dim=8), x, y).compute()
            torch.testing.assert_close(found[kind.__name__], alone, rtol=1e-10, atol=0)
        collection.reset()


def test_forward_does_not_share(monkeypatch):
    model, x, y, _ = problem()
    collection = MetricCollection([kind(model, 3, sketch_dim=8) for kind in ALL])
    pushes = Counter(monkeypatch, "pushforward")
    for _ in range(3):
        collection(x, y)
    assert pushes.count == 3 * len(ALL)


def test_names_of_states_tell_options_apart():
    model, *_ = problem()
    for centered in ({}, {"centered": False}):  # of which a pilot makes use
        alike = [kind(model, 3, **centered) for kind in ALL]
        alike.append(TangentTrace(model, 3, return_std_error=True, **centered))
        assert len({frozenset(metric.metric_state) for metric in alike}) == 1
    alike = [kind(model, 3, pilot=False, **options) for kind in ALL for options in ({}, {"centered": False})]
    assert len({frozenset(metric.metric_state) for metric in alike}) == 1
    options = [{}, {"seed": 1}, {"sketch_dim": 9}, {"groups": 2}, {"groups": 3}, {"params": "0.*"}]
    options += [{"centered": False}, {"pilot": False}, {"pilot": torch.ones(4, 4)}, {"sketch": "gaussian"}]
    options += [{"target_mean": [0.2, 0.4, 0.4]}, {"method": "exact"}, {"method": "exact", "groups": 2}]
    assert len({frozenset(TangentTrace(model, 3, **chosen).metric_state) for chosen in options}) == len(options)
    named, numbered = (TangentTrace(model, 3, groups=groups) for groups in (("a", "b"), 2))
    assert named.metric_state.keys() == numbered.metric_state.keys()


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_targets_that_are_missing(method):
    model, x, y, _ = problem()
    for kind in (TangentTrace, TangentParticipationRatio):
        metric = kind(model, 3, sketch_dim=400, method=method)
        metric.update(x[:20])
        metric.update(x[20:], y[20:])
        expected = NUMBERS[kind](oracles.jacobian(model, x), None, True)
        assert abs(metric.compute() - expected) < 3.5 * metric.standard_error() + 1e-9 * expected
    metric = TangentAlignment(model, 3, method=method)
    metric.update(x[:20])
    metric.update(x[20:], y[20:])
    with pytest.raises(ValueError, match="20 of 60 came without"):
        metric.compute()
    metric.reset()
    assert 0 < feed(metric, x, y).compute() < 1


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_classes_as_groups(method):
    """Within one class alignment is undefined; sizes and ranks are not."""
    model, x, y, _ = problem()
    options = {"sketch_dim": 8, "groups": 4, "method": method}
    alignment = feed(TangentAlignment(model, 3, **options), x, y, y).compute()
    assert all(alignment[f"group_{k}"].isnan() for k in range(4))
    assert 0 < alignment["total"] < 1
    trace = feed(TangentTrace(model, 3, **options), x, y, y).compute()
    assert all(trace[f"group_{k}"] > 0 for k in range(3))
    assert trace["group_3"].isnan()


def test_trace_is_that_of_the_tangent_features():
    model, x, y, _ = problem()
    found = feed(TangentTrace(model, 3, centered=False, method="exact"), x, y).compute()
    torch.testing.assert_close(found, TangentFeatures(model).trace(x))


@pytest.mark.parametrize("kind", ALL)
def test_bad_groups(kind):
    model, x, y, group = problem()
    for bad in (0, True, "easy", [], ["a", "a"], ["a", "total"], [1, 2]):
        with pytest.raises(ValueError, match="groups: expected a positive integer"):
            kind(model, 3, groups=bad)
    metric, plain = kind(model, 3, sketch_dim=4, groups=2), kind(model, 3, sketch_dim=4)
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    for bad, message in (
        (None, "expected indices .* of the 2 groups, got none"),
        (group[:-1], r"expected indices \(60,\)"),
        (group.double(), "got torch.float64"),
        (group + 1, r"in \[0, 2\), got 2"),
        (group - 1, r"in \[0, 2\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(x, y, bad)
    with pytest.raises(TypeError, match="got list"):
        metric.update(x, y, group.tolist())
    assert metric.update_count == 0
    for name, value in metric.metric_state.items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="the metric has no groups"):
        plain.update(x, y, group)


def exact_layers(model, x, y, centered):
    jac = oracles.jacobian(model, x)
    layers = TangentFeatures(model).layers
    return {
        layer: oracles.alignment({name: jac[name] for name in names}, oracles.one_hot(y, 3), centered)
        for layer, names in layers.items()
    }


@pytest.mark.parametrize("centered", [True, False])
def test_error_bars_of_layers_cover(centered):
    """±2 s.e. holds the exact alignment of each layer in 91–98 % of 400 draws."""
    model, x, y, _ = problem(30)
    exact = exact_layers(model, x, y, centered)
    hits = dict.fromkeys(exact, 0)
    for seed in range(400):
        metric = LayerwiseAlignment(
            model, 3, method="sketch", probes=32, seed=seed, centered=centered, return_std_error=True
        )
        metric.update(x, y)
        for layer, (value, error) in metric.compute().items():
            hits[layer] += int(abs(value - exact[layer]) <= 2 * error)
    print({layer: count / 400 for layer, count in hits.items()})
    assert all(0.91 <= count / 400 <= 0.98 for count in hits.values())


@pytest.mark.parametrize("centered", [True, False])
def test_sketched_layers_against_their_formula(centered):
    """From features along u = y/‖y‖ and along probes without their part in u; examples are sorted here as there."""
    model, x, y, _ = problem(30)
    target = oracles.one_hot(y, 3) - oracles.one_hot(y, 3).mean(0)
    u = (target / target.norm()).flatten()
    omega = torch.empty(5, 30, 3, dtype=torch.float64)
    omega[:, canonical_order(x, target)] = sketches.probes(5, 30, 3, seed=2, like=target)
    omega = (omega - omega.mean(1, keepdim=True) if centered else omega).flatten(1)
    omega = omega - torch.outer(omega @ u, u)
    metric = LayerwiseAlignment(model, 3, method="sketch", probes=5, seed=2, centered=centered)
    metric.update(x, y)
    found = metric.compute()
    jac = oracles.jacobian(model, x)
    for layer in found:
        phi = oracles.matrix({name: value for name, value in jac.items() if name.rpartition(".")[0] == layer})
        along, g = u @ phi, omega @ phi
        projection, G = along.square().sum(), g @ g.T
        rest = (G.square().sum() - G.diagonal().square().sum()) / (5 * 4)
        norm2 = projection**2 + 2 * (g @ along).square().mean() + rest
        torch.testing.assert_close(found[layer], projection / norm2.sqrt(), rtol=1e-9, atol=0)


def test_layers_converge_and_do_not_depend_on_the_deal():
    model, x, y, _ = problem(30)
    exact = exact_layers(model, x, y, True)
    metric = LayerwiseAlignment(model, 3, method="sketch", probes=600)
    metric.update(x, y)
    found, errors = metric.compute(), metric.standard_error()
    for layer, value in found.items():
        assert abs(value - exact[layer]) < 3.5 * errors[layer]
        assert errors[layer] < 0.05 * exact[layer]
    dealt = LayerwiseAlignment(model, 3, method="sketch", probes=600)
    order = torch.randperm(30)
    for rows in order.split(7):
        dealt.update(x[rows], y[rows])
    for layer, value in dealt.compute().items():
        torch.testing.assert_close(value, found[layer], rtol=1e-10, atol=0)


def test_examples_that_come_twice_have_probes_of_their_own():
    model, x, y, _ = problem(20)
    x, y = torch.cat([x, x[:10]]), torch.cat([y, y[:10]])
    exact = exact_layers(model, x, y, True)
    metric = LayerwiseAlignment(model, 3, method="sketch", probes=600, return_std_error=True)
    metric.update(x, y)
    for layer, (value, error) in metric.compute().items():
        assert abs(value - exact[layer]) < 3.5 * error


def test_layers_are_pulled_back_in_batches_no_larger_than_came(monkeypatch):
    model, x, y, _ = problem(30)
    metric = feed(LayerwiseAlignment(model, 3, method="sketch"), x, y, size=12)
    sizes = []
    inner = TangentFeatures.pullback

    def noted(features, x, cotangents):
        sizes.append((len(x), len(cotangents)))
        return inner(features, x, cotangents)

    monkeypatch.setattr(TangentFeatures, "pullback", noted)
    metric.compute()
    assert sizes == [(12, 33), (12, 33), (6, 33)]


def test_layers_of_no_kernel_and_bad_options():
    model, x, y, _ = problem(30)
    with torch.no_grad():
        model[-1].weight.zero_()
    metric = LayerwiseAlignment(model, 3, method="sketch", return_std_error=True)
    metric.update(x, y)
    found = metric.compute()
    assert isinstance(found["4"], Estimate)
    assert found["0"].value.isnan()  # nothing behind the zero layer depends on it
    assert 0 < found["4"].value < 1
    with pytest.raises(ValueError, match="'exact' or 'sketch'"):
        LayerwiseAlignment(model, 3, method="probes")
    with pytest.raises(ValueError, match="probes: expected an integer of at least 3"):
        LayerwiseAlignment(model, 3, probes=2)
    nothing = LayerwiseAlignment(model, 3, method="sketch")
    assert all(value.isnan() for value in nothing(x[:3], torch.ones(3, dtype=torch.long)).values())
    for call in (nothing.compute, nothing.standard_error):
        with pytest.raises(ValueError, match="constant"):
            call()


def test_many_parameters_are_hashed(monkeypatch):
    """The kept vector is the hash of Φᵀ(y − ȳ), of the groups too, and values are unbiased by it."""
    model, x, y, group = problem(30)
    jac = oracles.matrix(oracles.jacobian(model, x)).reshape(30, 3, -1)
    target = oracles.one_hot(y, 3)
    options = {"sketch_dim": 3, "target_mean": target.mean(0).tolist(), "groups": 2}
    whole = feed(TangentAlignment(model, 3, **options), x, y, group)
    monkeypatch.setattr("alignreg.metrics.pulled.HASH_SIZE", 40)
    hashed = feed(TangentAlignment(model, 3, **options), x, y, group)
    again = feed(TangentAlignment(model, 3, **options), x, y, group, size=7)
    kept, other = (getattr(m, m._name("pullback")) for m in (hashed, again))
    assert kept.shape == (3, 40)
    assert getattr(whole, whole._name("pullback")).shape == (3, jac.shape[2])
    torch.testing.assert_close(kept, other)
    torch.testing.assert_close(kept[0], kept[1] + kept[2])
    squares = []
    for seed in range(300):
        metric = feed(TangentAlignment(model, 3, seed=seed, **options), x, y, group, size=30)
        squares.append(getattr(metric, metric._name("pullback"))[0].square().sum())
    values = torch.stack(squares)
    exact = float(torch.einsum("ikp,ik->p", jac, target - target.mean(0)).square().sum())
    assert abs(float(values.mean()) - exact) / float(values.std() / 300**0.5) < 3.5
    assert float(values.std()) > 0
    no_targets = TangentTrace(model, 3, sketch_dim=3)
    no_targets.update(x)
    assert getattr(no_targets, no_targets._name("pullback")).shape == (1, 40)


def test_a_parameter_without_axes():
    model, x, _ = build("parameter without axes")
    y, jac = torch.arange(6) % 3, oracles.jacobian(model, x)
    exact = float(oracles.alignment(jac, oracles.one_hot(y, 3)))
    metric = TangentAlignment(model, 3, sketch_dim=400)
    metric.update(x, y)
    assert abs(float(metric.compute()) - exact) < 4 * float(metric.standard_error()) + 1e-6
    layers = LayerwiseAlignment(model, 3, method="sketch", probes=400, return_std_error=True)
    layers.update(x, y)
    expected = float(oracles.alignment({"scale": jac["scale"]}, oracles.one_hot(y, 3)))
    found = layers.compute()[""]
    assert abs(float(found.value) - expected) < 4 * float(found.standard_error) + 1e-9
