"""The exact kernel: rules of layers and the general way, over the models and layers of cases.py."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS
from devices import CUDA
from layer_cases import LAYERS, build, features_of
from notices import silent
from oracles import double, jacobian, kernel, matrix
from torch import nn

from alignreg import TangentFeatures
from alignreg.tangents import features as tangents
from alignreg.tangents import memory
from alignreg.tangents.kernel import exact, gradients, passes, recorder

NAMES = [name for name in (*MODELS, *LAYERS) if name != "coupled examples"]
GENERAL = {
    **{name: general for name, (_, general) in LAYERS.items()},
    **{name: [] for name in MODELS},
}


@pytest.fixture
def by_rules(monkeypatch):
    """Names of parameters that rules took."""
    taken, visit = set(), recorder.visit

    def spy(run, params, layer_of, consume, **options):
        def noted(site, value):
            taken.update(site.names.values())
            consume(site, value)

        visit(run, params, layer_of, noted, **options)

    monkeypatch.setattr(recorder, "visit", spy)
    return taken


def own(oracle, layer):
    return {key: value for key, value in oracle.items() if key.rpartition(".")[0] == layer}


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("error:the (rule for|exact kernel):UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_kernel_whole_and_by_layer(name, by_rules):
    features, x, oracle = features_of(name)
    K = features.kernel(x)
    close(K, kernel(oracle))
    assert sorted(oracle.keys() - by_rules) == sorted(GENERAL[name])
    layers = features.kernel(x, per_layer=True)
    assert layers.keys() == features.layers.keys()
    for layer, value in layers.items():
        close(value, kernel(own(oracle, layer)))
    error = float((K - kernel(oracle)).norm() / kernel(oracle).norm())
    by_layer = max(
        float((value - kernel(own(oracle, layer))).norm() / kernel(own(oracle, layer)).norm().clamp(min=1e-6))
        for layer, value in layers.items()
    )
    print(f"{name}: {error:.1e}, worst layer {by_layer:.1e}")
    assert max(error, by_layer) <= 1e-9


@pytest.mark.filterwarnings("error:the (rule for|exact kernel):UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_diagonal_and_trace(name, by_rules):
    features, x, oracle = features_of(name)
    n = len(kernel(oracle))
    close(features.diagonal(x), kernel(oracle)[range(n), :, range(n)])
    assert sorted(oracle.keys() - by_rules) == sorted(GENERAL[name])
    for layer, value in features.diagonal(x, per_layer=True).items():
        close(value, kernel(own(oracle, layer))[range(n), :, range(n)])
    close(features.trace(x), matrix(oracle).square().sum())


@pytest.mark.filterwarnings("error:the (rule for|exact kernel):UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_two_batches_in_blocks_of_memory(name, monkeypatch):
    """Another batch, and as little memory as blocks of an example and rows of an output leave."""
    features, x, oracle = features_of(name)
    n = features.outputs(x).shape[0]
    one, two = (x[:2], x[1:]) if isinstance(x, torch.Tensor) else (x, x)
    if n == 1:
        one = two = x
    if name in {"transformer, dict output", "lstm", "gru"}:
        pytest.skip("many parameters, a pass for each: smaller cases do the same")
    rows, columns = (range(2), range(1, n)) if isinstance(x, torch.Tensor) and n > 1 else (range(n), range(n))
    expected = kernel(oracle)[list(rows)][:, :, list(columns)]
    close(features.kernel(one, two), expected)
    for budget in (1, 3000):
        monkeypatch.setattr(memory, "WORKING_MEMORY", budget)
        close(features.kernel(one, two), expected)
        layers = features.kernel(x, per_layer=True)
        for layer, value in layers.items():
            close(value, kernel(own(oracle, layer)))
        close(features.diagonal(x), kernel(oracle)[range(n), :, range(n)])


@pytest.mark.filterwarnings("error:the (rule for|exact kernel):UserWarning")
def test_last_block_of_one_example_alone(monkeypatch, by_rules):
    """Only there may positions, which the examples share, pass for an axis of examples."""
    features, x, oracle = features_of("positions, raw parameter, low rank")
    monkeypatch.setattr(passes.Rules, "examples_at_once", 3)
    close(features.diagonal(x), kernel(oracle)[range(4), :, range(4)])
    assert "positions.weight" in by_rules


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "attention", "many tokens", "module used twice", "conv2d, groups, few positions"]
)
def test_every_route_gives_the_same(name, monkeypatch):
    """Sums over pairs of positions and products of rows, whichever would be chosen."""
    features, x, oracle = features_of(name)
    for by_positions in (True, False):
        monkeypatch.setattr(gradients.Sums, "_by_positions", lambda self, pairs, by=by_positions: by)
        close(features.kernel(x), kernel(oracle))
        close(features.kernel(x[:2], x[1:]), kernel(oracle)[:2, :, 1:])
        close(features.trace(x), matrix(oracle).square().sum())


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention, tokens reshaped", "layers without gradients"])
def test_outputs_one_after_the_other(name, monkeypatch, by_rules):
    """The way taken where torch cannot vectorize a backward pass."""
    features, x, oracle = features_of(name)

    def fails(*_, **__):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(recorder, "vmap", fails)
    with silent():
        warnings.filterwarnings("ignore", message="the model's outputs do not depend")
        close(features.kernel(x), kernel(oracle))
        close(features.trace(x), matrix(oracle).square().sum())
    assert sorted(oracle.keys() - by_rules) == sorted(GENERAL[name])


def test_inputs_of_two_shapes():
    """Batches that cannot be one go without rules."""
    net = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten(), nn.Linear(5, 2)
    ).double()
    x, x2 = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(4, 2, 4, dtype=torch.float64)
    close(TangentFeatures(net).kernel(x, x2), kernel(jacobian(net, x), jacobian(net, x2)))
    named = TangentFeatures(MODELS["dict inputs"].build().double())
    x = double(MODELS["dict inputs"].inputs())
    turned = dict(reversed(x.items()))
    close(named.kernel(x, turned), named.kernel(x))


class Mixed(nn.Module):
    """Uses a weight where no mode of torch sees it."""

    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.lin(x))
        with torch._C.DisableTorchFunction():
            x = torch.tanh(F.linear(x, self.lin.weight))
        return self.head(x)


@pytest.mark.parametrize("ask", ["kernel", "trace", "diagonal"])
def test_a_failing_layer_goes_the_general_way_with_one_warning(ask, by_rules):
    torch.manual_seed(1)
    model, x = Mixed().double(), torch.randn(5, 4, dtype=torch.float64)
    oracle = jacobian(model, x)
    features = TangentFeatures(model)
    expected = {
        "kernel": kernel(oracle),
        "trace": matrix(oracle).square().sum(),
        "diagonal": kernel(oracle)[range(5), :, range(5)],
    }
    with pytest.warns(UserWarning, match=r"the rule for lin\.weight, lin\.bias does not give its gradients") as caught:
        close(getattr(features, ask)(x), expected[ask])
    assert len(caught) == 1
    by_rules.clear()
    with silent():
        for again, value in expected.items():
            close(getattr(features, again)(x), value)
    assert by_rules == {"head.weight", "head.bias"}
    features.bind(Mixed().double())  # another model is tried afresh
    with pytest.warns(UserWarning, match="the rule for"):
        features.kernel(x)


def test_rules_that_break_leave_the_general_way(monkeypatch):
    features, x, oracle = features_of("cnn")

    def broken(*_, **__):
        raise RuntimeError("out of order")

    monkeypatch.setattr(recorder, "visit", lambda run, params, *_, **__: broken() if params else None)
    with pytest.warns(UserWarning, match="slower: out of order"):
        close(features.kernel(x), kernel(oracle))
    with silent():
        close(features.trace(x), matrix(oracle).square().sum())


def test_self_check_refuses_a_wrong_rule(monkeypatch):
    """Of one layer: found out, and done the general way."""
    features, x, oracle = features_of("cnn")
    right = gradients.OuterProducts.gram

    def wrong(self, other, limit):
        value = right(self, other, limit)
        return value * (1 + 1e-6) if self.a.shape[2] == 27 else value

    monkeypatch.setattr(gradients.OuterProducts, "gram", wrong)
    with pytest.warns(UserWarning, match=r"the rule for 3\.weight, 3\.bias"):
        close(features.kernel(x), kernel(oracle))


@pytest.mark.parametrize("per_layer", [False, True])
def test_self_check_refuses_a_wrong_gram_matrix(monkeypatch, per_layer):
    """Where there is no other way left, it raises."""
    features, x, _ = features_of("used elsewhere too")
    right = exact.general.rows_gram
    monkeypatch.setattr(exact.general, "rows_gram", lambda chunks: right(chunks) * (1 + 1e-6))
    which = " of layer '0'" if per_layer else ""
    with pytest.raises(RuntimeError, match=f"the tangent kernel{which} failed its self-check"):
        features.kernel(x, per_layer=per_layer)


def test_batches_that_mix_examples_have_no_kernel():
    model, x, _ = build("coupled examples")
    features, x = TangentFeatures(model.double()), double(x)
    for ask in (features.kernel, lambda x: features.kernel(x, x), lambda x: features.kernel(x, per_layer=True)):
        # Before any rule is blamed.
        with warnings.catch_warnings(), pytest.raises(ValueError, match="depend on the other examples of its batch"):
            warnings.simplefilter("error")
            ask(x)
    mixing = TangentFeatures(model, params="norm.*")
    with pytest.raises(ValueError, match="depend on the other examples of its batch"):
        mixing.kernel(x)

    class Shuffled(nn.Module):
        """Neither normalization nor rule."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(torch.einsum("ni,io->no", x - x.mean(0), self.w))

    with pytest.raises(ValueError, match="depend on the other examples of its batch"):
        TangentFeatures(Shuffled()).kernel(x)


