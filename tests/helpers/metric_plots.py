"""Comparisons of what a metric's plot drew with what it computed."""

import matplotlib as mpl
import pytest
import torch

from alignreg import functional
from alignreg.metrics import Estimate

mpl.use("Agg")


def points(metric, expected, axes, inputs):
    names = expected if isinstance(expected, dict) else {"": expected}
    drawn = [float(container.lines[0].get_ydata()[0]) for container in axes.containers]
    values = [value.value if isinstance(value, Estimate) else value for value in names.values()]
    assert drawn == pytest.approx([float(value) for value in values], rel=1e-6)
    errors = metric.standard_error()
    bars = [container.lines[2][0].get_segments()[0][:, 1] for container in axes.containers]
    want = errors.values() if isinstance(errors, dict) else [errors]
    assert [bar[1] - bar[0] for bar in bars] == pytest.approx([4 * float(e) for e in want], rel=1e-6)
    _curve(metric, expected)


def path(metric, expected, axes, inputs):
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(float(expected), rel=1e-6)
    _curve(metric, expected)


def layers(metric, expected, axes, inputs):
    values = [float(value.value if isinstance(value, Estimate) else value) for value in expected.values()]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(values, rel=1e-6)
    bars = axes.containers[0].lines[2][0].get_segments()
    want = [4 * float(error) for error in metric.standard_error().values()]
    assert [bar[1, 0] - bar[0, 0] for bar in bars] == pytest.approx(want, rel=1e-6)
    metric.plot(expected)


def spectrum(metric, expected, axes, inputs):
    kernel = functional.center(metric._features.kernel(inputs))
    largest = torch.linalg.eigvalsh(kernel.reshape(3 * len(inputs), -1))[-1]
    assert axes[0].lines[0].get_ydata()[0] == pytest.approx(float(largest), rel=1e-6)


def _curve(metric, expected):
    metric.plot(expected)
    _, axes = metric.plot([expected, expected])
    assert axes.lines[0].get_xdata().tolist() == [0, 1]
    one = next(iter(expected.values())) if isinstance(expected, dict) else expected
    if isinstance(one, Estimate):
        edges = sorted({float(y) for _, y in axes.collections[0].get_paths()[0].vertices})
        want = [float(one.value + sign * 2 * one.standard_error) for sign in (-1, 1)]
        assert [edges[0], edges[-1]] == pytest.approx(want, rel=1e-6)
    given = mpl.pyplot.subplots()[1]
    assert metric.plot(ax=given)[1] is given
