"""Steps of losses: gradients that are not finite or too long, the same step again, few examples at a time."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LOSSES, PROBED, make
from notices import silent
from small_networks import X, Y, gradients, mlp, trace_of
from torch import nn

from alignreg import TangentFeatures, sketches
from alignreg.losses import AlignmentLoss
from alignreg.metrics import LayerwiseAlignment, TangentAlignment, TangentTrace

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
        with silent():
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
    with silent():
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
@pytest.mark.parametrize("kind", PROBED)
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