class OneSize(nn.Module):
    """Takes batches of one size alone."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.lin(x)).view(6, 3)


def test_model_for_batches_of_one_size():
    model, x = OneSize().double(), torch.randn(6, 4, dtype=torch.float64)
    with silent():
        close(TangentFeatures(model).kernel(x), kernel(jacobian(model, x)))
        close(
            TangentFeatures(model).kernel(x[:, [0, 0, 1, 1]], per_layer=True)["lin"][:, :, :2],
            kernel(jacobian(model, x[:, [0, 0, 1, 1]]))[:, :, :2],
        )


def test_nothing_of_the_caller_changes():
    model, x, _ = build("resnet, batchnorm")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    features = TangentFeatures(model)
    with torch.no_grad():
        K = features.kernel(x)
    with torch.inference_mode():
        assert torch.equal(features.kernel(x), K)
    features.trace(x), features.diagonal(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not K.requires_grad


def test_kernel_is_symmetric_to_the_bit():
    model, x, _ = build("cnn")
    K = TangentFeatures(model).kernel(x)
    assert torch.equal(K, K.permute(2, 3, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["cnn", "attention", "many tokens"])
def test_lower_precision(name, dtype):
    model, x, _ = build(name)
    model = model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    oracle = kernel(jacobian(model, x))
    with silent():
        K = TangentFeatures(model).kernel(x)
    assert K.dtype == torch.float32
    assert (K.double() - oracle).norm() < {torch.float32: 1e-6}.get(dtype, 0.03) * oracle.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_without_rules(dtype):
    model, x, _ = build("layernorm, weight norm")
    model = model.to(dtype)
    oracle = kernel(own(jacobian(model, x.to(dtype)), "1.parametrizations.weight"))
    K = TangentFeatures(model, params="1.parametrizations.*").kernel(x.to(dtype))
    assert K.dtype == torch.float32
    assert (K.double() - oracle).norm() < 0.03 * oracle.norm()


def test_progress(monkeypatch, capsys):
    """All parameters are done once, by rules and in general, in one block and in several."""
    for name, budget in (("cnn", None), ("cnn", 3000), ("lstm", None)):
        features, x, oracle = features_of(name)
        done = []
        with monkeypatch.context() as patched:
            patched.setattr(tangents, "bar", lambda *_, **__: contextlib.nullcontext(done.append))  # noqa: B023
            if budget:
                patched.setattr(memory, "WORKING_MEMORY", budget)
            features.kernel(x)
        assert sum(done) == pytest.approx(features.num_parameters)
        assert len(done) >= 3
    close(features.kernel(x, progress=True), kernel(oracle))
    capsys.readouterr()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "name", ["conv2d, depthwise, dilated", "attention, tokens reshaped", "many tokens", "frames first"]
)
def test_devices(name, device):
    model, x, _ = build(name)
    oracle = jacobian(model, x)
    features = TangentFeatures(model.double().to(device))
    x = double(x).to(device)
    torch.testing.assert_close(features.kernel(x).cpu(), kernel(oracle), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(features.trace(x).cpu(), matrix(oracle).square().sum(), rtol=1e-8, atol=0)
