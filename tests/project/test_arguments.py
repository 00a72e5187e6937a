"""Each argument of each public callable against values that nobody means: one clear error, which begins with its name.

A new function is a row of CALLS: a call that is right. What is wrong for an argument follows from its name.
"""

import inspect
import re
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from alignreg import (
    TangentFeatures,
    checks,
    complexity,
    estimators,
    functional,
    linear,
    losses,
    metrics,
    moments,
    plotting,
    population,
    sketches,
    targets,
)
from alignreg.callbacks.monitor import Monitor
from alignreg.sketches import GivenDirections
from alignreg.tangents.batch import as_batch

mpl.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")

HUGE = 10**400  # beyond all floats
LONG = 10**5000  # of more digits than Python writes
NAN, INF = float("nan"), float("inf")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3
PHI = torch.randn(18, 7, generator=torch.Generator().manual_seed(1))
KERNEL = (PHI @ PHI.T).reshape(6, 3, 6, 3)
GRAM = PHI.T[:6] @ PHI[:, :6]
Z = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(2))
VALUES = torch.eye(3)[LABELS]
SUMS, PAIRS = moments.of(Z, VALUES), population.of(Z, VALUES)
VECTOR = torch.tensor([3.0, 2.0, 1.0])


class Unprintable:
    """A value whose own repr fails."""

    def __repr__(self):
        raise RuntimeError


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def no_tensors(good):
    """What is no tensor at all, or no plain one."""
    array = good.detach().numpy()
    return [None, 3.0, "a", array, array.tolist(), {"a": good}, good.to_sparse(), Unprintable(), good * (1 + 1j)]


def spoiled(good, value):
    spoiled = good.clone()
    spoiled.view(-1)[0] = value
    return spoiled


def reals(good):
    """And tensors of wrong numbers or shape."""
    quantized = torch.quantize_per_tensor(good.float(), 0.1, 0, torch.qint8)
    wrong = [spoiled(good, value) for value in (NAN, INF, -INF)]
    return [*no_tensors(good), *wrong, quantized, good.to(torch.float8_e4m3fn), good[None, None, None]]


def kernels(good):
    turned = good.clone()
    turned[0, 0, 1, 1] += 10
    return [*reals(good), -good, turned, good.long(), good > 0, torch.randn_like(good), good[:, :, :2], good[:0, :, :0]]


NO_INTEGERS = [True, 2.5, 3.0, None, "3", [], torch.tensor(3), np.array([1, 2]), 1j, NAN, Unprintable()]
NO_NUMBERS = [True, None, "0.1", [0.1], 1j, NAN, INF, -INF, HUGE, -HUGE, LONG, torch.tensor(0.1), Unprintable()]
NO_COUNTS = [*NO_INTEGERS, -1, HUGE, LONG]


def wrong(name: str, good: Any) -> list[Any]:
    """Values that an argument of this name never takes."""
    if name == "K":
        return kernels(good)
    if name == "G":
        return [*reals(good), good.long(), good[:2]]
    if name == "y" and good.ndim == 1 and not good.is_floating_point():
        return [*no_tensors(good.float()), good + 1, good - 101, good.float(), good[:-1], good.repeat(2, 1).T]
    if name == "inputs":
        return OWN[name](good)
    if name == "leave_one_out":
        return [*no_tensors(good), good[:1], good[None]]
    if isinstance(good, torch.Tensor):
        return reals(good.float())
    if name in ("seed", "step", "offset", "stream"):
        return NO_INTEGERS
    if isinstance(good, bool):
        return ["no", 1, 0, None, 1.0, torch.tensor(True), [], Unprintable()]
    if isinstance(good, int):
        return NO_COUNTS
    if isinstance(good, float):
        return [*NO_NUMBERS, -1.0]
    if name == "label":
        return [5, None, 2.5, []]
    if isinstance(good, str):
        return ["fast", None, 3, True, [], torch.ones(2), Unprintable()]
    return OWN[name](good)


