"""TangentFeatures against row-by-row gradients, over the models of cases.py."""

import itertools

import pytest
import torch
import torch.utils.checkpoint
from cases import MODELS, Noisy, build
from devices import CUDA
from layer_cases import LAYERS, features_of
from layer_cases import build as build_layers
from oracles import call, double, jacobian, kernel, matrix
from torch import nn

from alignreg import TangentFeatures, sketches


@pytest.mark.parametrize("name", MODELS)
def test_jacobian_and_trace(name):
    features, x, oracle = features_of(name)
    jac = features.jacobian(x)
    assert jac.keys() == oracle.keys()
    for key, value in oracle.items():
        torch.testing.assert_close(jac[key], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features.trace(x), matrix(oracle).square().sum(), rtol=1e-9, atol=0)
    assert features.num_parameters == matrix(oracle).shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_pushforward_of_identity_is_jacobian(name):
    features, x, oracle = features_of(name)
    names = [key for key in oracle if oracle[key][0, 0].numel() <= 64][:4]
    part = TangentFeatures(features.model, params=names, forward_fn=build(name)[2])
    size = sum(oracle[key][0, 0].numel() for key in names)
    identity, start = {}, 0
    for key in names:
        shape = oracle[key].shape[2:]
        block = torch.zeros(size, shape.numel(), dtype=torch.float64)
        block[start : start + shape.numel()] = torch.eye(shape.numel(), dtype=torch.float64)
        identity[key] = block.reshape(size, *shape)
        start += shape.numel()
    expected = matrix({key: oracle[key] for key in names}).reshape(*oracle[names[0]].shape[:2], size)
    torch.testing.assert_close(part.pushforward(x, identity), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_pullback_and_adjoint(name):
    features, x, oracle = features_of(name)
    n, c = next(iter(oracle.values())).shape[:2]
    omega = torch.randn(3, n, c, dtype=torch.float64)
    back = features.pullback(x, omega)
    for key, value in oracle.items():
        torch.testing.assert_close(back[key], torch.einsum("mnc,nc...->m...", omega, value), rtol=1e-9, atol=1e-11)
    directions = {key: torch.randn(2, *value.shape[2:], dtype=torch.float64) for key, value in oracle.items()}
    forth = features.pushforward(x, directions)
    left = torch.einsum("anc,ncb->ab", omega, forth)
    right = sum(torch.einsum("a...,b...->ab", back[key], directions[key]) for key in oracle)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_differentiable(name):
    """Gradients of scalar functions of each product equal central differences in one random direction."""
    model, x, forward_fn = build(name)
    model, x = model.double(), double(x)
    if name in {"mlp", "cnn", "resnet, batchnorm", "in-place, dropout"}:
        # Away from kinks: rectifiers would make the difference quotient jump.
        for module in model.modules():
            for key, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, key, nn.Softplus())
        if name == "resnet, batchnorm":
            pytest.skip("functional rectifiers inside the blocks; their second derivatives are those of mlp's")
        if name == "cnn":
            model[2] = nn.AvgPool2d(2)
    features = TangentFeatures(model, forward_fn=forward_fn)
    directions = sketches.gaussian(3, seed=0)
    n, c = features.outputs(x).shape
    omega = torch.randn(2, n, c, dtype=torch.float64)
    scalars = {
        "jacobian": lambda g: sum(v.pow(3).sum() for v in features.jacobian(x, create_graph=g).values()),
        "kernel": lambda g: features.kernel(x, create_graph=g).square().sum(),
        "trace": lambda g: features.trace(x, create_graph=g),
        "diagonal": lambda g: features.diagonal(x, create_graph=g).square().sum(),
        "pushforward": lambda g: features.pushforward(x, directions, create_graph=g).pow(3).sum(),
        "pullback": lambda g: sum(v.pow(3).sum() for v in features.pullback(x, omega, create_graph=g).values()),
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "coupled examples":
        del scalars["kernel"]
    for label, fn in scalars.items():
        value = fn(True)
        if not value.requires_grad:
            assert name == "frozen backbone"  # the features of a linear head do not depend on the head
            continue
        torch.testing.assert_close(value.detach(), fn(False), rtol=1e-9, atol=1e-12)
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        step = [torch.randn_like(p) for p in parameters]
        slope = sum((g * s).sum() for g, s in zip(grads, step, strict=True))
        eps, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, s in zip(parameters, step, strict=True):
                    p.add_(s, alpha=sign * eps)
                ends.append(fn(False))
                for p, s in zip(parameters, step, strict=True):
                    p.sub_(s, alpha=sign * eps)
        numeric = (ends[0] - ends[1]) / (2 * eps)
        assert abs(slope - numeric) <= 2e-5 * abs(numeric) + 1e-6 * abs(value), label


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", ["mlp", "cnn", "checkpointed", "coupled examples"])
def test_chunk_size_changes_nothing(name, chunk_size):
    features, x, oracle = features_of(name, chunk_size=chunk_size)
    if name != "coupled examples":
        torch.testing.assert_close(features.kernel(x), kernel(oracle), rtol=1e-9, atol=1e-11)
    lazy = sketches.gaussian(5, seed=3)
    whole = {key: lazy.block(key, value[0, 0], 0, 5) for key, value in oracle.items()}
    expected = sum(torch.einsum("nc...,m...->ncm", oracle[key], whole[key]) for key in oracle)
    torch.testing.assert_close(features.pushforward(x, lazy), expected, rtol=1e-9, atol=1e-11)


def test_params_by_pattern():
    model, x, _ = build("mlp")
    oracle = jacobian(model, x, names={"0.weight", "0.bias", "4.bias"})
    features = TangentFeatures(model.double(), params=["0.*", "4.bias"])
    assert list(features.parameters) == ["0.weight", "0.bias", "4.bias"]
    assert features.layers == {"0": ["0.weight", "0.bias"], "4": ["4.bias"]}
    torch.testing.assert_close(features.kernel(double(x)), kernel(oracle), rtol=1e-9, atol=1e-12)
    lazy = sketches.gaussian(4, seed=0)
    alone = TangentFeatures(model, params="4.bias").pushforward(double(x), lazy)
    rest = TangentFeatures(model, params="0.*").pushforward(double(x), lazy)
    torch.testing.assert_close(features.pushforward(double(x), lazy), alone + rest, rtol=1e-9, atol=1e-12)


def test_random_forward_pass_is_one_function():
    """What the model draws in its forward pass is drawn alike in every product, and the caller's stream goes on."""
    model = Noisy().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    features = TangentFeatures(model, chunk_size=2)
    torch.manual_seed(7)
    directions = {k: torch.randn(3, *p.shape, dtype=torch.float64) for k, p in model.named_parameters()}
    omega = torch.randn(1, 5, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    forth = features.pushforward(x, directions)
    back = features.pullback(x, omega)
    features.kernel(x)
    assert torch.equal(state, torch.get_rng_state())
    left = torch.einsum("anc,ncb->ab", omega, forth)
    right = sum(torch.einsum("a...,b...->ab", back[key], directions[key]) for key in directions)
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    model, x, _ = build("mlp")
    oracle = kernel(jacobian(model.to(dtype), x.to(dtype)))
    features = TangentFeatures(model)
    K = features.kernel(x.to(dtype))
    assert K.dtype == torch.float32
    error = (K.double() - oracle).norm() / oracle.norm()
    assert error < {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float32: 1e-6}[dtype]
    Z = features.pushforward(x.to(dtype), sketches.gaussian(3, seed=0))
    assert Z.dtype == dtype
    assert Z.shape == (6, 3, 3)


def test_parameters_of_several_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6).bfloat16(), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.bfloat16())).float())

    model, x = Mixed(), torch.randn(5, 4)
    features = TangentFeatures(model)
    K = features.kernel(x)
    phi = matrix({k: v.float() for k, v in features.jacobian(x).items()})
    assert K.dtype == torch.float32
    # The Jacobian is rounded to the parameters' own dtype, the factors of the kernel are not.
    assert (K.reshape(15, 15) - phi @ phi.T).norm() < 0.02 * (phi @ phi.T).norm()
    Z = features.pushforward(x, sketches.gaussian(3, seed=0))
    S = {k: sketches.gaussian(3, seed=0).block(k, p, 0, 3).float() for k, p in features.parameters.items()}
    expected = phi @ torch.cat([v.flatten(1) for v in S.values()], dim=1).T
    assert (Z.reshape(15, 3) - expected).norm() < 0.05 * expected.norm()


