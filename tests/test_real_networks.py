"""What networks of users do beside their forward pass: hooks, caches, copies, threads, changes in place."""

import copy
import itertools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import BasicBlock
from loss_cases import LOSSES, formula, make, slopes_of
from oracles import jacobian, kernel, matrix
from torch import nn
from torch.nn.utils import parametrize, prune

from alignreg import TangentFeatures, sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace

X, Y = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 3


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def trace_of(model, x=X):
    return float(sum(value.square().sum() for value in jacobian(model, x).values()))


def gradients(model, value):
    return torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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

    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
        for micro in {} if kind == "kare" else {"micro_batch_size": 2}, {}:
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


# --- outputs with a large constant part -------------------------------------------------------------------------------


class Masked(nn.Module):
    """Logits of which one is masked, or outputs with a large bias."""

    def __init__(self, net, offset):
        super().__init__()
        self.net = net
        self.register_buffer("offset", torch.tensor(offset))

    def forward(self, x):
        return self.net(x) + self.offset


OFFSETS = {"masked": [0.0, -1e8, 0.0], "bias": [2e5, 2e5, 2e5]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", OFFSETS)
def test_comparisons_see_past_a_large_constant(offset, dtype):
    x = torch.randn(9, 4, dtype=dtype)
    plain = Masked(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), OFFSETS[offset]).to(dtype)
    assert TangentFeatures(plain).agree(x, plain(x))
    dropping = Masked(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)), OFFSETS[offset]).to(dtype)
    assert not TangentFeatures(dropping).agree(x, dropping(x))
    assert TangentFeatures(dropping.eval()).agree(x, dropping(x))
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="depend on the other examples"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TangentFeatures(Masked(mixing, OFFSETS[offset]).to(dtype)).kernel(x)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_examples_that_are_mixed_are_noticed(n):
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="depend on the other examples"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TangentFeatures(mixing).kernel(X[:n])


class FromOneOn(nn.Module):
    """Another function of all examples but the first."""

    def __init__(self, *, last_only=False):
        super().__init__()
        self.net, self.last_only = mlp(), last_only

    def forward(self, x):
        y = self.net(x)
        if self.training:
            shift = torch.zeros(len(y), 1, dtype=y.dtype)
            shift[-1 if self.last_only else slice(1, None)] = 0.1
            y = y + shift
        return y


@pytest.mark.parametrize("last_only", [True, False])
def test_agreement_looks_past_the_first_example(last_only):
    model = FromOneOn(last_only=last_only).train()
    assert not TangentFeatures(model).agree(X, model(X))
    assert TangentFeatures(model.eval()).agree(X, model(X))


# --- threads ----------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.rnn, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(self.layer(x))[0].mean(1))


def _switches():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        parametrize._cache_enabled,
        len(warnings.filters),
    )


@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.thorough)])
def test_threads_measure_models_of_their_own(rounds):
    def job(seed):
        torch.manual_seed(0)
        model = Attending().double()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + seed / 10)
        x = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        metric = TangentAlignment(model, 3, sketch_dim=3)
        reg = AlignmentLoss(model, weight=1.0, every_n_steps=1, examples=None, probes=4)
        y = torch.tensor([0, 1, 2, 0])

        def once():
            metric.reset()
            metric.update(x, y)
            reg.step.zero_()
            value = reg(x, y)
            return float(metric.compute()), float(value.detach()), *(float(g.norm()) for g in gradients(model, value))

        return once

    jobs = [job(seed) for seed in range(4)]
    expected = [once() for once in jobs]
    before = _switches()
    wrong, drawn, errors, done = [], [], [], threading.Event()

    def measure(index):
        try:
            for _ in range(rounds):
                found = jobs[index]()
                if found != pytest.approx(expected[index], rel=1e-9):
                    wrong.append((index, found))
        except Exception as error:  # noqa: BLE001 - of whatever kind, in a thread
            errors.append(error)

    def draw():
        while not done.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    threads = [threading.Thread(target=measure, args=(index,)) for index in range(4)]
    other = threading.Thread(target=draw)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not errors
    assert not wrong
    assert len(set(drawn)) == len(drawn)
    assert _switches() == before


# --- gradients that are not finite ------------------------------------------------------------------------------------


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(4, 6, bias=False).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(self.net(x).abs().sqrt())


