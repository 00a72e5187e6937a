"""Primitive normalisations give what torch's fused ones give."""

import pytest
import torch
import torch.nn.functional as F
from alignreg.normalization import PrimitiveNormalization
from torch import nn


def x(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def batch_norm(cls, *shape, **options):
    norm = cls(shape[1], **options).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2)
    return norm, x(*shape)


CASES = {
    "layer": lambda: (nn.LayerNorm((3, 4)).double(), x(5, 2, 3, 4)),
    "layer, no affine": lambda: (nn.LayerNorm(4, elementwise_affine=False, eps=0.1), x(5, 4)),
    "layer, no bias": lambda: (nn.LayerNorm(4, bias=False).double(), x(5, 4)),
    "rms": lambda: (nn.RMSNorm(4).double(), x(5, 4)),
    "rms, eps": lambda: (nn.RMSNorm((3, 4), eps=0.1).double(), x(5, 3, 4)),
    "group": lambda: (nn.GroupNorm(2, 4).double(), x(5, 4, 3, 3)),
    "group, flat": lambda: (nn.GroupNorm(2, 4).double(), x(5, 4)),
    "batch, evaluation": lambda: (batch_norm(nn.BatchNorm2d, 3, 4, 2, 2)[0].eval(), x(3, 4, 2, 2)),
    "batch, no affine": lambda: (nn.BatchNorm1d(4, affine=False).double().eval(), x(5, 4)),
    "batch, training": lambda: (nn.BatchNorm1d(4, track_running_stats=False).double(), x(5, 4)),
    "instance": lambda: (nn.InstanceNorm2d(4, affine=True).double(), x(5, 4, 3, 3)),
    "instance, running": lambda: (
        batch_norm(nn.InstanceNorm1d, 3, 4, 6, affine=True, track_running_stats=True)[0].eval(),
        x(3, 4, 6),
    ),
    "torch.batch_norm": lambda: (
        lambda t: torch.batch_norm(t, None, None, t[0] * 0, t[0] * 0 + 2, False, 0.1, 1e-3, False),
        x(5, 4),
    ),
    "torch.instance_norm": lambda: (
        lambda t: torch.instance_norm(t, None, None, None, None, True, 0.1, 1e-3, False),
        x(5, 4, 6),
    ),
    "torch.layer_norm": lambda: (lambda t: torch.layer_norm(t, (4,)), x(5, 4)),
    "torch.rms_norm": lambda: (lambda t: torch.rms_norm(t, (4,)), x(5, 4)),
    "torch.group_norm": lambda: (lambda t: torch.group_norm(t, 2), x(5, 4)),
    "weight": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double(), x(5, 4)),
    "weight, other axis": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=1).double(), x(5, 4)),
    "weight, whole": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=None).double(), x(5, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    fn, inputs = CASES[name]()
    expected = fn(inputs)
    with PrimitiveNormalization():
        torch.testing.assert_close(fn(inputs), expected, rtol=1e-9, atol=1e-10)


def test_other_functions_are_left_alone():
    with PrimitiveNormalization():
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