def test_autocast_inside_the_model():
    """Its own casts are the model's business; the checks allow for their rounding and no more."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x).float()

    model, x = Inside(), torch.randn(20, 4)
    features = TangentFeatures(model)
    oracle = kernel(jacobian(model.net, x))
    assert (features.kernel(x) - oracle).norm() < 0.05 * oracle.norm()
    assert features.pushforward(x, sketches.gaussian(3, seed=0)).isfinite().all()


def test_self_check_refuses_a_kernel_that_is_none():
    """A model that answers differently from call to call has no kernel."""
    calls = itertools.count(1)

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return next(calls) * self.lin(x)

    with pytest.raises(ValueError, match="expected the same outputs whenever it is run"):
        TangentFeatures(Drifting()).kernel(torch.randn(5, 4))


def test_self_check_allows_for_rounding_where_a_derivative_vanishes():
    """A bias before a normalization by the batch: terms of all positions cancel, and leave 150 eps on sparse images."""
    torch.manual_seed(0)
    x = (torch.rand(12, 1, 16, 16) > 0.95).float()
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 5))
    features = TangentFeatures(model, statistics="training")
    found = features.kernel(x)
    model.double()
    torch.testing.assert_close(found.double(), features.kernel(x.double()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("params", ["0.*", "*weight", "2.*"])
def test_gradients_of_the_features_of_some_parameters_reach_the_others(params):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    net[2].bias.requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    features = TangentFeatures(net, params=params)
    own = [p for p in net.parameters() if p.requires_grad]
    values = [
        features.trace(x, create_graph=True),
        torch.einsum("ikik->", features.kernel(x, create_graph=True)),
        sum(value.square().sum() for value in features.jacobian(x, create_graph=True).values()),
    ]
    step, ends = [torch.randn_like(p) for p in own], []
    for scale in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            for p, s in zip(own, step, strict=True):
                p.add_(s, alpha=scale)
        ends.append(float(features.trace(x)))
    for value in values:
        slopes = torch.autograd.grad(value, own, materialize_grads=True)
        slope = float(sum((g * s).sum() for g, s in zip(slopes, step, strict=True)))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_neither_forward_nor_twice_names_the_module():
    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2

    class Odd(nn.Module):
        def forward(self, x):
            return OnceOnly.apply(x)

    net = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"'1' \(Odd\)"):
        TangentFeatures(net).pushforward(torch.randn(3, 4), sketches.gaussian(2, seed=0))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "resnet, batchnorm", "transformer, dict output", "lstm", "checkpointed"]
)
def test_devices(name, device):
    model, x, forward_fn = build(name)
    oracle = jacobian(model, x, forward_fn or call)
    features = TangentFeatures(model.double().to(device), forward_fn=forward_fn)
    x = double(x).to(device)
    torch.testing.assert_close(features.kernel(x).cpu(), kernel(oracle), rtol=1e-8, atol=1e-10)
    lazy = sketches.gaussian(4, seed=0)
    whole = {key: lazy.block(key, p, 0, 4).cpu() for key, p in features.parameters.items()}
    expected = sum(torch.einsum("nc...,m...->ncm", oracle[key], whole[key]) for key in oracle)
    torch.testing.assert_close(features.pushforward(x, lazy).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["factored", "signs", "joined"])
@pytest.mark.parametrize("name", [name for name in (*MODELS, *LAYERS) if name != "coupled examples"])
def test_directions_along_layers_are_those_that_they_say(name, kind, monkeypatch):
    """ΦS from the gradients of layers against rows of the Jacobian and directions written out."""
    monkeypatch.setattr("alignreg.tangents.pushforward._REUSE", 10**9)
    model, x, forward_fn = build_layers(name)
    jac = jacobian(model, x, forward_fn or call)
    features = TangentFeatures(model.double(), forward_fn=forward_fn)
    S = {"factored": sketches.factored(2, 3, seed=1), "signs": sketches.rademacher(60, seed=1)}.get(kind)
    S = S or sketches.directions.JoinedDirections(sketches.gaussian(5, seed=1), sketches.factored(2, 3, seed=1))
    assert kind != "signs" or 2 * features.outputs(double(x)).shape[1] <= S.m
    expected = 0
    for key, parameter in features.parameters.items():
        directions = S.block(key, parameter.detach(), 0, S.m).reshape(S.m, -1)
        torch.testing.assert_close(directions[5:9], S.block(key, parameter.detach(), 5, 9).reshape(4, -1))
        expected = expected + jac[key].reshape(*jac[key].shape[:2], -1) @ directions.T
    torch.testing.assert_close(features.pushforward(double(x), S), expected, rtol=1e-9, atol=1e-9)


def test_factored_directions_with_a_gradient():
    """Differentiated as the pushforward along the same directions is."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, S = torch.randn(5, 4, dtype=torch.float64), sketches.factored(2, 2, seed=1)
    given = {name: S.block(name, p.detach(), 0, S.m) for name, p in net.named_parameters()}
    slopes = []
    for directions in (S, given):
        z = TangentFeatures(net).pushforward(x, directions, create_graph=True)
        slopes.append(torch.autograd.grad(z.square().sum(), list(net.parameters()), materialize_grads=True))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
