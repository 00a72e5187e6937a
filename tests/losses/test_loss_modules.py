"""Losses as modules in a training loop: when they apply, what they leave alone, what they refuse."""

import copy
import pickle

import pytest
import torch
from devices import CUDA
from loss_cases import LOSSES, make, problem
from notices import silent, told
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures


@pytest.mark.parametrize("kind", LOSSES)
def test_where_it_does_not_apply(kind):
    """An exact zero that still backpropagates; training steps count, others do not."""
    model, x, y = problem()
    reg = make(kind, model, weight=0.5, every_n_steps=3)
    applied = []
    for _ in range(7):
        value = reg(x, y)
        applied.append(float(value.detach()) != 0)
        (value + 0 * model(x).sum()).backward()
    assert applied == [True, False, False, True, False, False, True]
    assert int(reg.step) == 7
    reg.eval()
    zero = reg(x, y)
    zero.backward()
    assert float(zero.detach()) == 0
    assert zero.dtype == torch.float64
    assert int(reg.step) == 7
    off = make(kind, model, weight=0.0)
    off(x, y).backward()
    assert int(off.step) == 1
    with torch.no_grad():
        value = make(kind, model, weight=0.5)(x, y)
    assert not value.requires_grad
    assert value != 0


@pytest.mark.parametrize("kind", LOSSES)
def test_probes_and_examples_are_fresh_at_each_step_and_repeat_with_it(kind):
    model, x, y = problem()
    reg = make(kind, model, weight=1.0, examples=5, probes=4)
    state = torch.get_rng_state()
    values = [float(reg(x, y).detach()) for _ in range(4)]
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(values)) == 4
    other = make(kind, model, weight=1.0, examples=5, probes=4)
    assert list(reg.state_dict()) == ["step"]
    reg.step.fill_(2)
    other.load_state_dict(reg.state_dict())
    assert [float(other(x, y).detach()) for _ in range(2)] == values[2:]
    seeded = make(kind, model, weight=1.0, examples=5, probes=4, seed=1)
    assert float(seeded(x, y).detach()) != values[0]


def test_undefined_alignment_is_zero_with_one_warning():
    model, x, y = problem()
    reg = make("alignment", model, weight=1.0)
    with pytest.warns(UserWarning, match="same target"):
        reg(x, y * 0).backward()
    with silent():
        assert float(reg(x, y * 0 + 1).detach()) == 0
    assert reg(x, y) != 0
    dead = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    for p in dead.parameters():
        nn.init.zeros_(p)
    with pytest.warns(UserWarning, match="nothing along"):
        value = make("alignment", dead, weight=1.0, params="0.*")(x, y)
    value.backward()
    assert float(value.detach()) == 0
    with pytest.warns(UserWarning, match="same target"):
        assert make("alignment", model, weight=1.0)(x[:1], y[:1]) == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_linear_model_has_constant_features(kind):
    """Their loss has no gradient, and can be differentiated all the same."""
    _, x, y = problem()
    model = nn.Linear(4, 3).double()
    value = make(kind, model, weight=1.0)(x, y)
    assert float(value.detach()) != 0
    value.backward()
    assert model.weight.grad is None or not model.weight.grad.any()


def test_one_example():
    model, x, _ = problem()
    assert make("complexity", model, weight=1.0)(x[:1]) == 0  # centered, nothing is left of it
    trace = TangentFeatures(model).trace(x[:1])
    value = make("complexity", model, weight=1.0, centered=False, probes=3000)(x[:1]).detach()
    assert float(value) == pytest.approx(float(trace) / 3, rel=0.1)


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_live_model_and_nothing_of_it(kind):
    model, x, y = problem()
    reg = make(kind, model, weight=1.0)
    assert list(reg.parameters()) == []
    assert list(reg.children()) == []
    reg.eval()
    assert model.training
    reg.train()
    first = float(reg(x, y).detach())
    clone = copy.deepcopy(reg)
    clone.step.zero_()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert float(clone(x, y).detach()) != first
    parent = nn.Module()
    parent.net, parent.reg = model, reg
    copied = copy.deepcopy(parent)
    assert copied.reg._features.model is copied.net
    lost = pickle.loads(pickle.dumps(reg))
    with pytest.raises(RuntimeError, match="bind"):
        lost(x, y)
    assert int(lost.step) == int(reg.step)
    lost.bind(model)
    assert float(lost(x, y).detach()) == float(reg(x, y).detach())


