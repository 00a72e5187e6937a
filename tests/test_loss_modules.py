"""Losses as modules in a training loop: when they apply, what they leave alone, what they refuse."""

import copy
import pickle
import warnings

import pytest
import torch
from loss_cases import LOSSES, problem
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures, functional
from alignreg.losses import AlignmentLoss, ComplexityPenalty

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))


@pytest.mark.parametrize("kind", LOSSES)
def test_where_it_does_not_apply(kind):
    """An exact zero that still backpropagates; training steps count, others do not."""
    model, x, y = problem()
    reg = LOSSES[kind](model, weight=0.5, every_n_steps=3)
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
    off = LOSSES[kind](model, weight=0.0)
    off(x, y).backward()
    assert int(off.step) == 1
    with torch.no_grad():
        value = LOSSES[kind](model, weight=0.5)(x, y)
    assert not value.requires_grad
    assert value != 0


@pytest.mark.parametrize("kind", LOSSES)
def test_probes_and_examples_are_fresh_at_each_step_and_repeat_with_it(kind):
    model, x, y = problem()
    reg = LOSSES[kind](model, weight=1.0, examples=5, probes=4)
    state = torch.get_rng_state()
    values = [float(reg(x, y).detach()) for _ in range(4)]
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(values)) == 4
    other = LOSSES[kind](model, weight=1.0, examples=5, probes=4)
    assert list(reg.state_dict()) == ["step"]
    reg.step.fill_(2)
    other.load_state_dict(reg.state_dict())
    assert [float(other(x, y).detach()) for _ in range(2)] == values[2:]
    seeded = LOSSES[kind](model, weight=1.0, examples=5, probes=4, seed=1)
    assert float(seeded(x, y).detach()) != values[0]


def test_undefined_alignment_is_zero_with_one_warning():
    model, x, y = problem()
    reg = AlignmentLoss(model, weight=1.0)
    with pytest.warns(UserWarning, match="same target"):
        reg(x, y * 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(reg(x, y * 0 + 1).detach()) == 0
    assert reg(x, y) != 0
    silent = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    for p in silent.parameters():
        nn.init.zeros_(p)
    with pytest.warns(UserWarning, match="nothing along"):
        value = AlignmentLoss(silent, weight=1.0, params="0.*")(x, y)
    value.backward()
    assert float(value.detach()) == 0
    with pytest.warns(UserWarning, match="same target"):
        assert AlignmentLoss(model, weight=1.0)(x[:1], y[:1]) == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_linear_model_has_constant_features(kind):
    """Their loss has no gradient, and can be differentiated all the same."""
    _, x, y = problem()
    model = nn.Linear(4, 3).double()
    value = LOSSES[kind](model, weight=1.0)(x, y)
    assert float(value.detach()) != 0
    value.backward()
    assert model.weight.grad is None or not model.weight.grad.any()


def test_one_example():
    model, x, _ = problem()
    assert ComplexityPenalty(model, weight=1.0)(x[:1]) == 0  # centred, nothing is left of it
    trace = TangentFeatures(model).trace(x[:1])
    value = ComplexityPenalty(model, weight=1.0, centered=False, probes=3000)(x[:1]).detach()
    assert float(value) == pytest.approx(float(trace) / 3, rel=0.1)


@pytest.mark.parametrize("kind", LOSSES)
def test_only_the_live_model_and_nothing_of_it(kind):
    model, x, y = problem()
    reg = LOSSES[kind](model, weight=1.0)
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
    (AlignmentLoss(model, weight=1.0)(x, y) + ComplexityPenalty(model, weight=1.0)(x)).backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert model[0].weight.grad.abs().sum() > 0


def test_under_autocast_the_loss_is_in_full_precision():
    model, x, y = problem()
    model, x = model.float(), x.float()
    expected = AlignmentLoss(model, weight=1.0)(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = AlignmentLoss(model, weight=1.0)(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_dtypes_and_devices(kind, dtype, device):
    model, x, y = problem()
    expected = LOSSES[kind](model, weight=1.0, probes=2000)(x, y).detach()
    model = model.to(device, dtype)
    reg = LOSSES[kind](model, weight=1.0, probes=2000).to(device)
    value = reg(x.to(device, dtype), y.to(device))
    assert value.dtype == torch.float32
    value.backward()
    assert model[0].weight.grad.isfinite().all()
    assert float(value.detach()) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("kind", LOSSES)
def test_training_with_it_moves_what_it_says(kind):
    reached = []
    for weight in (0.0, 0.2 if kind == "alignment" else 0.05):
        torch.manual_seed(0)
        model, x, y = problem()
        reg = LOSSES[kind](model, weight=weight, probes=16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(40):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) + reg(x, y)).backward()
            optimizer.step()
        K = TangentFeatures(model).kernel(x)
        reached.append(float(functional.alignment(K, y) if kind == "alignment" else torch.einsum("ikik->", K)))
    without, with_it = reached
    assert with_it > 1.2 * without if kind == "alignment" else with_it < 0.9 * without


BAD = {
    "weight": ({"weight": -1.0}, "weight: expected a finite"),
    "nan weight": ({"weight": float("nan")}, "weight: expected a finite"),
    "examples": ({"examples": 1}, "examples: expected a whole number of at least 2, got 1"),
    "fraction of examples": ({"examples": 0.5}, "examples: expected a whole number"),
    "stride": ({"every_n_steps": 0}, "every_n_steps: expected a whole number of at least 1"),
    "no probe": ({"probes": 0}, "probes: expected a whole number"),
    "pattern": ({"params": "head.*"}, "matches no trainable"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", LOSSES)
def test_bad_arguments(kind, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        LOSSES[kind](problem()[0], **{"weight": 1.0, **options})


def test_alignment_needs_four_probes():
    with pytest.raises(ValueError, match="probes: expected a whole number of at least 4, got 3"):
        AlignmentLoss(problem()[0], weight=1.0, probes=3)


@pytest.mark.parametrize("kind", LOSSES)
def test_bad_batches_count_nothing(kind):
    model, x, y = problem()
    reg = LOSSES[kind](model, weight=1.0)
    reg(x, y)
    cases = [
        ((x[:0], y[:0]), ValueError, "at least one example"),
        ((x, y[:-1]), ValueError, "one row for each of the 7"),
        ((3.0, y), TypeError, "got float"),
        ((x, y.tolist()), TypeError, "target: expected a tensor, got list"),
        ((x, y[0]), ValueError, "one row for each of the 7"),
        ((x * torch.nan, y), ValueError, "NaN or inf"),
        ((model(x), y), ValueError, r"probably predictions.*reg\(x, y\)"),
    ]
    if kind == "alignment":
        cases += [((x,), ValueError, r"Call reg\(x, y\)"), ((x, y + 1), ValueError, r"in \[0, 3\)")]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            reg(*arguments)
        assert int(reg.step) == 1
