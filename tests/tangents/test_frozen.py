"""The caller's model, modes, random states and gradients are as before: after success and after an exception."""

import copy
import threading

import pytest
import torch
from cases import MODELS, Noisy, build
from oracles import call, double, jacobian, kernel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignreg import TangentFeatures, sketches
from alignreg.metrics import TangentAlignment
from alignreg.tangents.frozen import Saved


def snapshot(model):
    return {
        "parameters": {
            k: (id(p), p.detach().clone(), p.requires_grad, p.is_inference() or p._version)
            for k, p in model.named_parameters()
        },
        "gradients": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "buffers": {k: (id(b), b.clone()) for k, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "attributes": hash(tuple(tuple(m.__dict__) for m in model.modules())),
        "rng": torch.get_rng_state(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "functions": torch.overrides._len_torch_function_stack(),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def calls(features, x):
    c = features.outputs(x).shape[1]
    n = features.outputs(x).shape[0]
    S = sketches.gaussian(2, seed=0)
    for graph in (False, True):
        yield lambda: features.jacobian(x, create_graph=graph)  # noqa: B023
        yield lambda: features.kernel(x, create_graph=graph)  # noqa: B023
        yield lambda: features.trace(x, create_graph=graph)  # noqa: B023
        yield lambda: features.diagonal(x, create_graph=graph)  # noqa: B023
        yield lambda: features.pushforward(x, S, create_graph=graph)  # noqa: B023
        yield lambda: features.pullback(x, torch.ones(1, n, c), create_graph=graph)  # noqa: B023


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name):
    model, x, forward_fn = build(name)
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 1  # modes that no train() or eval() would restore
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    features = TangentFeatures(model, forward_fn=forward_fn)
    before = snapshot(model)
    for fn in calls(features, x):
        try:
            fn()
        except ValueError:
            assert name == "coupled examples"  # has no kernel
        assert_same(before, snapshot(model))


class Breaking(nn.Module):
    """Raises at the given call of its forward pass."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.remaining = None

    def forward(self, x):
        if self.remaining is not None:
            self.remaining -= 1
            if self.remaining < 0:
                torch.rand(1)
                raise KeyError("broken")
        return self.norm(self.lin(x))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_nothing_changes_after_an_exception(at):
    model, x = Breaking().train(), torch.randn(5, 4)
    features = TangentFeatures(model)
    before = snapshot(model)
    for fn in calls(features, x):
        with pytest.raises((KeyError, RuntimeError), match=r"broken|could not be computed"):
            for model.remaining in (at, 0):  # some products take fewer forward passes
                fn()
        model.remaining = None
        after = snapshot(model)
        if at and threading.active_count() > 1:  # who drew past the first pass is not known beside other threads
            after["rng"] = before["rng"]
        assert_same(before, after)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "flash attention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "resnet, batchnorm", "transformer, dict output", "lstm", "borrowed weights"])
def test_works_under(mode, name):
    model, x, forward_fn = build(name)
    oracle = jacobian(model, x, forward_fn or call)
    features = TangentFeatures(model.double(), forward_fn=forward_fn)
    S = sketches.gaussian(3, seed=0)
    outside = features.pushforward(double(x), S)
    with MODES[mode]():
        batch = double(x)
        if mode == "inference_mode":
            batch = batch.clone()
            assert batch.is_inference()
        before = snapshot(model)
        K, Z = features.kernel(batch), features.pushforward(batch, S)
        G = features.kernel(batch, create_graph=True)
        assert_same(before, snapshot(model))
    torch.testing.assert_close(K, kernel(oracle), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(Z, outside, rtol=1e-9, atol=1e-11)
    assert G.requires_grad
    assert not K.requires_grad
    assert not K.is_inference()


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
        x = torch.randn(5, 4, dtype=torch.float64)
    twin = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    oracle = jacobian(twin, x.clone())
    torch.testing.assert_close(TangentFeatures(model).kernel(x), kernel(oracle), rtol=1e-9, atol=1e-12)


def test_training_batchnorm_uses_running_statistics_and_dropout_is_off():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double().train()
    x = torch.randn(8, 4, dtype=torch.float64)
    model(x)
    frozen_twin = copy.deepcopy(model).eval()
    torch.testing.assert_close(TangentFeatures(model).outputs(x), frozen_twin(x).detach())
    assert model.training


def test_metric_inside_training_changes_nothing():
    model, x, _ = build("resnet, batchnorm")
    y = torch.tensor([0, 1, 2, 1])
    metric = TangentAlignment(model, 3, sketch_dim=4)
    before = snapshot(model)
    metric.update(x, y)
    metric(x, y)
    metric.compute()
    with torch.inference_mode():
        metric.update(x.clone(), y)
    assert_same(before, snapshot(model))


def test_saved_activations_are_counted_once_and_parameters_not():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    saved = Saved(besides=layer.parameters())
    with saved.recording():
        y = torch.tanh(layer(x)) * layer(x)
    assert saved.dtypes == {torch.float32}
    assert (saved.nbytes, saved.largest) == (4 * (x.numel() + 2 * y.numel()), 4 * x.numel())


def test_gradients_of_a_loss_reach_the_live_parameters():
    model, x, _ = build("mlp")
    TangentFeatures(model).trace(x, create_graph=True).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "4.bias")


def test_random_state_of_a_noisy_model_under_create_graph():
    model, x = Noisy(), torch.randn(5, 4)
    state = torch.get_rng_state()
    TangentFeatures(model).kernel(x, create_graph=True)
    assert torch.equal(state, torch.get_rng_state())
