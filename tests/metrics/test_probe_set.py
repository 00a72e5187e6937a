"""TangentSpectrum and LayerwiseAlignment against numbers of the paper's own code, and what they keep."""

import matplotlib as mpl
import oracles
import pytest
import torch
from metric_rows import feed, problem, same
from paper_cases import EXPECTED, oracle_case
from torch import nn

from alignreg import TangentFeatures, functional
from alignreg.metrics import LayerwiseAlignment, TangentSpectrum
from alignreg.metrics.records import unpack

mpl.use("Agg")
BOTH = [TangentSpectrum, LayerwiseAlignment]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_of_the_paper_code(name, centered):
    model, x, y = oracle_case(name)
    want = EXPECTED[name]["values"]["centering_true" if centered else "centering_false"]
    c = EXPECTED[name]["n_output"]
    ks = [int(k) for k in want["trace_ratio"]]
    spectrum = TangentSpectrum(model, c, k=ks, per_layer=True, centered=centered, max_examples=len(x))
    layers = LayerwiseAlignment(model, c, centered=centered, max_examples=len(x))
    for metric in (spectrum, layers):
        feed(metric, x, y, size=[7, len(x) - 7])
    got, by_layer = spectrum.compute(), layers.compute()
    errors = {
        "alignment": got["alignment"] / want["alignment"] - 1,
        "effective_rank": got["effective_rank"] / want["effective_rank"] - 1,
        "largest": got["largest_eigenvalue"] / want["top20_eigenvalues"][0] - 1,
        "mean": got["mean_eigenvalue"] * len(x) * c / want["trace"] - 1,
        "participation": got["participation_ratio"] * (want["frobenius"] / want["trace"]) ** 2 - 1,
    }
    for k in ks:
        errors[f"trace_ratio_{k}"] = got[f"trace_ratio_{k}"] / want["trace_ratio"][str(k)] - 1
    assert list(by_layer) == list(TangentFeatures(model).layers)
    for layer, value in zip(EXPECTED[name]["layer_names"], want["layer_alignment"], strict=True):
        errors[layer] = by_layer[layer] / value - 1
        errors[f"alignment/{layer}"] = got[f"alignment/{layer}"] / value - 1
    worst = max(errors, key=lambda key: abs(errors[key]))
    print(
        f"{name}, centered {centered}: {len(errors)} numbers, largest error {abs(float(errors[worst])):.1e} ({worst})"
    )
    assert abs(errors[worst]) <= 1e-9, worst


def test_median_eigenvalue_and_all_keys():
    model, x, y, _ = problem(10)
    metric = TangentSpectrum(model, 3, k=[2, 1000])
    metric.update(x, y)
    found = metric.compute()
    K = functional.center(TangentFeatures(model).kernel(x))
    eigenvalues = oracles.eigenvalues(K)
    assert float(found["median_eigenvalue"]) == pytest.approx((eigenvalues[14] + eigenvalues[15]) / 2, rel=1e-8)
    assert found["trace_ratio_1000"] == 1
    assert set(found) == {
        "alignment",
        "effective_rank",
        "participation_ratio",
        "trace_ratio_2",
        "trace_ratio_1000",
        "largest_eigenvalue",
        "mean_eigenvalue",
        "median_eigenvalue",
    }
    assert all(value.dtype == torch.float64 and value.shape == () for value in found.values())
    odd = functional.summary(torch.tensor([5.0, 2.0, 1.0]))
    assert odd["median_eigenvalue"] == 2


def kept(metric):
    rows = next(value for name, value in metric.metric_state.items() if "records" in name)
    return sum(len(record.targets) for row in rows for record in unpack(row))


@pytest.mark.parametrize("kind", BOTH)
def test_only_so_many_examples(kind):
    model, x, y, _ = problem(30)
    whole = feed(kind(model, 3, max_examples=12), x, y, size=5)
    first = feed(kind(model, 3), x[:12], y[:12])
    same(whole.compute(), first.compute())
    streamed = kind(model, 3, max_examples=12)
    for start in range(0, 30, 5):
        streamed(x[start : start + 5], y[start : start + 5])
    same(streamed.compute(), first.compute())
    assert kept(whole) == 12
    assert kept(streamed) == 15  # whole batches


@pytest.mark.parametrize("kind", BOTH)
def test_weights_that_change(kind):
    model, x, y, _ = problem(30)
    metric = kind(model, 3)
    metric.update(x[:10], y[:10])
    with torch.no_grad():
        model[0].weight.add_(0.1)
    with pytest.raises(RuntimeError, match=f"weights changed since the first update of {kind.__name__}"):
        metric.update(x[10:], y[10:])
    with pytest.raises(RuntimeError, match="weights changed"):
        metric.compute()
    metric.reset()
    metric.update(x, y)
    metric.compute()


