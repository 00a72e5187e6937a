"""Functions from primitives give what torch's own give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignreg.tangents.primitives import Primitives

HALF = (torch.bfloat16, torch.float16)


def x(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def batch_norm(cls, *shape, **options):
    norm = cls(shape[1], **options).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2)
    return norm, x(*shape)


NORMALIZATIONS = {
    "layer": lambda: (nn.LayerNorm((3, 4)).double(), x(5, 2, 3, 4)),
    "layer, no affine": lambda: (nn.LayerNorm(4, elementwise_affine=False, eps=0.1), x(5, 4)),
    "layer, no bias": lambda: (nn.LayerNorm(4, bias=False).double(), x(5, 4)),
    "rms": lambda: (nn.RMSNorm(4).double(), x(5, 4)),
    "rms, eps": lambda: (nn.RMSNorm((3, 4), eps=0.1).double(), x(5, 3, 4)),
    "rms of tiny numbers": lambda: (nn.RMSNorm(4).double(), x(5, 4) * 1e-4),
    "group": lambda: (nn.GroupNorm(2, 4).double(), x(5, 4, 3, 3)),
    "group, flat": lambda: (nn.GroupNorm(2, 4).double(), x(5, 4)),
    "batch, evaluation": lambda: (batch_norm(nn.BatchNorm2d, 3, 4, 2, 2)[0].eval(), x(3, 4, 2, 2)),
    "batch, no affine": lambda: (nn.BatchNorm1d(4, affine=False).double().eval(), x(5, 4)),
    "batch, training": lambda: (nn.BatchNorm1d(4, track_running_stats=False).double(), x(5, 4)),
    "batch, cumulative": lambda: (batch_norm(nn.BatchNorm1d, 5, 4, momentum=None)[0].train(), x(5, 4)),
    "instance": lambda: (nn.InstanceNorm2d(4, affine=True).double(), x(5, 4, 3, 3)),
    "instance, running": lambda: (
        batch_norm(nn.InstanceNorm1d, 3, 4, 6, affine=True, track_running_stats=True)[0].eval(),
        x(3, 4, 6),
    ),
    "weight": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double(), x(5, 4)),
    "weight, other axis": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=1).double(), x(5, 4)),
    "weight, whole": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=None).double(), x(5, 4)),
}
aten = torch.ops.aten
FUNCTIONS = {
    "torch.batch_norm": lambda t: torch.batch_norm(t, None, None, t[0] * 0, t[0] * 0 + 2, False, 0.1, 1e-3, False),
    "torch.instance_norm": lambda t: torch.instance_norm(
        t[:, :, None] * t[:, None], None, None, None, None, True, 0.1, 1e-3, False
    ),
    "torch.layer_norm": lambda t: torch.layer_norm(t, (6,)),
    "torch.rms_norm": lambda t: torch.rms_norm(t, (6,)),
    "torch.group_norm": lambda t: torch.group_norm(t, 2),
    "hardsigmoid": lambda t: F.hardsigmoid(4 * t),
    "hardsigmoid, in place": lambda t: F.hardsigmoid(t.clone(), inplace=True),
    "hardsigmoid, exported": aten.hardsigmoid.default,
    "logcumsumexp": lambda t: torch.logcumsumexp(t, 0),
    "logcumsumexp, ordered": lambda t: t.sort(1)[0].mul(1000).logcumsumexp(-1),
    "logcumsumexp, nothing": lambda t: torch.logcumsumexp(t.masked_fill(t < 9, -torch.inf), 1),
    "norm": torch.norm,
    "norm, axis": lambda t: t.norm(dim=1),
    "norm, p": lambda t: t.norm(3, 1, True),
    "norm, Frobenius": lambda t: t.norm("fro", (0, 1)),
    "norm, inf": lambda t: torch.norm(t, torch.inf, dim=0),
    "norm, 0": lambda t: torch.norm(t, 0, dim=0),
    "norm, below 1": lambda t: torch.norm(t, -1.5, dim=0),
    "linalg.norm": torch.linalg.norm,
    "linalg.norm, axis": lambda t: torch.linalg.norm(t, dim=1, keepdim=True),
    "linalg.norm, order of vectors": lambda t: torch.linalg.norm(t, 1, dim=1),
    "linalg.norm, order of matrices": lambda t: torch.linalg.norm(t, "fro"),
    "linalg.norm, of vectors": lambda t: torch.linalg.norm(t[0], 3),
    "vector_norm": torch.linalg.vector_norm,
    "vector_norm, exported": lambda t: aten.linalg_vector_norm.default(t, 2, [1], True),
    "vector_norm, axes": lambda t: torch.linalg.vector_norm(t.reshape(5, 2, 3), 2, (1, 2), True),
    "vector_norm, of numbers": lambda t: torch.linalg.vector_norm(t[0, 0]),
    "matrix_norm": lambda t: torch.linalg.matrix_norm(t.reshape(5, 2, 3)),
    "matrix_norm, keepdim": lambda t: torch.linalg.matrix_norm(t, keepdim=True),
    "normalize": F.normalize,
    "normalize, other": lambda t: F.normalize(t, 3.0, 0, 0.9),
    "cosine": lambda t: F.cosine_similarity(t, t.roll(1, 0)),
    "cosine, broadcast": lambda t: F.cosine_similarity(t[:, None], t[None], dim=-1),
    "cosine, small": lambda t: torch.cosine_similarity(t * 1e-5, t.flip(0), eps=1e-3),
    "renorm": lambda t: torch.renorm(t, 2, 0, 1.5),
    "renorm, other axis": lambda t: t.renorm(1, -1, 1.5),
    "dist": lambda t: torch.dist(t, t.flip(0), 3),
    "pairwise": lambda t: F.pairwise_distance(t, t.flip(0), eps=1e-3, keepdim=True),
    "cdist": lambda t: torch.cdist(t, t[:3]),
    "cdist, p": lambda t: torch.cdist(t.reshape(5, 2, 3), t.reshape(5, 2, 3), p=1.0),
    "cdist, inf": lambda t: torch.cdist(t, t, p=float("inf")),
    "cdist, 0": lambda t: torch.cdist(t, t, p=0.0),
    "pdist": F.pdist,
    "pdist, p": lambda t: F.pdist(t, 1.0),
    "lp_pool1d": lambda t: F.lp_pool1d(t.abs()[:, None], 2.5, 3),
    "lp_pool2d": lambda t: F.lp_pool2d(t[:, None, None] * t[:, None, :, None], 2.0, (2, 3), ceil_mode=True),
    "lp_pool2d, odd": lambda t: F.lp_pool2d(t.abs()[:, None, None] * t.abs()[:, None, :, None], 3, 2, 1),
    "lp_pool3d": lambda t: F.lp_pool3d(t.square().reshape(5, 1, 1, 2, 3), 2.0, (1, 2, 3)),
    "std": torch.std,
    "std, axis": lambda t: t.std(1, keepdim=True, unbiased=False),
    "std, correction": lambda t: torch.std(t, dim=(0, 1), correction=0),
    "std_mean": lambda t: torch.stack(torch.std_mean(t, 1)),
    "atan2": lambda t: torch.atan2(t, t[:1]),
    "atan2, zeros": lambda t: torch.atan2(t * 0, -t * 0),
    "copysign": lambda t: torch.copysign(t, -t.flip(0)),
    "copysign, number": lambda t: (t * (t > 0)).copysign(-1.0),
    "sinc": lambda t: torch.sinc(t * (t > 0)),
    "multi_margin": lambda t: F.multi_margin_loss(t, torch.arange(5)),
    "multi_margin, weighted": lambda t: F.multi_margin_loss(t, torch.arange(5), 2, 0.3, t[0].exp(), reduction="sum"),
    "multi_margin, one": lambda t: F.multi_margin_loss(t[0], torch.tensor(2), reduction="none"),
}
TOKENS = torch.tensor([[1, 4, 4], [0, 2, 3], [5, 5, 1]])
BAGS = {
    **{mode: lambda w, mode=mode: F.embedding_bag(TOKENS, w, mode=mode) for mode in ("sum", "mean", "max")},
    **{
        f"{mode}, offsets, padding": lambda w, mode=mode: F.embedding_bag(
            TOKENS.flatten(), w, torch.tensor([0, 2, 2, 7]), mode=mode, padding_idx=4
        )
        for mode in ("sum", "mean", "max")
    },
    "last offset": lambda w: F.embedding_bag(
        TOKENS.flatten(), w, torch.tensor([0, 2, 2, 9]), include_last_offset=True, mode="sum"
    ),
    "weighted": lambda w: F.embedding_bag(
        TOKENS, w, mode="sum", per_sample_weights=w[0, :3].expand(3, -1).contiguous()
    ),
    "rescaled": lambda w: F.embedding_bag(TOKENS, w.clone(), max_norm=0.5),
}


def agree(function, *inputs, rtol=1e-9, atol=1e-10):
    expected = function(*inputs)
    for backward_only in (True, False):
        with Primitives(backward_only=backward_only):
            torch.testing.assert_close(function(*inputs), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations(name):
    agree(*NORMALIZATIONS[name]())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    single = {"rtol": 1e-7, "atol": 1e-8} if "hardsigmoid" in name else {}  # torch's sixth is one in single precision
    agree(FUNCTIONS[name], x(5, 6), **single)


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings(name):
    agree(BAGS[name], x(6, 6))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_half_precision_is_computed_in_single(name, dtype, weights):
    """As in torch, also of weights and statistics that were left in single."""
    module, inputs = NORMALIZATIONS[name]()
    module = module.to(dtype if weights == "half" or name.startswith("weight") else torch.float32)
    eps = torch.finfo(dtype).eps
    agree(module, inputs.to(dtype), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["hardsigmoid", "norm, axis", "normalize", "std, axis", "cosine", "renorm"])
def test_functions_in_half_precision(name, dtype):
    eps = torch.finfo(dtype).eps
    agree(FUNCTIONS[name], x(5, 6, dtype=dtype), rtol=4 * eps, atol=4 * eps)


def test_a_result_that_is_given_is_filled():
    out = torch.empty(5, dtype=torch.float64)
    with Primitives():
        torch.linalg.vector_norm(torch.ones(5, 4, dtype=torch.float64), dim=1, out=out)
    assert torch.equal(out, torch.full((5,), 2.0, dtype=torch.float64))


def test_other_functions_are_left_alone():
    with Primitives():
        assert torch.equal(F.relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def test_what_is_checkpointed_is_what_it_will_be_when_it_runs_again():
    inputs = x(5, 6).requires_grad_()
    with Primitives():
        y = torch.utils.checkpoint.checkpoint(F.hardsigmoid, inputs, use_reentrant=False)
    assert y.grad_fn.name() == "HardsigmoidBackward0"
