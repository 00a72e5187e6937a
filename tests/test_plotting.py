"""What figures show: the numbers that went in, under their names."""

import math
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from alignreg import functional, plotting
from alignreg.estimators import Estimate
from alignreg.metrics import (
    LayerwiseAlignment,
    PathComplexity,
    PathHistory,
    TangentAlignment,
    TangentParticipationRatio,
    TangentSpectrum,
    TangentTrace,
)

mpl.use("Agg")
plt = mpl.pyplot


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def problem():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return net, torch.randn(12, 4), torch.arange(12) % 3


def y_of(line):
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def x_of(line):
    return np.asarray(line.get_xdata(), dtype=float).tolist()


@pytest.mark.parametrize("value", [2.0, torch.tensor(2.0), Estimate(torch.tensor(2.0), torch.tensor(0.25))])
def test_a_value(value):
    _, ax = plotting.estimates(value, label="size", bounds=(0, None))
    (drawn,) = ax.containers
    assert y_of(drawn.lines[0]) == [2.0]
    assert ax.get_ylabel() == ("size, ± 2 s.e." if isinstance(value, Estimate) else "size")
    assert ax.get_xlabel() == ""
    assert ax.get_ylim()[0] == 0
    assert not ax.get_xticks().size
    low, high = drawn.lines[2][0].get_segments()[0][:, 1] if isinstance(value, Estimate) else (1.5, 2.5)
    assert (low, high) == (1.5, 2.5)


def test_curves_have_names_and_bands():
    values = [{"a": Estimate(torch.tensor(v), torch.tensor(0.5)), "b": -v} for v in (1.0, 3.0)]
    _, ax = plotting.estimates(values, steps=[10, 100], label="rank")
    assert {line.get_label(): (x_of(line), y_of(line)) for line in ax.lines} == {
        "a": ([10, 100], [1, 3]),
        "b": ([10, 100], [-1, -3]),
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    band = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices.tolist()}
    assert {(10, 0), (10, 2), (100, 2), (100, 4)} <= band
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "rank, ± 2 s.e.")
    _, ax = plotting.estimates(torch.tensor([1.0, 3.0]))
    assert (x_of(ax.lines[0]), y_of(ax.lines[0])) == ([0, 1], [1, 3])
    assert ax.get_xlabel() == "record"
    assert ax.get_legend() is None


def test_spectrum():
    eigenvalues = torch.tensor([6.0, 3.0, 1.0, 0.0], requires_grad=True)
    figure, axes = plotting.spectrum(eigenvalues)
    assert figure.axes == axes
    assert (x_of(axes[0].lines[0]), y_of(axes[0].lines[0])) == ([1, 2, 3], [6, 3, 1])
    assert y_of(axes[1].lines[0]) == pytest.approx([0.6, 0.9, 1, 1])
    assert axes[0].get_xscale() == axes[0].get_yscale() == axes[1].get_xscale() == "log"
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [
        ("index j", "eigenvalue λ_j"),
        ("k", "share of the trace in the k largest"),
    ]
    _, axes = plotting.spectrum(eigenvalues, {"first": 0.25, "last": torch.tensor(0.5)})
    assert [bar.get_width() for bar in axes[2].patches] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"ax: expected 2 axes.*got 1"):
        plotting.spectrum(eigenvalues, ax=plt.subplots()[1])


def test_bars_of_layers():
    _, ax = plotting.bars({"": 0.5, "head": Estimate(torch.tensor(0.25), torch.tensor(0.05))}, label="share")
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.25]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["(model)", "head"]
    assert ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("share", "layer")
    error = ax.containers[0].lines[2][0].get_segments()[1][:, 0]
    assert error.tolist() == pytest.approx([0.15, 0.35])


def test_heat_map():
    values = [{"0": float(t), "head": torch.tensor(t / 2) if t else math.nan} for t in range(20)]
    figure, ax = plotting.heat_map(values, steps=[2**t for t in range(20)])
    (image,) = ax.images
    drawn = image.get_array()
    assert drawn.shape == (2, 20)
    assert drawn[0].tolist() == list(range(20))
    assert drawn[1, 1:].tolist() == [t / 2 for t in range(1, 20)]
    assert drawn.mask[1, 0]
    assert image.get_clim() == (0, 19)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "head"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "8", "64", "512", "4096", "32768", "262144"]
    assert ax.get_xticks().tolist() == list(range(0, 20, 3))
    assert (ax.get_xlabel(), figure.axes[1].get_ylabel()) == ("step", "alignment")
    for wrong in ([], [{"0": 1.0}, {"1": 1.0}]):
        with pytest.raises(ValueError, match="values: expected the same layers"):
            plotting.heat_map(wrong)
    with pytest.raises(ValueError, match=r"steps: expected 20, .*got 3"):
        plotting.heat_map(values, steps=[1, 2, 3])


