"""What networks of users do beside their forward pass: hooks, caches, copies, changes in place."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LOSSES, make
from notices import silent
from oracles import jacobian, kernel
from small_networks import X, Y, gradients, mlp, trace_of
from torch import nn
from torch.nn.utils import parametrize, prune

from alignreg import TangentFeatures, sketches
from alignreg.losses import ComplexityPenalty
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace

# --- hooks ------------------------------------------------------------------------------------------------------------


def _scaled(gradient):
    return 0.1 * gradient


def _scale_own(p):
    p.grad.mul_(0.1)


def _never(*_):
    raise AssertionError("the pass of a loss met a hook of a module")


HOOKS = {
    "of a tensor": lambda net: net[0].weight.register_hook(_scaled),
    "of all tensors": lambda net: torch.autograd.graph.register_multi_grad_hook(list(net.parameters()), lambda _: None),
    "of an accumulator": lambda net: torch.autograd.graph.get_gradient_edge(net[0].weight).node.register_prehook(
        lambda gradients: tuple(_scaled(g) for g in gradients)
    ),
    "after accumulation": lambda net: net[0].weight.register_post_accumulate_grad_hook(_scale_own),
    "of a module": lambda net: net[0].register_full_backward_hook(_never),
    "of a module, before": lambda net: net[2].register_full_backward_pre_hook(lambda _, after: (_scaled(after[0]),)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", LOSSES)
def test_hooks_on_gradients_are_not_in_the_features_and_act_once(kind, hook):
    model = mlp()
    make(kind, model, weight=1.0)(X, Y).backward()
    plain = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad()
    trace = TangentFeatures(model).trace(X, create_graph=True)
    (own,) = torch.autograd.grad(trace, model[0].weight)
    handle = HOOKS[hook](model)
    value = make(kind, model, weight=1.0)(X, Y)
    value.backward()
    factors = [0.1 if index == 0 and "module" not in hook and hook != "of all tensors" else 1.0 for index in range(4)]
    for p, expected, factor in zip(model.parameters(), plain, factors, strict=True):
        if expected is not None:
            torch.testing.assert_close(p.grad, factor * expected, rtol=1e-10, atol=1e-12)
    again = TangentFeatures(model).trace(X, create_graph=True)
    torch.testing.assert_close(again, trace, rtol=1e-12, atol=0)
    if hook != "of all tensors":  # torch has no such hook in autograd.grad
        (got,) = torch.autograd.grad(again, model[0].weight)
        torch.testing.assert_close(got, own * (0.1 if hook == "of a tensor" else 1), rtol=1e-10, atol=1e-12)
    handle.remove()


# --- weights that something else holds --------------------------------------------------------------------------------


class Squared(nn.Module):
    def forward(self, w):
        return w + w**3


def test_cached_parametrizations_are_functions_of_their_parameters():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Squared())
    expected = trace_of(model)
    with parametrize.cached():
        model(X)
        assert float(TangentFeatures(model).trace(X)) == pytest.approx(expected, rel=1e-12)
        value = ComplexityPenalty(model, weight=1.0, examples=None, every_n_steps=1)(X)
        cached = model[0].weight
        assert cached is model[0].weight
    own = ComplexityPenalty(model, weight=1.0, examples=None, every_n_steps=1)(X)
    torch.testing.assert_close(gradients(model, value), gradients(model, own))
    assert model[0].weight is not model[0].weight


class Keeping(nn.Module):
    """Keeps a weight that is made of its parameter, with its graph or without."""

    def __init__(self, *, graph):
        super().__init__()
        self.lin, self.head, self.kept, self.graph = nn.Linear(4, 6), nn.Linear(6, 3), None, graph

    def forward(self, x):
        if self.kept is None:
            self.kept = 2 * (self.lin.weight if self.graph else self.lin.weight.detach())
        return self.head(torch.tanh(F.linear(x, self.kept) + self.lin.bias))


def test_weight_that_was_kept_from_before_is_noticed():
    model = Keeping(graph=True).double()
    model(X)
    for attempt in (
        lambda: TangentFeatures(model).trace(X),
        lambda: TangentFeatures(model).trace(X, create_graph=True),
        lambda: ComplexityPenalty(model, every_n_steps=1)(X),
        lambda: TangentTrace(model, 3).update(X),
    ):
        with pytest.raises(ValueError, match=r"depend on \['lin.weight'\] by something that was made of them before"):
            attempt()
    model.kept = None
    assert float(TangentFeatures(model).trace(X)) > 0
    assert model.kept is None
    model = Keeping(graph=False).double()
    model(X)
    with pytest.warns(UserWarning, match=r"do not depend on \['lin.weight'\], whose features are zero"):
        TangentFeatures(model).trace(X)


class Encoder(nn.Module):
    """A pooler that these outputs do not use, in a model that looks at its inputs, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.body, self.pooler = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        if bool((x > 1e9).any()):
            x = x.clamp(max=1e9)
        return torch.tanh(self.body(x))


