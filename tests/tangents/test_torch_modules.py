"""Modules of torch.nn one by one: value and slope of all that is differentiated; as scripts, traces and exports."""

import re

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make
from module_cases import MODULES, Between, build
from second_order import compare
from torch import nn

from alignreg import TangentFeatures

LABELS = torch.tensor([0, 1, 0, 1, 1])
BY_FREQUENCY = "nn.Embedding, by frequency"


def wrong(model, x, **options):
    return {key: said for key, said in compare(model, x, LABELS[: len(x)], **options).items() if said != "right"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != BY_FREQUENCY])
def test_values_and_slopes(name):
    assert not wrong(*build(name), rtol=1e-6 if name == "nn.Hardsigmoid" else 1e-9)


def test_gradients_that_are_no_derivatives_are_not_differentiated():
    for key, said in compare(*build(BY_FREQUENCY), LABELS[:3]).items():
        if key.endswith("'") or key == "pushforward":
            assert re.search(r"embedding: expected scale_grad_by_freq=False, got True.*Leave it out", str(said))
        else:
            assert said == "right"


class OwnStatistics(nn.Module):
    """Batch normalization that takes the statistics of the batch, whatever its mode."""

    def __init__(self, channels, affine=True, running=True, momentum=0.1, memory_format=None):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5) if affine else None
        self.bias = nn.Parameter(torch.randn(channels)) if affine else None
        self.register_buffer("mean", torch.zeros(channels) if running else None)
        self.register_buffer("var", torch.ones(channels) if running else None)
        self.momentum, self.memory_format = momentum, memory_format

    def forward(self, h):
        h = h if self.memory_format is None else h.contiguous(memory_format=self.memory_format)
        return F.batch_norm(h, self.mean, self.var, self.weight, self.bias, True, self.momentum)


OF_THE_BATCH = {
    "vectors": lambda: Between(OwnStatistics(6), (6,)),
    "sequences": lambda: Between(OwnStatistics(2), (2, 8)),
    "images": lambda: Between(OwnStatistics(2), (2, 4, 4)),
    "images, channels last": lambda: Between(OwnStatistics(2, memory_format=torch.channels_last), (2, 4, 4)),
    "volumes": lambda: Between(OwnStatistics(2), (2, 2, 2, 2)),
    "no affine": lambda: Between(OwnStatistics(2, affine=False), (2, 4, 4)),
    "no running statistics": lambda: Between(OwnStatistics(2, running=False), (2, 4, 4)),
    "momentum": lambda: Between(OwnStatistics(6, momentum=0.0), (6,)),
}


@pytest.mark.parametrize("case", OF_THE_BATCH)
def test_statistics_of_the_batch_are_functions_of_the_weights(case):
    torch.manual_seed(0)
    model = OF_THE_BATCH[case]().double()
    before = {name: value.clone() for name, value in model.named_buffers()}
    found = wrong(model, torch.randn(5, 4, dtype=torch.float64))
    assert found.keys() == {"kernel", "kernel'", "kare'"}
    assert all("depend on the other examples of its batch" in str(said) for said in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def _scripted(module, h):
    return torch.jit.script(module)


def _exported(module, h):
    found = torch.export.export(module, (h,)).module()
    found.__dict__.update(train=lambda mode=True: None, eval=lambda: None)  # not taken by exported modules
    return found


def _decomposed(module, h):
    found = torch.export.export(module, (h,)).run_decompositions().module()
    found.__dict__.update(train=lambda mode=True: None, eval=lambda: None)
    return found


COMPILED = {
    "scripted": _scripted,
    "traced": torch.jit.trace,
    "exported": _exported,
    "decomposed": _decomposed,
}
SOME = ["nn.LayerNorm", "nn.InstanceNorm1d", "nn.BatchNorm2d", "nn.GELU", "nn.Conv2d, circular"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SOME[:2] + [pytest.param(name, marks=pytest.mark.thorough) for name in SOME[2:4]])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_ahead(kind, name):
    model, x = build(name)
    model.module = COMPILED[kind](model.module, model.first(x).reshape(3, *model.shape).detach())
    assert not wrong(model, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_script_differentiates_once_only_is_named():
    """No replacement reaches what runs inside it."""
    model, x = build("nn.Hardsigmoid")
    model.module = torch.jit.script(model.module)
    found = wrong(model, x)
    assert found.keys() == {
        "kernel'",
        "trace'",
        "grams'",
        "pullback'",
        "pushforward'",
        "complexity'",
        "alignment'",
        "kare'",
    }
    assert all("can differentiate twice, got hardsigmoid" in str(said) for said in found.values())


HALF = ["nn.BatchNorm1d", "nn.BatchNorm2d", "nn.GroupNorm", "nn.InstanceNorm1d", "nn.LayerNorm", "nn.RMSNorm"]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("norms", ["half", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_with_normalizations_in_either(name, dtype, norms, create_graph):
    """A network in half precision, its normalization perhaps left in single."""
    model, x = build(name)
    expected = TangentFeatures(model).trace(x)
    risk = make("kare", model, weight=1.0)(x, LABELS[:3]).detach()
    model = model.to(dtype)
    if norms == "float32":
        model.module.float()
    value = TangentFeatures(model).trace(x.to(dtype), create_graph=create_graph)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected), rel=0.1)
    if create_graph:
        loss = make("kare", model, weight=1.0)(x.to(dtype), LABELS[:3])
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(risk), rel=0.3)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