def test_gradients_that_are_not_finite_have_one_error():
    model, x = Root(), X.clone()
    x[2] = 0  # the root of zeros
    assert bool(torch.isfinite(model(x)).all())
    features = TangentFeatures(model)
    attempts = [
        lambda: features.kernel(x),
        lambda: features.trace(x),
        lambda: features.jacobian(x),
        lambda: features.pushforward(x, sketches.gaussian(2, seed=0)),
        lambda: features.pullback(x, torch.ones(1, 7, 3)),
        lambda: features.grams(x, torch.ones(1, 7, 3)),
        lambda: TangentAlignment(model, 3, sketch_dim=3).update(x, Y),
        *(lambda kind=kind: make(kind, model)(x, Y) for kind in LOSSES),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="gradients of the model's outputs contain NaN or inf"):
            attempt()
    metric = LayerwiseAlignment(model, 3, method="sketch")
    metric.update(x, Y)
    with pytest.raises(ValueError, match="gradients of the model's outputs contain NaN or inf"):
        metric.compute()


@pytest.mark.parametrize("kind", LOSSES)
def test_steps_that_are_not_finite_can_be_left_out(kind):
    model, bad, worse = Root(), X.clone(), X.clone()
    bad[2], worse[3] = 0, torch.nan
    reg = make(kind, model, weight=1.0, on_nonfinite="skip")
    for x in (bad, worse):
        with pytest.warns(UserWarning, match="is left out: the"):
            value = reg(x, Y)
        value.backward()
        assert float(value.detach()) == 0
    assert int(reg.step) == 2
    assert float(reg(X, Y).detach()) != 0


# --- the same step, and other ways of training ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_calls_of_the_same_step_repeat_its_draws_and_count_once(kind):
    model = mlp()
    reg = make(kind, model, weight=1.0, examples=5, every_n_steps=2)
    with reg.same_step():
        values = [float(reg(X, Y).detach()) for _ in range(3)]
    assert values[0] != 0
    assert len(set(values)) == 1
    assert int(reg.step) == 1
    with reg.same_step():
        pass
    assert int(reg.step) == 1
    with pytest.raises(KeyError), reg.same_step():
        reg(X, Y)
        raise KeyError
    assert int(reg.step) == 2
    assert float(reg(X, Y).detach()) not in {0.0, values[0]}


def test_lbfgs_sees_one_function_a_step():
    model = mlp()
    reg = AlignmentLoss(model, weight=0.1, every_n_steps=1, examples=5)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y) + reg(X, Y)
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    with reg.same_step():
        optimizer.step(closure)
    assert int(reg.step) == 1
    assert len(seen) > 2
    assert seen[-1] < seen[0]


def test_transforms_of_torch_func_are_refused():
    model = mlp()
    reg = make("complexity", model)

    def loss(params):
        return torch.func.functional_call(model, params, (X,)).sum() + reg(X)

    with pytest.raises(RuntimeError, match=r"cannot run inside a transform of torch\.func"):
        torch.func.grad(loss)(dict(model.named_parameters()))


def test_layers_frozen_or_unfrozen_later_are_noticed_once():
    model = mlp()
    model[0].requires_grad_(False)
    features, reg = TangentFeatures(model), make("complexity", model, weight=1.0)
    model[0].requires_grad_(True)
    for attempt in (lambda: features.trace(X), lambda: reg(X)):
        with pytest.warns(UserWarning, match=r"\['0.bias', '0.weight'\] have become trainable.*do not count.*bind"):
            attempt()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attempt()
    features.bind(model)
    assert float(features.trace(X)) == pytest.approx(trace_of(model), rel=1e-12)
    model[2].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"\['2.bias', '2.weight'\] have become frozen.*still count"):
        features.trace(X)
    features.bind(model)
    assert features.num_parameters == 4 * 6 + 6


