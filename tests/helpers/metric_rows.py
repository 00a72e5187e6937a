"""A row for each metric in each of its ways, what tests feed them, and how they compare values."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import metric_plots
import oracles
import torch
from cases import build

from alignreg.metrics import (
    LayerwiseAlignment,
    PathComplexity,
    TangentAlignment,
    TangentParticipationRatio,
    TangentSpectrum,
    TangentTrace,
)


class Kind(NamedTuple):
    kind: Any
    drawn: Callable
    """It compares what ``plot`` drew, as those of metric_plots.py."""
    ways: dict
    """By name: options, and one that must keep a collection from sharing."""
    number: Callable | None = None
    """The oracle ``(jac, y, centered)`` of a metric that streams a sketch."""
    unbiased: bool = True
    """The sketch estimates that number without bias, which a quotient of estimates does not."""
    scalar: bool = True
    """A value is one number where there are no groups and errors."""
    moments: int = 1
    """At how many weights it is updated."""


class Row(NamedTuple):
    of: Kind
    options: dict
    different: dict

    @property
    def kind(self):
        return self.of.kind

    @property
    def scalar(self):
        return self.of.scalar and not {"groups", "return_std_error"} & self.options.keys()

    def make(self, model, num_outputs=3, **options):
        outputs = (num_outputs,) if "num_outputs" in inspect.signature(self.kind).parameters else ()
        return self.kind(model, *outputs, **self.options, **options)


def _eigenvalues(jac, centered):
    return oracles.eigenvalues(oracles.kernel(oracles.centered_features(jac) if centered else jac))


def _participation_ratio(jac, y, centered):
    lam = _eigenvalues(jac, centered)
    return lam.sum() ** 2 / (lam**2).sum()


SKETCH = {"sketch_dim": 8}
GROUPS = {"groups": ("even", "odd")}
EXACT = {"method": "exact"}
ERROR = {"return_std_error": True}
PROBES = {"method": "sketch", "probes": 6}
MORE = {"max_examples": 99}
OTHER_SEED, OTHER_LAYER = {"seed": 1}, {"params": "0.*"}
KINDS = [
    Kind(
        TangentAlignment,
        metric_plots.points,
        {
            "alignment": (SKETCH, OTHER_SEED),
            "alignment, uncentered": ({**SKETCH, "centered": False}, OTHER_SEED),
            "alignment, target mean": ({**SKETCH, "target_mean": [0.42, 0.29, 0.29]}, OTHER_SEED),
            "alignment, error": ({**SKETCH, **ERROR}, OTHER_SEED),
            "alignment, groups": ({**SKETCH, **GROUPS}, OTHER_LAYER),
            "alignment, unbiased": ({**SKETCH, "unbiased": True}, OTHER_SEED),
            "alignment, factored": ({**SKETCH, "sketch": "factored"}, {"sketch": "gaussian"}),
            "alignment, exact": (EXACT, OTHER_LAYER),
            "alignment, exact, groups": ({**EXACT, **GROUPS}, OTHER_LAYER),
        },
        number=oracles.alignment,
        unbiased=False,
    ),
    Kind(
        TangentTrace,
        metric_plots.points,
        {
            "trace": (SKETCH, OTHER_SEED),
            "trace, error, groups": ({**SKETCH, **GROUPS, **ERROR}, OTHER_SEED),
            "trace, exact": (EXACT, OTHER_LAYER),
        },
        number=lambda jac, y, centered: _eigenvalues(jac, centered).sum(),
    ),
    Kind(
        TangentParticipationRatio,
        metric_plots.points,
        {"participation ratio": (SKETCH, OTHER_SEED), "participation ratio, exact": (EXACT, OTHER_LAYER)},
        number=_participation_ratio,
        unbiased=False,
    ),
    Kind(TangentSpectrum, metric_plots.spectrum, {"spectrum": ({"per_layer": True, "k": 5}, MORE)}, scalar=False),
    Kind(
        LayerwiseAlignment,
        metric_plots.layers,
        {
            "layers": ({}, MORE),
            "layers, sketch": (PROBES, MORE),
            "layers, sketch, error": ({"method": "sketch", **ERROR}, MORE),
        },
        scalar=False,
    ),
    Kind(
        PathComplexity,
        metric_plots.path,
        {
            "path": ({}, {"convention": "official"}),
            "path, official": ({"convention": "official"}, {"convention": "paper"}),
        },
        moments=3,
    ),
]
METRICS = {name: Row(of, *way) for of in KINDS for name, way in of.ways.items()}
NUMBERS = {of.kind: of.number for of in KINDS if of.number is not None}
"""Metrics that stream sketches, and their oracles."""


def problem(n=60):
    """A network in float64, inputs, labels of three classes, and two groups."""
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return build("mlp")[0].double(), x, torch.arange(n) % 7 % 3, torch.arange(n) % 5 % 2


def feed(metric, x, y, group=None, size=15):
    """Show a metric all examples in batches of a size, or of sizes."""
    parts = [x, y] if group is None else [x, y, group]
    for batch in zip(*(part.split(size) for part in parts), strict=True):
        metric.update(*batch)
    return metric


def same(found, expected, rtol=1e-10):
    """Equal in structure and numbers."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0, equal_nan=True)
        assert expected.dtype == torch.float64
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same(found[name], value, rtol)
    else:
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs, rtol)


def numbers(value):
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
