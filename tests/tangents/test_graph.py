"""Products of pullbacks, and when they come without the pullbacks."""

import pytest
import torch
from cases import MODELS
from layer_cases import features_of
from loss_cases import make
from oracles import matrix
from torch import nn

from alignreg import TangentFeatures
from alignreg.tangents.graph import _matmuls, dtypes, nodes, require_twice_differentiable, twice_differentiable


@pytest.mark.parametrize("name", MODELS)
def test_grams_are_products_of_pullbacks(name):
    features, x, oracle = features_of(name)
    n, c = next(iter(oracle.values())).shape[:2]
    omega = torch.randn(3, n, c, dtype=torch.float64)
    found = features.grams(x, omega)
    assert list(found) == list(features.parameters)
    for key, value in oracle.items():
        back = omega.flatten(1) @ matrix({key: value})
        torch.testing.assert_close(found[key], back @ back.T, rtol=1e-9, atol=1e-11)


class Uses(nn.Module):
    """A hidden weight that is used in some way."""

    def __init__(self, use):
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)
        self.use = use

    def forward(self, x):
        hidden = self.use(torch.tanh(self.first(x)), self.weight)
        return self.last(hidden.mean(1) if hidden.ndim == 3 else hidden)


def _in_place(h, w):
    return nn.functional.linear(h, w).relu_()


def _in_place_on_a_view(h, w):
    y = nn.functional.linear(h, w)
    y.view(-1, 2)[:, 0].mul_(2)
    return y


def _and_its_bias(h, w):
    return nn.functional.linear(torch.stack([h, h.sin()], 1), w, w[0])


def _scaled(h, w):
    return torch.addmm(h, h, w, alpha=2)


