"""On a GPU torch may round the factors of products to ten bits, as it does in convolutions by default."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alignreg import TangentFeatures
from alignreg.tangents import linearization
from alignreg.tangents.primitives.precision import rounds_products

PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
}


class TF32(TorchDispatchMode):
    """Rounds as such a GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            args = tuple(self._rounded(part) for part in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        bits = value.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def problem(seed):
    torch.manual_seed(seed)
    layers, before = [], 3
    for _ in range(20):
        layers += [nn.Conv2d(before, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
        before = 8
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    return net, torch.randn(8, 3, 8, 8)


def rounded(seed):
    net, x = problem(seed)
    with warnings.catch_warnings(), TF32():
        warnings.simplefilter("error")
        return TangentFeatures(net).kernel(x)


def test_rounded_products_pass_for_the_same_function(monkeypatch):
    """What rounds to ten bits is held to ten bits, and goes by the rules of its layers without a word."""
    with pytest.raises((RuntimeError, UserWarning), match=r"self-check|does not give its gradients"):
        for seed in range(4):
            rounded(seed)
    monkeypatch.setattr(linearization, "rounds_products", lambda device: True)
    for seed in range(4):
        net, x = problem(seed)
        exact = TangentFeatures(net).kernel(x)
        assert (rounded(seed) - exact).norm() < 2e-2 * exact.norm()


def test_settings_of_torch(monkeypatch):
    """Convolutions round by default on a GPU, nothing on a CPU; float64 never."""
    gpu, matmul, cudnn = torch.device("cuda", 0), torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    found = {}
    try:
        for setting in ((False, True), (True, False), (False, False)):
            matmul.allow_tf32, cudnn.allow_tf32 = setting
            found[setting] = rounds_products(gpu)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    assert found == {(False, True): True, (True, False): True, (False, False): False}
    assert not rounds_products(torch.device("cpu"))