OWN = {
    "params": lambda _: [5, [], [1], b"a", "head.*", X, [None], Unprintable()],
    "forward_fn": lambda _: [5, "a", [], torch.ones(2)],
    "unpack": lambda _: [5, "a", []],
    "statistic": lambda _: [None, 5, "a", lambda _: 1.0, torch.square],
    "k": lambda _: [*NO_COUNTS[1:5], 0, [0], [2.5], [True], HUGE],
    "groups": lambda _: [2.0, 0, True, "a", [1], ["a", "a"], ["total"], torch.ones(2), 1j, Unprintable()],
    "target_mean": lambda _: [5.0, "a", [0.1], [NAN, 0, 0], ["a", "b", "c"], torch.ones(2), 1j, torch.ones(3) * 1j],
    "weight": lambda _: [*(value for value in NO_NUMBERS if value is not None), -1.0],
    "columns": lambda good: [None, 5, [], {}, {"a": [1.0]}, {"a": torch.tensor(1.0)}, {"a": good["a"] * NAN}],
    "vectors": lambda good: [None, 5, [], {}, {"a": None}, {**good, "b": torch.ones(9, 1)}, {"a": good["a"] * NAN}],
    "directions": lambda good: [{}, {"a": None}, {"a": good["a"] * NAN}, {"a": good["a"] * 1j}, {"a": good["a"][0]}],
    "moments": lambda good: [None, 5, tuple(good), good._replace(gram=good.gram * NAN), good._replace(n=None)],
    "sums": lambda good: [None, 5, tuple(good), good._replace(gram=good.gram * NAN)],
    "pairs": lambda good: [None, 5, tuple(good), good._replace(outer=good.outer * NAN)],
    "other": lambda good: [None, 5, tuple(good), good._replace(gram=good.gram * NAN)],
    "model": lambda _: [None, 5, torch.ones(2), lambda x: x, nn.Linear(4, 3, device="meta"), Spectral()],
    "initial": lambda good: [None, 5, {}, {**good.state_dict(), "0.bias": None}, nn.Linear(2, 2)],
    "shape": lambda _: ["a", 2.5, (2.5,), (True,), (0,), None],
    "margin": lambda _: [*(v for v in NO_NUMBERS[:-2] if v is not None), 0.0, -1.0, torch.ones(2)],
    "max_batches": lambda _: [*NO_COUNTS[1:3], 0, True, "a"],
    "make": lambda _: [None, 5, metrics.TangentTrace(model(), 3)],
    "history": lambda good: [None, 5, [], good._replace(lengths=good.lengths * NAN), good._replace(traces=None)],
    "steps": lambda _: [5, ["a"], [NAN, 1, 2], [1.0], "abc", [True, 1, 2]],
    "bounds": lambda _: [None, 5, (1,), ("a", None), (NAN, None)],
    "ax": lambda _: [5, "a", [5], torch.ones(2)],
    "names": lambda _: [5, ["a", "b"], []],
    "layers": lambda _: [5, "a", [0.5]],
    "values": lambda good: [None, "a", [None], ["a"], {"a": "b"}, torch.ones(2, 2), {"a": torch.ones(2)}, 1j],
    "inputs": lambda good: [None, 5, [], {}, (good, "a"), good.to_sparse(), good.to_mkldnn(), good[0, 0], good[:0]],
}