def test_a_compiled_step_has_the_right_numbers():
    model = mlp()
    reg = make("alignment", model, weight=1.0, probes=4)
    metrics = [TangentTrace(model, 3, sketch_dim=3), LayerwiseAlignment(model, 3)]

    def step():
        loss = F.cross_entropy(model(X), Y) + reg(X, Y) + TangentFeatures(model).trace(X, create_graph=True)
        for metric in metrics:
            metric.update(X, Y)
        return loss

    found = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        reg.step.zero_()
        for metric in metrics:
            metric.reset()
        loss = run()
        found.append((loss.detach(), gradients(model, loss), [metric.compute() for metric in metrics]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_longer_than_the_weights_are_scaled_down(kind):
    model = mlp()
    whole = gradients(model, make(kind, model, weight=1e4)(X, Y))
    length = float(sum(g.square().sum() for g in whole)) ** 0.5
    reg = make(kind, model, weight=1e4, clip=0.5)
    with pytest.warns(UserWarning, match="times as long as the weights, and is cut to 0.5 times"):
        value = reg(X, Y)
    used = [p for p, g in zip(model.parameters(), whole, strict=True) if g.any()]
    size = float(sum(p.detach().square().sum() for p in used)) ** 0.5
    assert length > size
    torch.testing.assert_close(gradients(model, value), tuple(0.5 * size / length * g for g in whole))
    assert float(value.detach()) == float(make(kind, model, weight=1e4)(X, Y).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg(X, Y)  # said once
        small = make(kind, model, weight=1e-4, clip=1.0)(X, Y)
    torch.testing.assert_close(gradients(model, small), gradients(model, make(kind, model, weight=1e-4)(X, Y)))


def test_weights_of_zero_set_no_limit():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh()).double()
    nn.init.zeros_(model[0].weight)

    def squared(model, x):
        return model(x) + model(x) ** 2

    found = [
        gradients(model, make("complexity", model, weight=1e3, clip=clip, forward_fn=squared)(X))
        for clip in (None, 1.0)
    ]
    assert found[0][0].any()
    torch.testing.assert_close(*found)


# --- few examples at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"params": "0.*", "centered": False}])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "kare"])
def test_micro_batches_change_nothing(kind, options):
    model, head = mlp(), nn.Linear(3, 3).double()

    def forward_fn(model, x):
        return head(model(x))  # gradients flow to what the features depend on, of other modules too

    found = []
    for size in (None, 1, 3, 7, 50):
        reg = make(kind, model, weight=1.0, micro_batch_size=size, forward_fn=forward_fn, **options)
        value = reg(X, Y)
        own = [*model.parameters(), *head.parameters()]
        found.append((value.detach(), torch.autograd.grad(value, own, materialize_grads=True)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)
    assert found[0][1][-2].any()


def test_micro_batches_are_for_independent_examples():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().train()
    with pytest.raises(ValueError, match="micro_batch_size: expected None"):
        make("complexity", model, micro_batch_size=2)(X)
    make("complexity", model.eval(), micro_batch_size=2)(X)
    mixing = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="depend on the other examples"):
        make("complexity", mixing.eval(), micro_batch_size=2, statistics="running")(X)


def test_models_that_checkpoint_in_training_mode_go_in_micro_batches():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.gradient_checkpointing, self.sizes = mlp(), True, []

        def forward(self, x):
            sizes.append(len(x))
            return self.net(x)

    sizes, model = [], Block()
    x = torch.randn(24, 4, dtype=torch.float64)
    value = make("complexity", model, weight=1.0)(x)
    assert max(sizes[1:]) <= 4
    twin = mlp()
    torch.testing.assert_close(gradients(model, value), gradients(twin, make("complexity", twin, weight=1.0)(x)))


# --- statistics of the batch ------------------------------------------------------------------------------------------


class HandWritten(nn.Module):
    """A batch normalization of one's own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("running_mean", torch.full((width,), 0.3))
        self.register_buffer("running_var", torch.full((width,), 1.7))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var.mul_(0.9).add_(0.1 * var.detach())
        else:
            mean, var = self.running_mean, self.running_var
        return self.scale * (x - mean) / (var + 1e-5).sqrt()


def _block():
    net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), BasicBlock(2), nn.Flatten(), nn.Linear(8, 3))
    return net.double()


class SyncedAct(nn.SyncBatchNorm):
    """With its activation, as in networks of vision."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class Act(nn.BatchNorm1d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def _scripted():
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net[1] = torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).double())
    return net


NORMALIZED = {
    "torch's": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "hand-written": lambda: nn.Sequential(nn.Linear(4, 6), HandWritten(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "synced": lambda: nn.Sequential(nn.Linear(4, 6), nn.SyncBatchNorm(6), nn.Tanh(), nn.Linear(6, 3)).double(),
    "synced, with activation": lambda: nn.Sequential(nn.Linear(4, 6), SyncedAct(6), nn.Linear(6, 3)).double(),
    "scripted, with dropout": _scripted,
    "without affine part": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)
    ).double(),
    "block": _block,
}


class ByTheBatch(HandWritten):
    def forward(self, x):
        return self.scale * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


AS_TRAINED = {nn.SyncBatchNorm: nn.BatchNorm1d, SyncedAct: Act, HandWritten: ByTheBatch}


