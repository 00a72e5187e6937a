"""Rules for what parameters meet in hand-written blocks: derivatives of kernels, precisions, what is looked at."""

import copy
import warnings

import pytest
import torch
from block_cases import BLOCKS
from layer_cases import build
from oracles import call, double, jacobian, kernel

from alignreg import TangentFeatures
from alignreg.tangents.kernel import recorder

# Torch's second derivative of weight normalization is wrong, so it has no oracle here.
SECOND = sorted(BLOCKS.keys() - {"weight norm", "gpt, as many positions as examples", "patches, as many as examples"})


def formula(model, x, probe):
    """⟨probe, K⟩ and its gradient, by two backward passes of each output."""
    model = copy.deepcopy(model).double().eval()
    params = [p for p in model.parameters() if p.requires_grad]
    y = call(model, double(x))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, params, create_graph=True, materialize_grads=True)])
        for out in y.flatten()
    ]
    phi = torch.stack(rows)
    value = ((phi @ phi.T) * probe).sum()
    return torch.autograd.grad(value, params, materialize_grads=True)


@pytest.mark.filterwarnings("error:the (rule for|exact kernel):UserWarning")
@pytest.mark.parametrize("name", SECOND)
def test_kernels_can_be_differentiated(name):
    model, x, _ = build(name)
    model, x = model.double().eval(), double(x)
    size = model(x).numel()
    probe = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = formula(model, x, probe)
    params = [p for p in model.parameters() if p.requires_grad]
    K = TangentFeatures(model).kernel(x, create_graph=True)
    found = torch.autograd.grad((K.reshape(size, size) * probe).sum(), params, materialize_grads=True)
    scale = max(float(g.abs().max()) for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["patches, some masked", "gpt, tied, bias", "convnext", "odd"])
def test_kernels_of_one_output_after_the_other_can_be_differentiated(name, monkeypatch):
    """As models with checkpointed modules have them."""

    def fails(*_, **__):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(recorder, "vmap", fails)
    test_kernels_can_be_differentiated(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["rms norm of gemma", "gpt, tied, bias", "patches, some masked", "experts", "lstm, two directions, packed"]
)
def test_lower_precision(name, dtype):
    model, x, _ = build(name)
    model, x = model.to(dtype).eval(), x.to(dtype) if x.is_floating_point() else x
    oracle = kernel(jacobian(model, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        K = TangentFeatures(model).kernel(x)
    assert (K.double() - oracle).norm() < (1e-5 if dtype == torch.float32 else 0.05) * oracle.norm()