class Spectral(nn.Module):
    """Real outputs of complex weights, as of a Fourier layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (x.to(self.weight) @ self.weight).real + self.bias


def batch_of(inputs):
    return as_batch(inputs)


def error_of_one_table(statistic, tables, block):
    return estimators.standard_error(statistic, tables, block=block)


class Call(NamedTuple):
    function: Any
    good: dict[str, Any]
    """Arguments that are right, those that are to be spoiled."""
    kept: Any = MappingProxyType({})
    """Arguments that are left alone."""


def of_a_class(kind):
    """A call with every option that a metric or loss spells out, by its default where ``OPTIONS`` has no other."""
    spelled = [p for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    # Metrics set pairs themselves.
    return Call(kind, {p.name: OPTIONS.get(p.name, p.default) for p in spelled if p.name != "pairs"})


OPTIONS = {"model": model(), "num_outputs": 3, "params": None, "forward_fn": None, "sketch_dim": 4, "k": (2,)}
OPTIONS |= {
    "max_examples": 5,
    "probes": 4,
    "examples": 4,
    "every_n_steps": 1,
    "normalize_by_n": False,
    "micro_batch_size": 2,
}
KY = {"K": KERNEL, "y": LABELS}
SPECTRUM = {"eigenvalues": VECTOR, "k": (2,)}
BLOCKS = {"G": GRAM, "block": 1}
MOMENTS = {"moments": SUMS, "centered": True}
NETS = {"model": model(), "margin": None}
HISTORY = metrics.PathHistory(VECTOR, VECTOR, VECTOR)
GRID = {"functions": torch.ones(6, 1), "x": torch.arange(3.0), "y": torch.arange(2.0)}
CALLS = {
    "TangentFeatures": Call(TangentFeatures, {"model": model(), "chunk_size": 1, "params": None, "forward_fn": None}),
    **{
        name: of_a_class(kind)
        for module in (metrics, losses)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and not inspect.isabstract(kind)
    },
    "functional.center": Call(functional.center, {"K": KERNEL}),
    "functional.alignment": Call(functional.alignment, {**KY, "centered": True, "unbiased": False}),
    "functional.spectrum": Call(functional.spectrum, {"K": KERNEL}),
    "functional.effective_rank": Call(functional.effective_rank, {"K": KERNEL}),
    "functional.participation_ratio": Call(functional.participation_ratio, {"K": KERNEL}),
    "functional.trace_ratio": Call(functional.trace_ratio, {"K": KERNEL, "k": 2}),
    "functional.summary": Call(functional.summary, SPECTRUM),
    "functional.eigenvector_alignment": Call(functional.eigenvector_alignment, {**KY, "k": 2, "centered": True}),
    "functional.kare": Call(functional.kare, {**KY, "ridge": 0.1}),
    "estimators.gram": Call(estimators.gram, {"columns": {"a": torch.ones(2, 3)}}),
    "estimators.trace": Call(estimators.trace, {"G": GRAM}),
    **{
        f"estimators.{function.__name__}": Call(function, BLOCKS)
        for function in (*(estimators.frobenius2, estimators.off_diagonal_mean, estimators.trace2),)
    },
    "estimators.total": Call(estimators.total, {"columns": VECTOR, "exact": 1}),
    "estimators.gaussian_frobenius2": Call(estimators.gaussian_frobenius2, {"G": GRAM, "exact": 1}),
    "estimators.gaussian_trace2": Call(estimators.gaussian_trace2, {"G": GRAM, "exact": 1}),
    "estimators.cross_frobenius2": Call(estimators.cross_frobenius2, {"G12": GRAM}),
    "estimators.alignment": Call(estimators.alignment, {"projection": VECTOR, "frobenius2": VECTOR}),
    "estimators.standard_error": Call(error_of_one_table, {"statistic": torch.mean, "tables": VECTOR, "block": 1}),
    "estimators.jackknife": Call(estimators.jackknife, {"leave_one_out": VECTOR}),
    "moments.of": Call(moments.of, {"z": Z, "y": VALUES, "pullback": torch.ones(9), "guess": torch.ones(3)}),
    "moments.zeros": Call(moments.zeros, {"c": 2, "m": 3, "p": 4}),
    "moments.Moments.merge": Call(SUMS.merge, {"other": SUMS}),
    **{
        f"moments.{function.__name__}": Call(function, MOMENTS)
        for function in (moments.trace, moments.frobenius2, moments.alignment)
    },
    "moments.participation_ratio": Call(moments.participation_ratio, MOMENTS),
    "moments.numerators": Call(moments.numerators, {"moments": SUMS}),
    "moments.numerator": Call(moments.numerator, {"moments": SUMS}),
    "population.of": Call(population.of, {"z": Z, "y": VALUES}),
    "population.zeros": Call(population.zeros, {"c": 2, "m": 3}),
    "population.alignment": Call(population.alignment, {"pairs": PAIRS, "block": 1}, {"sums": SUMS}),
    "population.columns": Call(population.columns, {"pairs": PAIRS}, {"sums": SUMS}),
    "sketches.gaussian": Call(sketches.gaussian, {"m": 3, "seed": 0}),
    "sketches.rademacher": Call(sketches.rademacher, {"m": 3, "seed": 0}),
    "sketches.factored": Call(sketches.factored, {"copies": 3, "rank": 2, "seed": 0}),
    "sketches.RandomDirections": Call(sketches.RandomDirections, {"m": 3, "seed": 0, "distribution": "gaussian"}),
    "sketches.FactoredDirections": Call(sketches.FactoredDirections, {"copies": 3, "rank": 2, "seed": 0}),
    "sketches.probes": Call(
        sketches.probes, {"m": 3, "n": 2, "c": 2, "seed": 0, "step": 0, "offset": 0, "distribution": "gaussian"}
    ),
    "sketches.subset": Call(sketches.subset, {"n": 5, "size": 2, "seed": 0, "step": 0, "stream": 0}),
    "sketches.count_sketch": Call(sketches.count_sketch, {"vectors": {"a": torch.ones(2, 3)}, "size": 4, "seed": 0}),
    "GivenDirections": Call(
        GivenDirections, {"directions": {"a": torch.ones(2, 3)}}, {"shapes": {"a": torch.Size([3])}}
    ),
    "complexity.rademacher_bound": Call(
        complexity.rademacher_bound, {"lengths": VECTOR, "traces": VECTOR, "num_examples": 3}
    ),
    "complexity.margin": Call(complexity.margin, {"outputs": X[:, :3], "y": LABELS, "quantile": 0.1}),
    "complexity.frobenius_product": Call(complexity.frobenius_product, NETS),
    "complexity.spectral_product": Call(complexity.spectral_product, NETS),
    "complexity.path_norm": Call(complexity.path_norm, {**NETS, "shape": (4,)}),
    "complexity.distance": Call(complexity.distance, {**NETS, "initial": model()}),
    "complexity.bartlett2017": Call(complexity.bartlett2017, {**NETS, "initial": model()}),
    "complexity.neyshabur2018": Call(complexity.neyshabur2018, {**NETS, "initial": model()}),
    "linear.optimal_metric": Call(linear.optimal_metric, {"correlations": VECTOR, "kappa": 1.0, "eps": 0.1}),
    "linear.one_step_bound": Call(linear.one_step_bound, {"eigenvalues": VECTOR, "correlations": VECTOR, "nu": VECTOR}),
    "linear.GradientDescent": Call(
        linear.GradientDescent, {"features": X, "targets": X[:, 0], "lr": 0.1, "loss": "squared"}
    ),
    "linear.SuperNat": Call(linear.SuperNat, {"gauge": 1.0, "eps": 0.1}, {"features": X, "targets": X[:, 0]}),
    "linear.SuperNat.predict": Call(linear.SuperNat(X, X[:, 0]).predict, {"features": X}),
    "targets.encode": Call(targets.encode, {"num_outputs": 3}, {"target": LABELS}),
    "batch.as_batch": Call(batch_of, {"inputs": X}),
    "Monitor": Call(
        Monitor,
        {"make": metrics.TangentTrace, "unpack": None, "max_batches": None, "reset": True},
        {"prefix": "tangent"},
    ),
    "plotting.estimates": Call(
        plotting.estimates,
        {"label": "a", "values": [1.0, 2.0, 3.0], "ax": None, "bounds": (None, None), "steps": [1, 2, 3]},
    ),
    "plotting.spectrum": Call(plotting.spectrum, {"eigenvalues": VECTOR, "layers": None, "ax": None}),
    "plotting.bars": Call(plotting.bars, {"values": {"a": 1.0}, "ax": None}),
    "plotting.heat_map": Call(
        plotting.heat_map, {"values": [{"a": 1.0}] * 3, "ax": None, "label": "share", "steps": [1, 2, 3]}
    ),
    "plotting.path": Call(plotting.path, {"history": HISTORY, "ax": None, "steps": [1, 2, 3]}),
    "plotting.plane": Call(plotting.plane, {**GRID, "ax": None, "names": None, "signed": True}),
}
# Not called by name: classes that only hold numbers, and those of methods.
NO_ROWS = {"Estimate", "PathHistory", "Moments", "PairSums", "Columns", "Sketched", "Kept"}
CASES = [(name, argument) for name, call in CALLS.items() for argument in call.good]


def test_every_public_callable_has_a_row():
    public = {"TangentFeatures"}
    of_kernels = functional, estimators, moments, population, sketches
    for module in (*of_kernels, complexity, linear, metrics, losses, plotting):
        package = module.__name__
        for name, found in vars(module).items():
            if callable(found) and not name.startswith("_") and str(found.__module__).startswith(package):
                prefix = "" if module in (metrics, losses) else f"{package.removeprefix('alignreg.')}."
                public.add(prefix + name)
    assert {name for name in public if name.rpartition(".")[2] not in NO_ROWS} <= set(CALLS) | INTERNAL


INTERNAL = {
    *("moments.check", "moments.sample", "moments.require_different_targets"),
    *("plotting.Path", "plotting.Real", "estimators.inner_products"),
    *("sketches.Directions", "sketches.GivenDirections"),
    *("TangentMetric", "SketchMetric", "ProbeSetMetric", "TangentLoss", "ProbeLoss"),
}


@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}-{argument}" for name, argument in CASES])
def test_rubbish_is_refused_by_name(name, argument):
    call = CALLS[name]
    arguments = {**call.kept, **call.good}
    call.function(**arguments)
    may_be_none = "None" in str(inspect.signature(call.function).parameters[argument].annotation)
    failures = []
    for value in wrong(argument, call.good[argument]):
        if value is None and may_be_none:
            continue
        try:
            call.function(**{**arguments, argument: value})
        except (TypeError, ValueError) as error:
            named = str(error).partition(":")[0]  # two names where they do not fit each other
            if CALLED.get(argument, argument) not in re.split(r"\W+", named) or len(str(error)) > 600:
                failures.append(f"{checks.shown(value)}: {type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not clear
            failures.append(f"{checks.shown(value)}: {type(error).__name__}: {error}")
        else:
            failures.append(f"{checks.shown(value)}: taken")
    plt.close("all")
    assert not failures, "\n".join(failures)


CALLED = {"make": "metrics"}


def features():
    return TangentFeatures(nn.Linear(4, 3))


METHODS = {
    "directions": lambda bad: features().pushforward(X, bad),
    "cotangents": lambda bad: features().pullback(X, bad),
    "cotangents of grams": lambda bad: features().grams(X, bad),
    "create_graph": lambda bad: features().trace(X, create_graph=bad),
    "per_layer": lambda bad: features().kernel(X, per_layer=bad),
    "per_layer of a diagonal": lambda bad: features().diagonal(X, per_layer=bad),
    "progress": lambda bad: features().kernel(X, progress=bad),
    "outputs": lambda bad: features().agree(X, bad),
    "outputs of a pullback": lambda bad: features().pullback(X, torch.ones(1, 6, 3), outputs=bad),
    "outputs of a loss": lambda bad: losses.ComplexityPenalty(nn.Linear(4, 3))(X, outputs=bad),
    "inputs": lambda bad: features().trace(bad),
}


@pytest.mark.parametrize("bad", [5, "no", 1.5, [1, 2], np.ones(3), Unprintable()], ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize("name", METHODS)
def test_methods_answer_alike(name, bad):
    with pytest.raises((TypeError, ValueError), match=f"^{name.split(' ')[0]}"):
        METHODS[name](bad)