def _as_trained(model):
    """A twin that the oracle, in evaluation mode but for torch's own classes on the CPU, takes as it is trained."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = AS_TRAINED.get(type(module), type(module))
    if isinstance(twin[1], torch.jit.ScriptModule):
        twin[1] = nn.BatchNorm1d(6).double()
        twin[1].load_state_dict({key.removeprefix("0."): value for key, value in model[1].state_dict().items()})
    return twin


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", NORMALIZED)
def test_losses_differentiate_the_function_that_is_trained(name, kind):
    torch.manual_seed(2)
    model = NORMALIZED[name]().train()
    state = copy.deepcopy(model.state_dict())
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    value = make(kind, model, weight=1.0, probes=8)(X, Y)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [type(m) for m in model.modules()] == classes
    assert [m.training for m in model.modules()] == modes
    reference = _as_trained(model)
    assert float(value.detach()) == pytest.approx(float(formula(kind, reference, X, Y)), rel=1e-9)
    own = gradients(model, value)
    pairs = zip(reference.parameters(), own, strict=True)
    slopes, expected = slopes_of(
        sum((p * g).sum() for p, g in pairs), reference, lambda: formula(kind, reference, X, Y)
    )
    scale = float(sum(g.square().sum() for g in own)) ** 0.5
    assert slopes == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


@pytest.mark.parametrize("kind", LOSSES)
def test_running_statistics_are_an_option_and_those_of_evaluation_mode(kind):
    torch.manual_seed(2)
    model = NORMALIZED["torch's"]().train()
    model(X)
    values = []
    for training, statistics in ((True, "running"), (False, "running"), (False, "training"), (True, "training")):
        reg = make(kind, model.train(training), weight=1.0, statistics=statistics)
        values.append(float(reg(X, Y).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] == pytest.approx(values[2], rel=1e-12)
    assert values[0] != pytest.approx(values[3], rel=1e-3)


def test_scripts_in_training_mode_predict_inside():
    torch.manual_seed(2)
    model = _scripted().train()
    for _ in range(2):
        model(X)
    state, expected = copy.deepcopy(model.state_dict()), jacobian(_as_trained(model), X)
    features = TangentFeatures(model)
    torch.testing.assert_close(features.kernel(X), kernel(expected), rtol=1e-9, atol=1e-12)
    assert float(features.trace(X)) == pytest.approx(float(matrix(expected).square().sum()), rel=1e-9)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model[1].training


def test_products_of_a_batch_as_one_function():
    torch.manual_seed(2)
    model = NORMALIZED["torch's"]().train()
    oracle = jacobian(model, X, trained=True)
    features = TangentFeatures(model, statistics="training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for create_graph in (False, True):
            K = features.kernel(X, create_graph=create_graph).detach()
            torch.testing.assert_close(K, kernel(oracle), rtol=1e-9, atol=1e-11)
            trace = float(sum(value.square().sum() for value in oracle.values()))
            assert float(features.trace(X, create_graph=create_graph).detach()) == pytest.approx(trace, rel=1e-9)
            S = sketches.gaussian(3, seed=0)
            Z = features.pushforward(X, S, create_graph=create_graph).detach()
            parts = [
                value.flatten(2) @ S.block(name, p, 0, 3).flatten(1).T
                for (name, value), p in zip(oracle.items(), model.parameters(), strict=True)
            ]
            torch.testing.assert_close(Z, sum(parts), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="statistics: expected 'running' or 'training', got 'batch'"):
        TangentFeatures(model, statistics="batch")


def test_training_with_the_penalty_keeps_a_normalized_network_in_step():
    """The function that is trained and the one that predicts stay the same: not so with running statistics inside."""
    drift = {}
    for statistics in ("training", "running"):
        torch.manual_seed(0)
        x = torch.randn(256, 8)
        y = (x[:, :2].prod(1) > 0).long()
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        reg = ComplexityPenalty(model, weight=0.1, every_n_steps=1, statistics=statistics)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step, rows in zip(range(60), itertools.cycle(torch.arange(256).split(64))):  # noqa: B007
            optimizer.zero_grad()
            (F.cross_entropy(model(x[rows]), y[rows]) + reg(x[rows])).backward()
            optimizer.step()
        with torch.no_grad():
            trained = model.train()(x)
            drift[statistics] = float((model.eval()(x) - trained).norm() / trained.norm())
    assert drift["training"] < 0.3
    assert drift["running"] > 2 * drift["training"]
