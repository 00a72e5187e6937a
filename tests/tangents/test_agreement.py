"""When two ways to the same outputs or derivatives agree."""

import warnings

import pytest
import torch
from small_networks import X, mlp
from torch import nn

from alignreg import TangentFeatures
from alignreg.tangents import agreement

DIGITS = [(torch.float64, 1.0), (torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.0)]


@pytest.mark.parametrize(("precision", "scale"), DIGITS)
def test_rounding_agrees_and_a_larger_difference_does_not(precision, scale):
    """Relative to what was computed; where that vanishes, to the rounding of all else."""
    scale, whole = torch.tensor(scale), torch.tensor(1e3)
    allowed = agreement.tolerance(precision) * scale + 10 * torch.finfo(precision).eps * whole
    assert agreement.agrees(0.99 * allowed, scale, precision, whole=whole)
    assert not agreement.agrees(1.01 * allowed, scale, precision, whole=whole)
    assert not agreement.agrees(torch.tensor(torch.nan), scale, precision, whole=whole)
    alone = agreement.tolerance(precision) * scale
    assert agreement.agrees(0.99 * alone, scale, precision)
    assert not agreement.agrees(1.01 * alone + 1e-30, scale, precision)


class Masked(nn.Module):
    """Logits of which one is masked, or outputs with a large bias."""

    def __init__(self, net, offset):
        super().__init__()
        self.net = net
        self.register_buffer("offset", torch.tensor(offset))

    def forward(self, x):
        return self.net(x) + self.offset


OFFSETS = {"masked": [0.0, -1e8, 0.0], "bias": [2e5, 2e5, 2e5]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", OFFSETS)
def test_comparisons_see_past_a_large_constant(offset, dtype):
    x = torch.randn(9, 4, dtype=dtype)
    plain = Masked(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), OFFSETS[offset]).to(dtype)
    assert TangentFeatures(plain).agree(x, plain(x))
    dropping = Masked(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)), OFFSETS[offset]).to(dtype)
    assert not TangentFeatures(dropping).agree(x, dropping(x))
    assert TangentFeatures(dropping.eval()).agree(x, dropping(x))
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="depend on the other examples"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TangentFeatures(Masked(mixing, OFFSETS[offset]).to(dtype)).kernel(x)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_examples_that_are_mixed_are_noticed(n):
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="depend on the other examples"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TangentFeatures(mixing).kernel(X[:n])


class FromOneOn(nn.Module):
    """Another function of all examples but the first."""

    def __init__(self, *, last_only=False):
        super().__init__()
        self.net, self.last_only = mlp(), last_only

    def forward(self, x):
        y = self.net(x)
        if self.training:
            shift = torch.zeros(len(y), 1, dtype=y.dtype)
            shift[-1 if self.last_only else slice(1, None)] = 0.1
            y = y + shift
        return y


@pytest.mark.parametrize("last_only", [True, False])
def test_agreement_looks_past_the_first_example(last_only):
    model = FromOneOn(last_only=last_only).train()
    assert not TangentFeatures(model).agree(X, model(X))
    assert TangentFeatures(model.eval()).agree(X, model(X))
