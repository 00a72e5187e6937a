"""Rarer than those of test_real_networks: what stays as it was, and whose derivative it is, in situations of users."""

import copy

import numpy as np
import pytest
import torch
from loss_cases import LOSSES, make
from oracles import jacobian, kernel
from small_networks import X, Y, gradients, mlp, normalized, trace_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignreg import TangentFeatures, sketches
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace


def everything(model):
    """All that measures or regularizes, which must neither raise nor leave anything."""
    features, omega = TangentFeatures(model), torch.ones(1, 7, 3, dtype=torch.float64)
    for create_graph in (False, True):
        yield features.trace(X, create_graph=create_graph)
        yield features.kernel(X, create_graph=create_graph)
        yield features.pushforward(X, sketches.gaussian(2, seed=0), create_graph=create_graph)
        yield features.grams(X, omega, create_graph=create_graph)
    metric = TangentAlignment(model, 3, sketch_dim=3)
    metric.update(X, Y)
    yield metric.compute()
    for kind in LOSSES:
        yield make(kind, model, weight=1.0)(X, Y)


# --- selected parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", ["0.*", "2.*", "*bias"])
def test_products_of_some_parameters_are_differentiated_by_all(params):
    model = mlp()
    features = TangentFeatures(model, params=params)
    oracle = kernel({k: v for k, v in jacobian(model, X).items() if k in features.parameters})
    K = features.kernel(X, create_graph=True)
    torch.testing.assert_close(K.detach(), oracle, rtol=1e-9, atol=1e-12)
    trace = features.trace(X, create_graph=True)
    (slope,) = torch.autograd.grad(trace, model[2].weight, allow_unused=True, materialize_grads=True)
    ends = []
    for eps in (1e-5, -2e-5, 1e-5):
        with torch.no_grad():
            model[2].weight[0, 0] += eps
        ends.append(float(features.trace(X)))
    assert float(slope[0, 0]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


# --- hooks ------------------------------------------------------------------------------------------------------------


class Hooking(nn.Module):
    """Registers a hook in each forward pass, and leaves it."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        self.net[1].register_forward_hook(lambda module, inputs, output: 1.3 * output)
        return self.net(x)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net[2](1.3 * torch.tanh(self.net[0](x)))


def test_hooks_registered_in_a_forward_pass_are_taken_back():
    model = Hooking()
    features = TangentFeatures(model)
    oracle = kernel(jacobian(Hooked(), X))
    for create_graph in (False, True):
        K = features.kernel(X, create_graph=create_graph).detach()
        torch.testing.assert_close(K, oracle, rtol=1e-9, atol=1e-12)
    for _ in everything(model):
        assert not model.net[1]._forward_hooks


def _shrinking(module, before, after=None):
    given = before if after is None else after
    return tuple(0.1 * gradient for gradient in given) if isinstance(module, nn.Tanh) else None


GLOBAL = {
    "after": nn.modules.module.register_module_full_backward_hook,
    "before": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", GLOBAL)
def test_hooks_on_the_gradients_of_all_modules_are_not_in_the_features(name):
    model = mlp()
    plain = [torch.as_tensor(0.0) if isinstance(value, dict) else value for value in everything(model)]
    handle = GLOBAL[name](_shrinking if name == "before" else lambda m, before, after: _shrinking(m, before))
    try:
        hooked = [torch.as_tensor(0.0) if isinstance(value, dict) else value for value in everything(model)]
        torch.testing.assert_close(hooked, plain, rtol=1e-10, atol=1e-12)
        with pytest.warns(UserWarning, match="hooks on gradients"):
            value = make("complexity", model, weight=1.0)(X, Y, outputs=model(X))
        torch.testing.assert_close(value, make("complexity", model, weight=1.0)(X, Y), rtol=1e-10, atol=1e-12)
    finally:
        handle.remove()
    assert not nn.modules.module._global_backward_hooks
    assert not nn.modules.module._global_backward_pre_hooks


# --- the model is as it was -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use=True):
        super().__init__()
        self.net, self.use = normalized(), use

    def forward(self, x):
        h = self.net[0](x)
        return checkpoint(self.net[1:], h, use_reentrant=False) if self.use else self.net[1:](h)


@pytest.mark.parametrize("kind", LOSSES)
def test_running_statistics_stay_where_modules_run_again_in_the_backward_pass(kind):
    model, twin = Checkpointed().train(), Checkpointed(use=False).train()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    own, plain = (make(kind, net, weight=1.0)(X, Y) for net in (model, twin))
    torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-12)
    slopes = [gradients(net, value) for value, net in ((own, model), (plain, twin))]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        torch.testing.assert_close(buffer, before[name][1], rtol=0, atol=0)


class Counting(nn.Module):
    """Changes tensors that are no buffers in place, and draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.count, self.generator = mlp(), torch.ones((), dtype=torch.float64), torch.Generator()
        self.net.count = self.count  # held twice

    def forward(self, x):
        self.count += 1
        noise = torch.rand(x.shape[1], dtype=x.dtype, generator=self.generator)
        return self.net(x + noise) * self.net.count


def test_tensors_and_generators_of_modules_stay_and_start_each_pass_alike():
    model = Counting()
    state, tensor = model.generator.get_state(), model.count
    twin = mlp()
    noise = torch.rand(4, dtype=torch.float64, generator=torch.Generator().set_state(state))
    features = TangentFeatures(model)
    oracle = 4 * kernel(jacobian(twin, X + noise))
    torch.testing.assert_close(features.kernel(X), oracle, rtol=1e-9, atol=1e-12)
    for _ in everything(model):
        assert model.count is tensor
        assert model.net.count is tensor
        assert float(tensor) == 1
        assert torch.equal(model.generator.get_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_scripted_modules_predict_while_they_are_measured(training):
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    model = torch.jit.script(plain).train(training)
    expected = trace_of(plain)
    assert float(TangentFeatures(model).trace(X)) == pytest.approx(expected, rel=1e-9)
    metric = TangentTrace(model, 3, centered=False, method="exact")
    metric.update(X)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)
    modes = {path: module.training for path, module in model.named_modules()}
    assert modes == dict.fromkeys(modes, training)


def test_keys_of_a_dict_that_forward_fn_takes_out_or_adds_are_its_own():
    model, batch = mlp(), {"x": X, "ids": torch.arange(7)}

    def taking(model, x):
        x["new"] = "no tensor"
        return model(x.pop("x"))

    features = TangentFeatures(model, forward_fn=taking, chunk_size=1)
    torch.testing.assert_close(features.kernel(batch), kernel(jacobian(model, X)), rtol=1e-9, atol=1e-12)
    S = sketches.gaussian(2, seed=0)
    expected = TangentFeatures(model).pushforward(X, S)
    for create_graph in (False, True):
        torch.testing.assert_close(features.pushforward(batch, S, create_graph=create_graph).detach(), expected)
    make("kare", model, forward_fn=taking)(batch, Y)
    assert list(batch) == ["x", "ids"]


# --- copies, and models without values --------------------------------------------------------------------------------


class Task(nn.Module):
    """Holds what watches its network, by a method of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.head = mlp(), nn.Linear(3, 3).double()
        self.reg = make("complexity", self.net, weight=1.0, forward_fn=self.logits)
        self.metric = TangentTrace(self.net, 3, forward_fn=self.logits)

    def logits(self, net, x):
        return self.head(net(x))


def test_methods_given_as_forward_fn_are_copied_along():
    task = Task()
    copied = copy.deepcopy(copy.deepcopy(task))
    with torch.no_grad():
        copied.head.weight.mul_(3)
    copied.reg(X).backward()
    assert copied.head.weight.grad is not None
    assert task.head.weight.grad is None
    for watched in (task, copied):
        watched.metric.update(X)
    assert float(copied.metric.compute()) == pytest.approx(9 * float(task.metric.compute()), rel=1e-9)
    alone = task.metric.clone()  # without what its method belongs to
    assert alone._features.forward_fn.__self__ is task


def test_the_step_of_a_loss_has_a_value_wherever_weights_wait_for_theirs():
    with torch.device("meta"):
        assert int(make("complexity", nn.Linear(4, 3, device="cpu")).step) == 0
    task = Task()
    task.reg(X)
    task.to("meta")
    for attempt in (lambda: task.reg(X), lambda: task.metric._features.trace(X)):
        with pytest.raises(ValueError, match=r"expected parameters with values, got .* on the meta device"):
            attempt()
    task.to_empty(device="cpu")
    assert int(task.reg.step) == 1
    assert int(task.float().reg.step) == 1


def test_buffers_without_a_shape_are_told_of():
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d(affine=False), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"buffers \['1.running_mean', .* have no shape yet"):
        TangentFeatures(model)


# --- settings of the process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["default device", "default dtype"])
def test_defaults_of_the_process_change_no_value(setting):
    model = mlp()
    metrics = [LayerwiseAlignment(model, 3, method=method) for method in ("sketch", "exact")]
    metrics += [TangentAlignment(model, 3, sketch_dim=3), TangentTrace(model, 3, method="exact")]
    features = TangentFeatures(model)
    omega = torch.ones(1, 7, 3, dtype=torch.float64)

    def values():
        yield features.kernel(X)
        yield features.pushforward(X, sketches.gaussian(2, seed=0))
        yield features.grams(X, omega)
        for metric in metrics:
            metric.reset()
            metric.update(X, Y)
            yield metric.compute()
        yield features.agree(X, model(X))
        for kind in LOSSES:
            yield make(kind, model, weight=1.0, examples=5)(X, Y)

    expected = list(values())
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        if setting == "default device":
            torch.set_default_device("meta")  # as "cuda" would be for a model on the CPU
        else:
            torch.set_default_dtype(torch.bfloat16)
        found = list(values())
    finally:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_losses_are_not_for_checkpointed_functions(use_reentrant):
    model = mlp()
    reg = make("complexity", model)
    with pytest.raises(RuntimeError, match=r"cannot run inside torch\.utils\.checkpoint"):
        checkpoint(lambda x: model(x).sum() + reg(x), X, use_reentrant=use_reentrant)
    assert int(reg.step) == 0


class Random(nn.Module):
    """Draws what nobody puts back."""

    def __init__(self):
        super().__init__()
        self.net, self.generator = mlp(), np.random.default_rng(0)

    def forward(self, x):
        return self.net(x * torch.from_numpy(self.generator.random(x.shape[1])))


@pytest.mark.filterwarnings("ignore:the rule for")
def test_models_that_answer_otherwise_each_time_are_told_of():
    model = Random()
    features = TangentFeatures(model)
    for attempt in (
        lambda: features.kernel(X),
        lambda: features.trace(X),
        lambda: features.pushforward(X, sketches.gaussian(2, seed=0)),
        lambda: TangentAlignment(model, 3, sketch_dim=3).update(X, Y),
        lambda: make("complexity", model, micro_batch_size=2)(X),
    ):
        with pytest.raises(ValueError, match="expected the same outputs whenever it is run on the same inputs"):
            attempt()