def test_targets_unknown_or_all_the_same():
    model, x, y, _ = problem(30)
    metric = TangentSpectrum(model, 3, per_layer=True)
    metric.update(x)
    unknown = metric.compute()
    assert unknown["alignment"].isnan()
    assert unknown["alignment/0"].isnan()
    metric.reset()
    metric.update(x, torch.ones_like(y))
    constant = metric.compute()
    assert constant["alignment"].isnan()
    assert constant["effective_rank"] == unknown["effective_rank"] > 1
    layers = LayerwiseAlignment(model, 3)
    assert all(value.isnan() for value in layers(x[:3], torch.ones(3, dtype=torch.long)).values())
    with pytest.raises(ValueError, match="constant"):
        layers.compute()
    layers.update(x[3:], y[3:])
    assert not any(value.isnan() for value in layers.compute().values())


@pytest.mark.parametrize("kind", BOTH)
def test_bad_input(kind):
    model, x, y, _ = problem(30)
    for options in ({"max_examples": 0}, {"max_examples": 2.5}, {"max_examples": True}):
        with pytest.raises(ValueError, match="max_examples: expected a positive integer"):
            kind(model, 3, **options)
    with pytest.raises(ValueError, match="num_outputs: expected a positive integer"):
        kind(model, 0)
    with pytest.raises(ValueError, match="k: expected a positive integer"):
        TangentSpectrum(model, 3, k=[3, 0])
    metric = kind(model, 3)
    metric.update(x[:5], y[:5])
    before = [row.clone() for row in next(v for k, v in metric.metric_state.items() if "records" in k)]
    for bad, message in (
        ((model(x), y), "grad_fn"),
        ((x[:0], y[:0]), "empty"),
        ((x, y[:3]), "target"),
        ((x, y + 5), "target"),
        ((x[:, None], y), "same shape per example"),
        ((x.float(), y), "same shape per example"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*bad)
        after = next(v for k, v in metric.metric_state.items() if "records" in k)
        assert len(after) == len(before) == metric.update_count
        assert torch.equal(after[0], before[0])
    with pytest.raises(ValueError, match="num_outputs: expected 2 outputs per example, the model gives 3"):
        kind(model, 2).update(x, y % 2)


def test_plots():
    model, x, y, _ = problem(30)
    plain, by_layer = TangentSpectrum(model, 3), TangentSpectrum(model, 3, per_layer=True)
    layers = LayerwiseAlignment(model, 3)
    for metric in (plain, by_layer, layers):
        feed(metric, x, y)
    _, axes = plain.plot()
    assert len(axes) == 2
    eigenvalues = axes[0].lines[0].get_ydata()
    assert eigenvalues[0] == pytest.approx(float(plain.compute()["largest_eigenvalue"]))
    share = axes[1].lines[0].get_ydata()
    assert share[9] == pytest.approx(float(plain.compute()["trace_ratio_10"]))
    _, axes = by_layer.plot()
    assert [bar.get_width() for bar in axes[2].patches] == pytest.approx(
        [float(by_layer.compute()[f"alignment/{layer}"]) for layer in ("0", "2", "4")]
    )
    _, axis = layers.plot()
    assert axis.yaxis_inverted()  # the first layer is on top
    figure, given = mpl.pyplot.subplots(1, 2)
    assert plain.plot(ax=given)[0] is figure
    with pytest.raises(ValueError, match=r"expected 2 axes.*got 1"):
        plain.plot(ax=given[0])
    assert TangentSpectrum(model, 3, k=5).k == (5,)
    with pytest.raises(ValueError, match=r"expected 3 axes.*got 2"):
        by_layer.plot(ax=given)
    mpl.pyplot.close("all")


def test_dict_inputs_and_forward_fn():
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, scale):
            return {"logits": self.net(x) * scale}

    model, x, y, _ = problem(30)
    bare = LayerwiseAlignment(model, 3)
    bare.update(x, y)
    wrapped = LayerwiseAlignment(Wrapped(model), 3, forward_fn=lambda model, batch: model(**batch)["logits"])
    for cut in (slice(0, 11), slice(11, 30)):
        wrapped.update({"x": x[cut], "scale": torch.ones(len(x[cut]), 1, dtype=torch.float64)}, y[cut])
    expected = {f"net.{layer}": value for layer, value in bare.compute().items()}
    same(wrapped.compute(), expected)
