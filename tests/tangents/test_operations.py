"""Functions of torch one by one, between two linear layers: value and slope of all that is differentiated."""

import re

import pytest
import torch
from operation_cases import OPERATIONS, masked
from second_order import compare
from tensor_cases import TENSOR_OPERATIONS
from torch import nn

ALL = {**OPERATIONS, **TENSOR_OPERATIONS}
ONCE = {
    "torch.segment_reduce": "segment_reduce",
    "F.multilabel_margin_loss": "multilabel_margin_loss",
    "F.ctc_loss": "ctc_loss",
}
"""Differentiated once only: the name in the error."""
SINGLE = {
    "torch.to float32 and back": {"rtol": 1e-6, "slopes": 0.05},
    "F.hardsigmoid": {"rtol": 1e-6},
    "F.hardsigmoid, inplace": {"rtol": 1e-6},
}
"""In single precision on the way, which differences feel; so is torch's sixth in hardsigmoid."""


class Between(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.first = nn.Linear(4, 6)
        with torch.no_grad():
            width = operation(torch.rand(2, 6, dtype=torch.float64)).reshape(2, -1).shape[1]
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        h = self.operation(self.first(x))
        return self.last(torch.tanh(h.reshape(len(x), -1)))


def of(operation, **options):
    torch.manual_seed(0)
    model, x = Between(operation).double(), torch.randn(3, 4, dtype=torch.float64)
    return compare(model, x, torch.tensor([0, 1, 0]), **options)


MENDED = (
    "hardsigmoid glu norm cdist pdist distance cosine std atan2 copysign sinc lp_pool logcumsumexp margin det solve "
    "householder select_scatter weight sparse func checkpoint float32"
)


def rows():
    """Those that were wrong once, and every other one of the rest; all of them with ``-m thorough``."""
    for i, name in enumerate(ALL):
        quick = i % 2 == 0 or any(word in name for word in MENDED.split())
        if name not in ONCE:
            yield name if quick else pytest.param(name, marks=pytest.mark.thorough)


@pytest.mark.parametrize("name", rows())
def test_values_and_slopes(name):
    wrong = {key: said for key, said in of(ALL[name], **SINGLE.get(name, {})).items() if said != "right"}
    assert not wrong


@pytest.mark.parametrize("name", ONCE)
def test_what_is_differentiated_once_only_is_named(name):
    """Products and the exact kernel are right all the same, as the errors say."""
    found = of(ALL[name])
    assert {key for key, said in found.items() if said == "right"} == {"kernel", "trace", "grams", "pullback"}
    for key, said in found.items():
        if key == "pushforward":
            assert re.search(rf"no pushforward through .*\(Between\).*{ONCE[name]}.*method='exact'", str(said))
        elif said != "right":
            assert f"operations that torch can differentiate twice, got {ONCE[name]}. Write it with" in str(said)


NO_DERIVATIVE = {
    "torch.hypot",  # NaN in the first derivative
    "torch.corrcoef",
    "torch.linalg.det",  # equal singular values
    "torch.linalg.svd",
    "torch.linalg.svdvals",
    "torch.linalg.matrix_norm, nuc",
    "torch.linalg.cond",
    "torch.fft.fft2",  # the angle of zero
    "torch.sgn of complex",
    "torch.scatter_reduce, prod",
    "torch.to float32 and back",  # too coarse for differences
    "renorm_",
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [name for name in ALL if "padding" not in name and name not in ONCE.keys() | NO_DERIVATIVE]
)
def test_with_a_padded_example(name):
    wrong = {key: said for key, said in of(masked(ALL[name]), **SINGLE.get(name, {})).items() if said != "right"}
    assert not wrong