ONCE = {
    "linear": nn.functional.linear,
    "in place": _in_place,
    "in place on a view": _in_place_on_a_view,
    "positions": lambda h, w: nn.functional.linear(torch.stack([h, h.sin()], 1), w),
    "factor": lambda h, w: h @ w,
    "checkpointed": lambda h, w: torch.utils.checkpoint.checkpoint(nn.functional.linear, h, w, use_reentrant=False),
    "unused rows": lambda h, w: nn.functional.linear(h, w) * (torch.arange(4) < 2),
}
OTHERWISE = {
    "twice": lambda h, w: nn.functional.linear(torch.tanh(nn.functional.linear(h, w)), w),
    "and in a list": lambda h, w: nn.functional.linear(h, w) + torch.cat([w, w])[0],
    "and as its bias": _and_its_bias,
    "scaled": _scaled,
    "left": lambda h, w: (w @ h.T).T,
    "transposed twice": lambda h, w: h @ w.t().t(),
    "elementwise": lambda h, w: h * w[0],
    "not": lambda h, w: h,
}


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("use", {**ONCE, **OTHERWISE})
def test_weights_used_in_all_ways(use, reused):
    torch.manual_seed(0)
    model, x = Uses({**ONCE, **OTHERWISE}[use]).double(), torch.randn(3, 6, dtype=torch.float64)
    features = TangentFeatures(model)
    omega = torch.randn(9, 3, 3, dtype=torch.float64)
    outputs = model(x) if reused else None
    found = features.grams(x, omega, outputs=outputs, create_graph=True)
    back = features.pullback(x, omega, outputs=outputs, create_graph=True)
    factors = torch.randn(9, 9, dtype=torch.float64)

    def slopes(grams):
        total = sum((factors * gram.sin()).sum() for gram in grams.values())
        return torch.autograd.grad(total, list(model.parameters()), retain_graph=True, materialize_grads=True)

    expected = {name: value.flatten(1) @ value.flatten(1).T for name, value in back.items()}
    for name, gram in expected.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-10, atol=1e-12)
    for one, other in zip(slopes(found), slopes(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    products = _matmuls(model(x), dict(model.named_parameters()))
    assert set(products) == {"first.weight", "last.weight"} | ({"weight"} if use in ONCE else set())


class Stop(torch.autograd.Function):
    """The first of two tensors, without a gradient for it."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def test_a_product_that_no_gradient_reaches():
    torch.manual_seed(0)
    first, second, x = nn.Linear(5, 3), nn.Linear(5, 3), torch.randn(4, 5)
    model = nn.ModuleDict({"first": first, "second": second})
    features = TangentFeatures(model, forward_fn=lambda m, x: Stop.apply(m["first"](x), m["second"](x)))
    omega = torch.randn(6, 4, 3)
    found = features.grams(x, omega)
    back = {name: value.flatten(1) for name, value in features.pullback(x, omega).items()}
    for name, gram in found.items():
        torch.testing.assert_close(gram, back[name] @ back[name].T)
    assert not found["first.weight"].any()
    half = model.bfloat16()
    outputs = Stop.apply(half["first"](x.bfloat16()), half["second"](x.bfloat16())).float()
    back = TangentFeatures(half).pullback(x, omega, outputs=outputs)
    assert {value.dtype for value in back.values()} == {torch.bfloat16}
    assert found["second.weight"].all()


def test_the_shorter_way():
    """Through few vectors by their products, through many by the gradients of the weight."""
    weight = nn.Parameter(torch.randn(50, 60))
    for n, short in ((8, True), (2000, False)):
        y = torch.nn.functional.linear(torch.randn(n, 60), weight)
        (product,) = _matmuls(y, {"weight": weight}).values()
        assert product.is_short(4) is short


def test_grams_of_half_precision_are_summed_in_single():
    torch.manual_seed(0)
    model, x = nn.Linear(300, 3, bias=False).bfloat16(), torch.randn(4, 300).bfloat16()
    omega = torch.randn(2, 4, 3)
    gram = TangentFeatures(model).grams(x, omega)["weight"]
    assert gram.dtype == torch.float32
    back = torch.einsum("mnc,nd->mcd", omega.bfloat16().double(), x.double()).flatten(1)
    torch.testing.assert_close(gram, (back @ back.T).float(), rtol=1e-5, atol=1e-2)


def test_no_cotangents():
    with pytest.raises(ValueError, match="cotangents"):
        TangentFeatures(nn.Linear(2, 3)).grams(torch.ones(4, 2), torch.ones(2, 4, 5))
    assert TangentFeatures(nn.Linear(2, 3)).grams(torch.ones(4, 2), torch.ones(0, 4, 3))["bias"].shape == (0, 0)


class Square(torch.autograd.Function):
    """Can be differentiated once, and last in a network pretends to be linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def _bags(h):
    return nn.functional.embedding_bag(torch.tensor([[0, 1], [2, 2], [1, 0]]), h, mode="sum")


SERVES = {
    "norm": (lambda h: h.norm(dim=1, keepdim=True), True),
    "norm of zeros": (lambda h: (h * torch.tensor([[1.0], [0.0], [1.0]])).norm(dim=1, keepdim=True), False),
    "deviation of constants": (lambda h: h[:, :1].expand(-1, 3).std(1, keepdim=True), False),
    "hardsigmoid": (nn.functional.hardsigmoid, False),
    "distances": (lambda h: torch.cdist(h, h), False),
    "bags": (_bags, False),
    "sparse": (lambda h: nn.functional.embedding(torch.arange(3), h * 1, sparse=True), False),
    "fused normalization": (lambda h: nn.functional.layer_norm(h, (5,)), True),
}


@pytest.mark.parametrize("name", SERVES)
def test_outputs_that_can_be_differentiated_twice(name):
    function, serves = SERVES[name]
    assert twice_differentiable(function(nn.Linear(4, 5)(torch.randn(3, 4)))) is serves


def test_only_what_lies_on_the_way_must_be_differentiated_twice():
    """The head's features need a first derivative of what is below it."""
    first, last, x = nn.Linear(4, 5), nn.Linear(5, 2), torch.randn(3, 4)
    y = last(torch.ops.aten.hardsigmoid(first(x)))
    require_twice_differentiable(nodes(y), last.parameters())
    with pytest.raises(RuntimeError, match=r"can differentiate twice, got hardsigmoid\. Write it with others"):
        require_twice_differentiable(nodes(y), first.parameters())


@pytest.mark.parametrize("kind", ["complexity", "alignment", "kare"])
def test_losses_of_a_function_that_is_marked_as_differentiated_once(kind):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    reg = make(kind, net, weight=1.0, forward_fn=lambda m, x: Square.apply(m(x)))
    with pytest.raises(RuntimeError, match=r"can differentiate twice, got square"):
        reg(torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3)


def test_dtypes_on_the_way():
    """Also where nothing is kept for the backward pass."""
    assert dtypes(nodes(nn.Linear(4, 5)(torch.ones(3, 4)).bfloat16().double())) == {
        torch.float32,
        torch.bfloat16,
        torch.float64,
    }