def test_path():
    history = PathHistory(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([9.0, 4.0, 1.0]), torch.tensor([3.0, 3.0, 3.0]))
    _, axes = plotting.path(history, steps=[0, 7, 20])
    assert (x_of(axes[0].lines[0]), y_of(axes[0].lines[0])) == ([0, 7, 20], [0, 3, 7])
    lines = {line.get_label(): (x_of(line), y_of(line)) for line in axes[1].lines}
    assert lines == {"‖δw‖": ([0, 7], [1, 2]), "‖Φ‖_F": ([0, 7, 20], [3, 2, 1])}
    assert [ax.get_xlabel() for ax in axes] == ["step", "step"]
    assert axes[1].get_yscale() == "log"


def test_path_of_a_metric_ends_where_the_metric_is():
    net, x, _ = problem()
    metric = PathComplexity(net)
    for _ in range(3):
        metric.update(x)
        with torch.no_grad():
            net[0].weight += 0.1
    metric.update(x)
    _, axes = plotting.path(metric.history())
    assert y_of(axes[0].lines[0])[-1] == pytest.approx(float(metric.compute()))
    # The metric goes on to where the weights are now, which is where the last moment was.
    assert [*y_of(axes[0].lines[0]), float(metric.compute())] == pytest.approx(y_of(metric.plot()[1].lines[0]))


def test_plane():
    x, y = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 5.0])
    grid = torch.cartesian_prod(x, y)
    _, axes = plotting.plane(grid, x, y, names=["across", "up"], boundary=grid[:, 0] - 0.5)
    across, up = (ax.collections[0] for ax in axes)
    assert across.get_array().reshape(2, 3).tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert up.get_array().reshape(2, 3).tolist() == [[0, 0, 0], [5, 5, 5]]
    assert across.get_clim() == (-1, 1)
    assert up.get_clim() == (-5, 5)
    line = axes[0].collections[1].get_paths()[0].vertices
    assert line[:, 0] == pytest.approx(0.5)
    assert [ax.get_title() for ax in axes] == ["across", "up"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("x", "y")
    _, (ax,) = plotting.plane(grid[:, 1:], x, y, signed=False, ax=plt.subplots()[1])
    assert ax.collections[0].get_clim() == (0, 5)
    assert ax.get_title() == "eigenfunction 1"
    for wrong in (grid[:, 0], grid[1:]):
        with pytest.raises(ValueError, match=r"functions: expected \(6, k\)"):
            plotting.plane(wrong, x, y)
    with pytest.raises(ValueError, match="names: expected 2"):
        plotting.plane(grid, x, y, names=["one"])
    with pytest.raises(ValueError, match=r"boundary \(6,\).*\(5,\)"):
        plotting.plane(grid, x, y, boundary=grid[1:, 0])


def test_results_along_training():
    net, x, y = problem()
    layers, spectrum = LayerwiseAlignment(net, 3), TangentSpectrum(net, 3)
    of_layers, of_spectrum = [], []
    for _ in range(3):
        for metric, results in ((layers, of_layers), (spectrum, of_spectrum)):
            metric.reset()
            metric.update(x, y)
            results.append(metric.compute())
        with torch.no_grad():
            net[0].weight += 0.5
    _, ax = layers.plot(of_layers)
    assert ax.images[0].get_array()[1].tolist() == pytest.approx([float(one["2"]) for one in of_layers])
    _, ax = spectrum.plot(of_spectrum)
    for line in ax.lines:
        assert y_of(line) == pytest.approx([float(one[line.get_label()]) for one in of_spectrum])
    assert [line.get_label() for line in ax.lines] == ["effective_rank", "participation_ratio"]


def test_a_spectrum_of_ones_own():
    net, x, y = problem()
    metric = TangentSpectrum(net, 3)
    metric.update(x, y)
    kernel = metric._features.kernel(x).double()
    _, own = plotting.spectrum(functional.spectrum(functional.center(kernel)))
    assert y_of(own[1].lines[0]) == pytest.approx(y_of(metric.plot()[1][1].lines[0]))


def test_a_collection_plots():
    net, x, y = problem()
    kinds = (TangentAlignment, TangentTrace, TangentParticipationRatio)
    metrics = MetricCollection([kind(net, num_outputs=3, sketch_dim=8) for kind in kinds])
    metrics.update(inputs=x, target=y)
    found = metrics.compute()
    for name, (_, ax) in zip(found, metrics.plot(), strict=True):
        assert ax.get_ylabel() == name
        assert y_of(ax.containers[0].lines[0]) == pytest.approx([float(found[name])])
    for name, (_, ax) in zip(found, metrics.plot([found, found]), strict=True):
        assert y_of(ax.lines[0]) == pytest.approx([float(found[name])] * 2)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    net, x, y = problem()
    metric = TangentTrace(net, 3, sketch_dim=8)
    metric.update(x, y)
    grid = torch.ones(3)
    for draw in (
        metric.plot,
        lambda: plotting.estimates(1.0),
        lambda: plotting.spectrum(grid),
        lambda: plotting.bars({"a": 1.0}),
        lambda: plotting.heat_map([{"a": 1.0}]),
        lambda: plotting.path(PathHistory(grid, grid, grid)),
        lambda: plotting.plane(torch.ones(9, 1), grid, grid),
    ):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            draw()