def test_model_is_left_as_it_was():
    model, x, y = problem("batchnorm in train mode")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (make("alignment", model, weight=1.0)(x, y) + make("complexity", model, weight=1.0)(x)).backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert model[0].weight.grad.abs().sum() > 0


def test_under_autocast_the_loss_is_in_full_precision():
    model, x, y = problem()
    model, x = model.float(), x.float()
    expected = make("alignment", model, weight=1.0)(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = make("alignment", model, weight=1.0)(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_dtypes_and_devices(kind, dtype, device):
    model, x, y = problem()
    expected = make(kind, model, weight=1.0, probes=2000)(x, y).detach()
    model = model.to(device, dtype)
    reg = make(kind, model, weight=1.0, probes=2000).to(device)
    value = reg(x.to(device, dtype), y.to(device))
    assert value.dtype == torch.float32
    value.backward()
    assert model[0].weight.grad.isfinite().all()
    assert float(value.detach()) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("kind", LOSSES)
def test_training_with_it_moves_what_it_says(kind):
    reached = []
    for weight in (0.0, LOSSES[kind].trained):
        torch.manual_seed(0)
        model, x, y = problem()
        reg = make(kind, model, weight=weight, probes=16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(40):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) + reg(x, y)).backward()
            optimizer.step()
        reached.append(float(LOSSES[kind].number(TangentFeatures(model).kernel(x), y)))
    without, with_it = reached
    assert with_it < without - 0.1 * abs(without)


@pytest.mark.parametrize("kind", LOSSES)
def test_defaults(kind):
    """A third of the steps, 32 examples or fewer, weight of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    reg = LOSSES[kind].kind(model)
    assert reg.weight == LOSSES[kind].weight
    values = [float(reg(x, y).detach()) for _ in range(5)]
    assert [value != 0 for value in values] == [True, False, False, True, False]
    same = make(kind, model, weight=3 * reg.weight, examples=LOSSES[kind].examples)
    assert values[0] == pytest.approx(float(same(x, y).detach()), rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_schedule_sees_optimizer_steps(kind):
    model, x, y = problem()
    seen = []

    def warm_up(step):
        seen.append(step)
        return min(step / 2, 1.0)

    reg = make(kind, model, weight=warm_up, gradient_accumulation_steps=2)
    plain = make(kind, model, weight=1.0)
    ratios = [float(reg(x, y).detach() / plain(x, y).detach()) for _ in range(6)]
    assert seen == [0, 0, 1, 1, 2, 2]
    assert ratios == pytest.approx([0, 0, 0.5, 0.5, 1, 1], rel=1e-12)
    count = int(reg.step)
    reg.weight = lambda _: -1.0
    with pytest.raises(
        ValueError, match="weight: expected a finite number of at least 0, from the schedule at step 3, got -1"
    ):
        reg(x, y)
    assert int(reg.step) == count


@pytest.mark.parametrize("kind", LOSSES)
def test_stride_counts_optimizer_steps_under_accumulation(kind):
    model, x, y = problem()
    reg = make(kind, model, weight=1.0, examples=5, probes=4, every_n_steps=2, gradient_accumulation_steps=3)
    values = [float(reg(x, y).detach()) for _ in range(9)]
    assert [value != 0 for value in values] == [True] * 3 + [False] * 3 + [True] * 3
    assert len(set(values)) > 4  # each micro-batch has its own draw


def test_layers_without_a_say_are_left_out_with_one_warning():
    model, x, y = problem()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing reaches the first layer
    alone = make("alignment", model, weight=1.0, params="2.*")(x, y)
    reg = make("alignment", model, weight=1.0, per_layer=True)
    with pytest.warns(UserWarning, match=r"layers \['0'\] leave this loss undefined"):
        value = reg(x, y)
    assert float(value.detach()) == pytest.approx(float(alone.detach()), rel=1e-12)
    with silent():
        reg(x, y)


BAD = [
    ({"weight": -1.0}, "weight: expected a finite"),
    ({"weight": float("nan")}, "weight: expected a finite"),
    ({"examples": 1}, "examples: expected an integer of at least 2, got 1"),
    ({"examples": 0.5}, "examples: expected an integer"),
    ({"every_n_steps": 0}, "every_n_steps: expected a positive integer, got 0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected a positive integer"),
    ({"weight": "0.1"}, "weight: expected a finite"),
    ({"params": "head.*"}, "matches no trainable"),
]


@pytest.mark.parametrize("kind", LOSSES)
def test_bad_arguments(kind):
    for options, message in (*BAD, *LOSSES[kind].refused):
        with pytest.raises(ValueError, match=message):
            make(kind, problem()[0], **{"weight": 1.0, **options})


@pytest.mark.parametrize("kind", LOSSES)
def test_short_targets_are_refused_between_strides_too(kind):
    model, x, y = problem()
    reg = make(kind, model, every_n_steps=4)
    reg(x, y)
    with pytest.raises(ValueError, match="one row for each of the 7"):
        reg(x, y[:-1])
    assert int(reg.step) == 1


@pytest.mark.parametrize("kind", LOSSES)
def test_misuse_counts_nothing_and_bad_values_count(kind):
    model, x, y = problem()
    reg = make(kind, model, weight=1.0)
    reg(x, y)
    cases = [
        ((x[:0], y[:0]), ValueError, "at least one example"),
        ((x, y[:-1]), ValueError, "one row for each of the 7"),
        ((3.0, y), TypeError, "got float"),
        ((x, y.tolist()), TypeError, "target: expected a tensor, got list"),
        ((x, y[0]), ValueError, "one row for each of the 7"),
        ((model(x), y), ValueError, r"probably predictions.*reg\(x, y\)"),
    ]
    if LOSSES[kind].labeled:
        cases += [((x,), ValueError, r"Call reg\(x, y\)")]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            reg(*arguments)
        assert int(reg.step) == 1
    with pytest.raises(ValueError, match="NaN or inf"):
        reg(x * torch.nan, y)
    assert int(reg.step) == 2
    if LOSSES[kind].labeled:
        reg.every_n_steps = 2
        reg(x, y)
        with pytest.raises(ValueError, match=r"in \[0, 3\)"):  # between strides too
            reg(x, y + 1)
        assert int(reg.step) == 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kind", LOSSES)
def test_under_a_gradient_scaler_with_clipping(kind, device):
    """Scaled, unscaled and clipped, the gradients are those of training without a scaler."""
    model, x, y = problem()
    model, x, y = model.float().to(device), x.float().to(device), y.to(device)
    norms, grads = [], []
    for scaler in (torch.amp.GradScaler(device, enabled=False), torch.amp.GradScaler(device, init_scale=2.0**16)):
        reg = make(kind, model, weight=2.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            task = 0 * cross_entropy(model(x).float(), y)
            extra = reg(x, y)
        assert extra.dtype == torch.float32
        scaler.scale(task + extra).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        scaler.step(optimizer)
        scaler.update()
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)
    assert float(grads[0].norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_default_weight_that_may_cost_accuracy_says_so(kind):
    with told() as default:
        LOSSES[kind].kind(nn.Linear(4, 3))
    assert len(default) == LOSSES[kind].costs
    assert all("no weight is given" in message and "accuracy" in message for message in default)
    with silent():
        LOSSES[kind].kind(nn.Linear(4, 3), weight=0.01)