@pytest.mark.filterwarnings("ignore:the exact kernel of this model goes without")
def test_layers_that_the_outputs_do_not_use_have_features_of_zero():
    model = Encoder().double()
    features = TangentFeatures(model)
    with pytest.warns(UserWarning, match=r"do not depend on \['pooler.bias', 'pooler.weight'\]"):
        K = features.kernel(X, per_layer=True)
    with silent():
        features.trace(X)  # said once
    oracle = kernel(jacobian(model, X))
    torch.testing.assert_close(K["body"], oracle, rtol=1e-9, atol=1e-12)
    assert not K["pooler"].any()
    torch.testing.assert_close(features.kernel(X, create_graph=True).detach(), oracle, rtol=1e-9, atol=1e-12)
    assert not features.diagonal(X, per_layer=True)["pooler"].any()


def test_experts_of_whom_some_are_used_are_not_told_of():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x):
            return torch.tanh(self.experts[1](x))

    with silent():
        TangentFeatures(Experts().double()).trace(X)


# --- the model is as it was -------------------------------------------------------------------------------------------


class Leaving(nn.Module):
    """Leaves tensors, lists and counts on itself and its modules."""

    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.calls, self.maps, self.found, self.last = 0, [], {}, torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.lin(x))
        self.maps.append(h)
        self.found["h"], self.last, self.new = h, h, h
        self.lin.seen = h
        return self.head(h)


def _old_weight_norm():
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net[0])
    return net


def _pruned():
    net = mlp()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


LEAVING = {
    "attributes": lambda: Leaving().double(),
    "weight norm": _old_weight_norm,
    "spectral norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)
    ).double(),
    "pruning": _pruned,
}


def _sizes(model):
    return [{k: len(v) for k, v in module.__dict__.items() if isinstance(v, list | dict)} for module in model.modules()]


@pytest.mark.parametrize("name", LEAVING)
def test_models_can_be_copied_after_a_measurement(name):
    model = LEAVING[name]()
    with torch.no_grad():
        model(X)
    before = [{**module.__dict__} for module in model.modules()]
    sizes = [
        {k: len(v) for k, v in module.__dict__.items() if isinstance(v, list | dict)} for module in model.modules()
    ]
    features, metric = TangentFeatures(model), TangentAlignment(model, 3, sketch_dim=4)
    expected = trace_of(model)
    assert float(features.trace(X)) == pytest.approx(expected, rel=1e-9)
    assert float(features.trace(X, create_graph=True)) == pytest.approx(expected, rel=1e-9)
    features.pushforward(X, sketches.gaussian(2, seed=0), create_graph=True)
    metric.update(X, Y)
    make("alignment", model)(X, Y).backward()
    make("kare", model)(X, Y).backward()
    assert _sizes(model) == sizes
    for module, attributes in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items())
    copy.deepcopy(model)


class Hooking(nn.Module):
    """Puts hooks on its modules in the first forward pass, and takes one off."""

    def __init__(self):
        super().__init__()
        self.net, self.hooked, self.seen = mlp(), False, []
        self.handle = self.net[2].register_forward_hook(lambda *_: None)

    def forward(self, x):
        if not self.hooked:
            self.net[0].register_forward_hook(lambda _, inputs, y: 2 * y)
            self.net[1].register_forward_pre_hook(lambda _, inputs: None)
            self.handle.remove()
            self.hooked = True
        return self.net(x)


