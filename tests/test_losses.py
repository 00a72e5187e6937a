"""Losses against their formulas from dense tangent features, and against finite differences."""

import copy
import math
import pickle
import warnings

import oracles
import pytest
import torch
from cases import ResNet, build
from torch import nn
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures, estimators, functional, sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty

LOSSES = {"alignment": AlignmentLoss, "complexity": ComplexityPenalty}
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 4)


def cnn():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    return net, torch.randn(7, 1, 6, 6)


def batchnorm():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).train()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net, torch.randn(7, 1, 4, 4)


NETS = {"mlp": mlp, "cnn": cnn, "batchnorm in train mode": batchnorm}
OPTIONS = {
    "defaults": {},
    "uncentred": {"centered": False},
    "params": {"params": ["0.*"]},
    "sub-batch": {"examples": 5},
    "sub-batch, uncentred": {"examples": 5, "centered": False},
    "stride": {"every_n_steps": 3},
    "all": {"params": "*weight", "examples": 4, "every_n_steps": 2, "centered": False, "seed": 3},
}


def problem(net="mlp"):
    model, x = NETS[net]()
    return model.double(), x.double(), torch.tensor([0, 1, 2, 0, 1, 0, 2])


def formula(kind, model, x, y, weight, examples=None, every_n_steps=1, probes=8, seed=0, centered=True, params=None):
    """The loss at step 0, from rows of the Jacobian."""
    n = len(x)
    rows = sketches.subset(n, examples, seed=seed) if examples else torch.arange(n)
    patterns = {None: "*", "*weight": "*weight"}.get(params, params) if not isinstance(params, list) else params[0]
    names = {k for k, _ in model.named_parameters() if patterns == "*" or k.startswith("0.") or patterns == "*weight"}
    if patterns == "*weight":
        names = {k for k in names if k.endswith("weight")}
    elif patterns == "0.*":
        names = {k for k in names if k.startswith("0.")}
    phi = oracles.matrix(oracles.jacobian(model, x[rows], names=names))
    s = len(rows)
    omega = sketches.probes(probes, s, 3, seed=seed, like=x)
    if centered:
        omega = omega - omega.mean(1, keepdim=True)
    g = omega.reshape(probes, -1) @ phi
    if kind == "complexity":
        value = (g**2).sum() / probes / (s * 3)
        if centered:
            value = value * s / (s - 1) * (n - 1) / n
        return weight * every_n_steps * value
    target = oracles.one_hot(y[rows], 3)
    target = (target - target.mean(0)).reshape(-1)
    pairs = [(a, b) for a in range(probes) for b in range(probes) if a != b]
    norm2 = sum((g[a] @ g[b]) ** 2 for a, b in pairs) / len(pairs)
    least = ((g**2).sum(1).mean()) ** 2 / ((s - 1) * 3 if centered else s * 3)
    alignment = (phi.T @ target).square().sum() / (max(norm2, least).sqrt() * target.square().sum())
    return -weight * every_n_steps * alignment.log()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient(kind, net, options):
    model, x, y = problem(net)
    reg = LOSSES[kind](model, weight=0.7, probes=8, **OPTIONS[options])
    torch.testing.assert_close(
        reg(x, y).detach(), formula(kind, model, x, y, 0.7, **OPTIONS[options]), rtol=1e-9, atol=0
    )

    def value(*_):
        reg.step.zero_()  # the same probes and examples at every evaluation
        return reg(x, y)

    assert torch.autograd.gradcheck(value, tuple(model.parameters()), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["resnet, batchnorm", "transformer, dict output", "lstm", "tied weights", "dict inputs", "every norm"]
)
@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_other_models(kind, name):
    """Central differences along one random direction."""
    model, x, forward_fn = build(name)
    model, x = model.double(), oracles.double(x)
    if name == "resnet, batchnorm":
        assert isinstance(model, ResNet)
        model.train()
    n = TangentFeatures(model, forward_fn=forward_fn).outputs(x).shape[0]
    reg = LOSSES[kind](model, weight=1.0, probes=4, forward_fn=forward_fn)
    y = torch.arange(n) % 3

    def value():
        reg.step.zero_()
        return reg(x, y)

    parameters = list(model.parameters())
    grads = torch.autograd.grad(value(), parameters, allow_unused=True, materialize_grads=True)
    step = [torch.randn_like(p) for p in parameters]
    slope = float(sum((g * s).sum() for g, s in zip(grads, step, strict=True)))
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, s in zip(parameters, step, strict=True):
                p.add_(s, alpha=sign * 1e-6)
        ends.append(float(value().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


DRAWS = 2000


@pytest.mark.parametrize("centered", [True, False])
def test_strided_and_subsampled_complexity_has_the_plain_expectation(centered):
    model, x, _ = problem()
    K = TangentFeatures(model).kernel(x)
    K = functional.center(K) if centered else K
    plain = float(torch.einsum("ikik->", K)) / 21
    reg = ComplexityPenalty(model, weight=1.0, examples=3, every_n_steps=4, centered=centered)
    with torch.no_grad():
        values = torch.stack([reg(x) for _ in range(4 * DRAWS)])
    assert int((values > 0).sum()) == DRAWS
    cycles = values.reshape(DRAWS, 4).mean(1)  # one stride each: independent
    z = float((cycles.mean() - plain) / (cycles.std() / DRAWS**0.5))
    print(f"centered={centered}: expectation {float(cycles.mean()):.4f}, plain {plain:.4f}, z = {z:+.2f}")
    assert abs(z) < 3.5


@pytest.mark.parametrize("examples", [None, 5])
def test_strided_alignment_has_the_plain_expectation(examples):
    """At equal examples and probes: alignment depends on how many examples there are, so those stay the same."""
    model, x, y = problem()
    plain = AlignmentLoss(model, weight=1.0, probes=4, seed=1, examples=examples)
    strided = AlignmentLoss(model, weight=1.0, probes=4, seed=2, examples=examples, every_n_steps=4)
    with torch.no_grad():
        a = torch.stack([plain(x, y) for _ in range(DRAWS)])
        b = torch.stack([strided(x, y) for _ in range(4 * DRAWS)]).reshape(DRAWS, 4).mean(1)
    z = float((a.mean() - b.mean()) / ((a.var() + b.var()) / DRAWS).sqrt())
    print(f"examples={examples}: plain {float(a.mean()):.4f}, strided {float(b.mean()):.4f}, z = {z:+.2f}")
    assert abs(z) < 3.5


@pytest.mark.parametrize("centered", [True, False])
def test_more_probes_approach_the_exact_alignment(centered):
    model, x, y = problem()
    exact = -functional.alignment(TangentFeatures(model).kernel(x), y, centered).log()
    value = AlignmentLoss(model, weight=1.0, probes=3000, centered=centered)(x, y).detach()
    assert float(value) == pytest.approx(float(exact), abs=0.05)


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


@pytest.mark.parametrize("centered", [True, False])
def test_norm_is_never_below_what_the_trace_leaves_possible(centered):
    """K = I has the least norm for its trace, and half of the estimates of it lie below."""
    model, x, y = nn.Linear(7, 3, bias=False).double(), torch.eye(7, dtype=torch.float64), problem()[2]
    rows = (7 - 1) * 3 if centered else 7 * 3
    raised = 0
    for seed in range(40):
        reg = AlignmentLoss(model, weight=1.0, probes=4, seed=seed, centered=centered)
        value = float(reg(x, y).detach())
        assert value == pytest.approx(
            float(formula("alignment", model, x, y, 1.0, probes=4, seed=seed, centered=centered)), rel=1e-9
        )
        omega = sketches.probes(4, 7, 3, seed=seed, like=x)
        omega = (omega - omega.mean(1, keepdim=True) if centered else omega).reshape(4, -1)
        trace = float((omega**2).sum()) / 4  # ‖Φᵀω‖ = ‖ω‖
        least = 0.5 * math.log(trace**2 / rows)  # yᵀKy/‖y‖² = 1
        assert value >= least - 1e-9
        raised += value <= least + 1e-9
    assert 5 <= raised <= 35


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


def test_a_loss_of_ones_own():
    """Three lines on pullback: keep the features of class 0 small."""
    model, x, y = problem()
    features = TangentFeatures(model)

    def loss():
        own = torch.zeros(1, 7, 3, dtype=torch.float64)
        own[0, y == 0, 0] = 1
        return estimators.gram(features.pullback(x, own, create_graph=True))[0, 0]

    jac = oracles.matrix(oracles.jacobian(model, x)).reshape(7, 3, -1)
    torch.testing.assert_close(loss().detach(), jac[y == 0, 0].sum(0).square().sum())
    assert torch.autograd.gradcheck(lambda *_: loss(), tuple(model.parameters()))


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
        ((x * torch.nan, y), ValueError, "NaN or inf"),
        ((model(x), y), ValueError, r"probably predictions.*reg\(x, y\)"),
    ]
    if kind == "alignment":
        cases += [((x,), ValueError, r"Call reg\(x, y\)"), ((x, y + 1), ValueError, r"in \[0, 3\)")]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            reg(*arguments)
        assert int(reg.step) == 1
