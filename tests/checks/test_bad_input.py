"""Each kind of bad input: the message, and a state as before."""

from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from cases import build
from torch import nn

from alignreg import TangentFeatures, functional, moments, sketches
from alignreg.metrics import TangentAlignment
from alignreg.targets import encode


class Bad(NamedTuple):
    act: Any
    message: str
    error: type[Exception] = ValueError


class Broken(nn.Module):
    """A linear model whose output can be replaced."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.spoil = lambda y: y

    def forward(self, x):
        return self.spoil(self.lin(x))


def spoiled(spoil):
    def act(metric, model, x, y):
        model.spoil = spoil
        try:
            metric.update(x, y)
        finally:
            model.spoil = lambda y: y

    return act


def frozen(metric, model, x, y):
    TangentAlignment(deepcopy(model).requires_grad_(False), 3)


def lazy(*_):
    TangentFeatures(nn.LazyLinear(3))


def constant_total(metric, model, x, y):
    metric = TangentAlignment(model, 3, sketch_dim=4)
    metric.update(x, torch.ones_like(y))
    metric.compute()


CASES = {
    "no trainable parameter": Bad(frozen, "expected a trainable parameter"),
    "lazy parameters": Bad(lazy, "have no shape yet"),
    "no module": Bad(lambda *_: TangentFeatures(lambda x: x), "expected a torch.nn.Module", TypeError),
    "pattern without match": Bad(lambda m, model, x, y: TangentFeatures(model, params="head.*"), "'head.*' matches no"),
    "no pattern": Bad(lambda m, model, x, y: TangentFeatures(model, params=[]), "at least one pattern"),
    "chunk size": Bad(lambda m, model, x, y: TangentFeatures(model, chunk_size=0), "chunk_size"),
    "output of three axes": Bad(spoiled(lambda y: y[:, None]), r"expected shape \(n, c\)"),
    "output of one axis": Bad(spoiled(lambda y: y[:, 0]), r"expected shape \(n, c\)"),
    "output of another length": Bad(spoiled(lambda y: y[:2]), r"expected shape \(n, c\)"),
    "integer output": Bad(spoiled(lambda y: y.long()), "floating-point", TypeError),
    "dict output": Bad(spoiled(lambda y: {"logits": y}), "got dict.*forward_fn", TypeError),
    "tuple output": Bad(spoiled(lambda y: (y, y)), "got tuple.*forward_fn", TypeError),
    "nan output": Bad(spoiled(lambda y: y * torch.nan), "NaN or inf"),
    "inf output": Bad(spoiled(lambda y: y + torch.inf), "NaN or inf"),
    "detached output": Bad(spoiled(lambda y: y.detach()), "does not depend on the selected parameters"),
    "other number of outputs": Bad(spoiled(lambda y: y[:, :2]), "expected 3 outputs per example, the model gives 2"),
    "target too short": Bad(lambda m, model, x, y: m.update(x, y[:-1]), "one row for each of the 6 inputs"),
    "target too long": Bad(lambda m, model, x, y: m.update(x, y.repeat(2)), "one row for each of the 6 inputs"),
    "scalar target": Bad(lambda m, model, x, y: m.update(x, y[0]), "one row for each of the 6 inputs"),
    "class too high": Bad(lambda m, model, x, y: m.update(x, y + 1), r"class indices in \[0, 3\), got 3"),
    "class negative": Bad(lambda m, model, x, y: m.update(x, y - 1), r"class indices in \[0, 3\), got -1"),
    "float classes": Bad(lambda m, model, x, y: m.update(x, y.float()), r"Convert labels with \.long\(\)"),
    "values of another width": Bad(lambda m, model, x, y: m.update(x, torch.zeros(6, 2)), r"expected values \(n, 3\)"),
    "nan target": Bad(lambda m, model, x, y: m.update(x, torch.full((6, 3), torch.nan)), "finite values"),
    "complex target": Bad(lambda m, model, x, y: m.update(x, torch.zeros(6, 3) * 1j), "real tensor", TypeError),
    "target is a list": Bad(lambda m, model, x, y: m.update(x, y.tolist()), "got list", TypeError),
    "constant total": Bad(constant_total, "constant ones: alignment is undefined"),
    "empty batch": Bad(lambda m, model, x, y: m.update(x[:0], y[:0]), "at least one example"),
    "inputs is a number": Bad(lambda m, model, x, y: m.update(3.0, y), "got float", TypeError),
    "inputs hold a string": Bad(lambda m, model, x, y: m.update((x, "a"), y), "got a str", TypeError),
    "inputs disagree": Bad(lambda m, model, x, y: m.update((x, x[:2]), y), r"same number of examples.*\[2, 6\]"),
    "inputs without axes": Bad(lambda m, model, x, y: m.update(x[0, 0], y), "without axes"),
    "no inputs": Bad(lambda m, model, x, y: m.update({}, y), "same number of examples"),
    "predictions as inputs": Bad(lambda m, model, x, y: m.update(model.lin(x), y), "keywords: update"),
    "two directions": Bad(lambda m, model, x, y: TangentAlignment(model, 3, sketch_dim=2), "an integer of at least 3"),
    "num_outputs": Bad(lambda m, model, x, y: TangentAlignment(model, 0), "num_outputs"),
    "method": Bad(lambda m, model, x, y: TangentAlignment(model, 3, method="fast"), "'sketch' or 'exact'"),
    "target mean": Bad(lambda m, model, x, y: TangentAlignment(model, 3, target_mean=[0.5, 0.5]), "3 finite values"),
    "cotangents": Bad(
        lambda m, model, x, y: TangentFeatures(model).pullback(x, torch.ones(6, 3)),
        r"expected \(m, n, c\) = \(m, 6, 3\)",
    ),
    "directions missing": Bad(
        lambda m, model, x, y: TangentFeatures(model).pushforward(x, {"lin.weight": torch.ones(2, 3, 4)}),
        "1 missing|lin.bias",
    ),
    "directions of another shape": Bad(
        lambda m, model, x, y: TangentFeatures(model).pushforward(
            x, {"lin.weight": torch.ones(2, 3, 4), "lin.bias": torch.ones(1, 3)}
        ),
        r"'lin.bias' of shape \(2, 3\)",
    ),
    "no kernel": Bad(lambda *_: functional.spectrum(torch.eye(4)), r"expected a kernel \(n, c, n, c\)"),
    "kernel of two batches": Bad(lambda *_: functional.center(torch.ones(2, 3, 4, 3)), r"expected a kernel"),
    "alignment of other length": Bad(
        lambda *_: functional.alignment(torch.ones(2, 3, 2, 3), torch.zeros(4, 3)), "one row for each of the 2"
    ),
    "trace ratio of none": Bad(lambda *_: functional.trace_ratio(torch.ones(1, 1, 1, 1), 0), "positive integer"),
    "kare of a negative kernel": Bad(
        lambda *_: functional.kare(-torch.ones(2, 1, 2, 1), torch.tensor([0.0, 1.0]), 0.5), "positive semi-definite"
    ),
    "ridge": Bad(lambda *_: functional.kare(torch.ones(2, 1, 2, 1), torch.tensor([0, 1]), 0.0), "positive"),
    "targets by another name": Bad(lambda *_: encode(torch.zeros(3, 2, 2), 2), r"expected values \(n, 2\)"),
    "one column": Bad(lambda *_: moments.frobenius2(moments.of(torch.ones(3, 1, 1), torch.ones(3, 1))), "at least 2"),
    "no direction": Bad(lambda *_: sketches.gaussian(0, 0), "positive integer"),
}


@pytest.mark.parametrize("method", ["sketch", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_clear_error_and_nothing_changed(name, method):
    case = CASES[name]
    model = Broken()
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    metric = TangentAlignment(model, 3, sketch_dim=4, method=method)
    metric.update(x, y)
    value, count = metric.compute(), metric.update_count
    states = {k: copy(v) for k, v in metric.metric_state.items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(case.error, match=case.message):
        case.act(metric, model, x, y)
    assert metric.update_count == count
    for key, state in metric.metric_state.items():
        torch.testing.assert_close(state, states[key], rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert torch.equal(rng, torch.get_rng_state())
    metric._computed = None
    assert metric.compute() == value


def copy(state):
    return [v.clone() for v in state] if isinstance(state, list) else state.clone()


def test_own_errors_of_the_model_come_through():
    model, _, _ = build("mlp")
    features = TangentFeatures(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        features.kernel(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        features.pushforward(torch.randn(3, 5), sketches.gaussian(2, seed=0))


class Named(nn.Module):
    """A linear model with keywords, whose outputs have names or places."""

    def __init__(self, wrap):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, pixels, mask=None):
        return self.wrap(self.lin(pixels))


@pytest.mark.parametrize(
    ("inputs", "wrap", "hint"),
    [
        (lambda x: x, lambda y: {"loss": y, "logits": y}, "model(x)['logits']"),
        (lambda x: {"pixels": x}, lambda y: {"loss": y, "logits": y}, "model(**x)['logits']"),
        (lambda x: {"pixels": x}, lambda y: {"out": y}, "model(**x)['out']"),
        (lambda x: (x, x), lambda y: (y, y), "model(*x)[0]"),
        (lambda x: x, lambda y: {"out": [y]}.items(), "model(x).logits"),
    ],
)
def test_the_hint_of_forward_fn_is_code_that_runs(inputs, wrap, hint):
    x, model = inputs(torch.randn(5, 4)), Named(wrap)
    with pytest.raises(TypeError, match="Select it with forward_fn") as caught:
        TangentFeatures(model).outputs(x)
    code = str(caught.value).partition("forward_fn=")[2].rstrip(".")
    assert code == f"lambda model, x: {hint}"
    if not hint.endswith(".logits"):
        forward_fn = eval(code)
        assert TangentFeatures(model, forward_fn=forward_fn).outputs(x).shape == (5, 3)