def test_hooks_that_a_forward_pass_registers_are_not_left():
    def hooks(model):
        return [
            len(held) for module in model.modules() for name, held in module.__dict__.items() if name.endswith("_hooks")
        ]

    model = Hooking()
    twin = copy.deepcopy(model)
    before, expected = hooks(model), trace_of(twin)
    features = TangentFeatures(model)
    for create_graph in (False, True):
        assert float(features.trace(X, create_graph=create_graph).detach()) == pytest.approx(expected, rel=1e-12)
    for kind in LOSSES:
        make(kind, model)(X, Y)
    assert hooks(model) == before
    assert not model.hooked


class InPlace(nn.Module):
    """Standardizes its inputs in place."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x.sub_(0.3).div_(1.7))


class OutOfPlace(InPlace):
    def forward(self, x):
        return self.net((x - 0.3) / 1.7)


def test_inputs_that_the_model_changes_in_place_are_copies():
    model, twin, x = InPlace(), OutOfPlace(), X.clone()
    expected = jacobian(twin, X)
    features = TangentFeatures(model)
    S = sketches.gaussian(3, seed=0)
    torch.testing.assert_close(features.kernel(x), kernel(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features.pushforward(x, S), TangentFeatures(twin).pushforward(X, S))
    for method in ("exact", "sketch"):
        values = []
        for net in (model, twin):
            metric = LayerwiseAlignment(net, 3, method=method)
            metric.update(x, Y)
            values.append(metric.compute())
        torch.testing.assert_close(*values)
    for kind in LOSSES:
        for micro in {"micro_batch_size": 2} if LOSSES[kind].probes else {}, {}:
            torch.testing.assert_close(
                *(gradients(net, make(kind, net, weight=1.0, **micro)(x, Y)) for net in (model, twin))
            )
    torch.testing.assert_close(x, X, rtol=0, atol=0)


def test_embeddings_are_renormalized_in_a_copy():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(3)
    before, tokens = model[0].weight.detach().clone(), torch.randint(9, (7, 2))
    twin = copy.deepcopy(model)
    twin(tokens)
    for create_graph in (False, True):
        trace = TangentFeatures(model).trace(tokens, create_graph=create_graph)
        assert float(trace) == pytest.approx(float(TangentFeatures(twin).trace(tokens)), rel=1e-12)
    make("alignment", model)(tokens, Y)
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("loss_first", [True, False])
def test_copies_of_what_watches_a_model_watch_its_copy(loss_first):
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            net = mlp()
            if loss_first:
                self.reg, self.metric = ComplexityPenalty(net, weight=1.0, every_n_steps=1), TangentTrace(net, 3)
            self.net = net
            if not loss_first:
                self.reg, self.metric = ComplexityPenalty(net, weight=1.0, every_n_steps=1), TangentTrace(net, 3)

    task = Task()
    copied = copy.deepcopy(task)
    twice = copy.deepcopy(copied)
    for one in (copied, twice):
        with torch.no_grad():
            one.net[0].weight.mul_(2)
        one.reg(X).backward()
        assert one.net[0].weight.grad is not None
        one.metric.update(X)
        assert float(one.metric.compute()) != 0
        assert one.metric._features.model is one.net
    assert task.net[0].weight.grad is None
    assert copied.net[0].weight.grad is not twice.net[0].weight.grad
    alone = copy.deepcopy(task.reg)
    assert alone._features.model is task.net


def test_forward_passes_that_switch_modes_are_refused():
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()

        def forward(self, x):
            self.train()
            return self.net(x)

    model = Switching().eval()
    for attempt in (
        lambda: TangentFeatures(model).trace(X),
        lambda: ComplexityPenalty(model, every_n_steps=1)(X),
        lambda: TangentTrace(model, 3).update(X),
    ):
        with pytest.raises(RuntimeError, match=r"the forward pass switches .* to training mode"):
            attempt()
        assert not any(module.training for module in model.modules())
