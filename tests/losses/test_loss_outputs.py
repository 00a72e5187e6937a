"""Outputs of the main forward pass, which a loss uses where their graph serves, and what tells that it does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from loss_cases import LOSSES, PROBED, make, problem
from notices import told
from small_networks import X, Y, gradients, mlp, normalized
from torch import nn

from alignreg import TangentFeatures
from alignreg.distributed.wrappers import _note_outputs


@pytest.mark.parametrize("net", ["mlp", "cnn", "norms"])
@pytest.mark.parametrize("kind", PROBED)
def test_outputs_of_the_main_forward_pass_serve_as_well(kind, net):
    if net == "norms":
        model, x, y = problem()
        model = nn.Sequential(nn.LayerNorm(4), model, nn.RMSNorm(3)).double()
    else:
        model, x, y = problem(net)
    reg, plain = make(kind, model, weight=1.0), make(kind, model, weight=1.0)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(x)
    reg(x, y, outputs=outputs)
    reg.step.zero_()
    calls.clear()
    value = reg(x, y, outputs=outputs)
    assert len(calls) == 1  # two examples, to compare
    grads = gradients(model, value)
    expected = gradients(model, plain(x, y))
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x[:, None, None].expand(-1, 1, 3, -1) * self.head.weight[:, None].sum()
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2)))


NOT_REUSED = {
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).train(),
    "autocast": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "fused attention": Attention,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), backend="aot_eager"),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    "sub-batch": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("case", NOT_REUSED)
def test_outputs_of_another_function_are_not_reused(case, kind):
    model, (_, x, y) = NOT_REUSED[case](), problem()
    x = x.float()
    examples = 5 if case == "sub-batch" else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        outputs = model(x).float()
    reg = make(kind, model, weight=1.0, examples=examples)
    with told() as messages:
        value = reg(x, y, outputs=outputs)
        reg(x, y, outputs=outputs)
    assert sum("outputs:" in message for message in messages) == (case != "sub-batch")
    value.backward()
    assert float(value.detach()) == float(make(kind, model, weight=1.0, examples=examples)(x, y).detach())


@pytest.mark.parametrize("kind", PROBED)
def test_outputs_of_a_training_pass_serve_where_it_normalizes_by_the_batch(kind):
    model, x, y = problem("batchnorm in train mode")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    losses = [make(kind, model, weight=1.0), make(kind, model, weight=1.0)]
    for call in range(5):
        outputs = model(x)
        passes.clear()
        value = losses[0](x, y, outputs=outputs)
        assert len(passes) <= (0 if call == 2 else 2)  # looked at in the 1st, 2nd and 4th
        own = losses[1](x, y)
        assert float(value.detach()) == pytest.approx(float(own.detach()), rel=1e-12)
        grads = [gradients(model, loss) for loss in (value, own)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    with told() as messages:
        model.eval()
        losses[0](x, y, outputs=model(x) + 1)  # another function in another mode is noticed
    assert [message.split(":")[0] for message in messages] == ["outputs"]


def _of_a_copy(model):
    return copy.deepcopy(model)(X)


def _detached(model):
    return model[2](torch.tanh(model[0](X)).detach())


def _hooked(model):
    y = model(X)
    y.register_hook(lambda gradient: 0.1 * gradient)
    return y


def _with_a_hook_of_a_module(model):
    model[2].register_full_backward_pre_hook(lambda _, after: (0.1 * after[0],))
    return model(X)


GRAPHS = {
    "a copy": _of_a_copy,
    "detached": _detached,
    "hooked": _hooked,
    "hook of a module": _with_a_hook_of_a_module,
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", LOSSES)
def test_outputs_with_another_graph_are_not_taken(kind, graph):
    model = mlp()
    own = make(kind, model, weight=1.0)(X, Y)
    expected = gradients(model, own)
    outputs = GRAPHS[graph](model)
    assert not TangentFeatures(model).agree(X, outputs)
    with pytest.warns(UserWarning, match="no graph that serves here"):
        value = make(kind, model, weight=1.0)(X, Y, outputs=outputs)
    torch.testing.assert_close(value, own, rtol=1e-10, atol=1e-12)
    found = gradients(model, value)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_hooks_by_which_losses_watch_over_ddp_do_not_count():
    model = mlp()
    outputs = model(X)
    _note_outputs(model, (X,), outputs)
    assert outputs._backward_hooks
    assert TangentFeatures(model).agree(X, outputs)


def test_outputs_of_experts_of_whom_some_are_used_are_taken():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(mlp() for _ in range(7))

        def forward(self, x):
            return sum(torch.where(x[:, 3:] == X[i, 3], self.experts[i](x), 0) for i in range(7) if X[i, 3] in x[:, 3])

    model = Experts()
    assert TangentFeatures(model).agree(X, model(X))
    model.idle = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="do not depend on"):
        assert TangentFeatures(model).agree(X, model(X))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.rate, self.detach = normalized(), 0.0, False

    def forward(self, x):
        h = F.dropout(self.net[:3](x), self.rate, self.training)
        return self.net[3](h.detach() if self.detach else h)


def test_outputs_under_statistics_of_the_batch_are_looked_at_again():
    model = Normalized().train()
    reg = make("complexity", model, weight=1.0)
    own = []
    for step in range(24):
        model.rate = 0.5 if step == 16 else model.rate
        with told() as messages:
            reg.step.zero_()
            reg(X, Y, outputs=model(X))
        own += [step] * bool(messages)
    assert own == [23]  # told of once, at the 24th
    model.rate, reg = 0.0, make("complexity", model, weight=1.0)
    reg(X, Y, outputs=model(X))
    reg(X, Y, outputs=model(X))
    model.detach = True
    outputs, model.detach = model(X), False
    with pytest.warns(UserWarning, match="no graph that serves here"):  # whenever the graph is another
        reg(X, Y, outputs=outputs)
