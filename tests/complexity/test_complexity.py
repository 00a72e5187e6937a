"""The measures of complexity against their formulas."""

import copy
import math

import complexity_oracles as oracles
import pytest
import torch
from torch import nn

from alignreg import complexity
from alignreg.complexity import (
    bartlett2017,
    distance,
    frobenius_product,
    margin,
    neyshabur2018,
    path_norm,
    rademacher_bound,
)
from alignreg.metrics import PathComplexity


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))


def cnn():
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 2 * 3, 2))


def one_hidden():
    return nn.Sequential(nn.Flatten(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def moved(model):
    """A network that started elsewhere."""
    initial = copy.deepcopy(model)
    with torch.no_grad():
        for p in initial.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return initial


SHAPES = {mlp: (3,), cnn: (4, 3, 4), one_hidden: (3,)}


ORACLES = {
    "frobenius_product": oracles.frobenius_product,
    "spectral_product": oracles.spectral_product,
    "path_norm": lambda model, initial: oracles.path_norm(model, SHAPES[cnn]),
    "distance": oracles.distance,
    "bartlett2017": oracles.bartlett2017,
    "neyshabur2018": oracles.neyshabur2018,
}
POWERS = {"frobenius_product": 2, "spectral_product": 2, "path_norm": 2}


def measure(name, model, initial, shape, **options):
    function = getattr(complexity, name)
    if name == "path_norm":
        return function(model, shape, **options)
    return function(model, **options) if name in POWERS else function(model, initial, **options)


CASES = [(name, net) for name in ORACLES for net in SHAPES if name != "neyshabur2018" or net is one_hidden]
everywhere = pytest.mark.parametrize("name", ORACLES)


@pytest.mark.parametrize(("name", "net"), CASES)
def test_formula(name, net):
    model = net().double()
    initial = moved(model)
    expected = ORACLES[name](model, initial)
    got = measure(name, model, initial, SHAPES[net])
    assert (got.dtype, got.shape, got.requires_grad) == (torch.float64, (), False)
    assert float(got) == pytest.approx(expected, rel=1e-12)
    power = POWERS.get(name, 1)
    for gamma in (0.25, torch.tensor(0.25)):
        divided = measure(name, model, initial, SHAPES[net], margin=gamma)
        # The root of the number of units, 5 of them here, is not divided.
        units = math.sqrt(5) if name == "neyshabur2018" else 0.0
        assert float(divided) == pytest.approx((expected - units) / 0.25**power + units, rel=1e-12)
    for gamma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin: expected a positive number"):
            measure(name, model, initial, SHAPES[net], margin=gamma)


@everywhere
def test_dtypes_are_computed_in_float64(name):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = one_hidden().to(dtype)
        initial = moved(model)
        got = measure(name, model, initial, (3,))
        assert got.dtype == torch.float64
        # The oracle has the same rounded weights: nothing else may be rounded.
        assert float(got) == pytest.approx(ORACLES[name](model, initial), rel=1e-12)


@everywhere
def test_the_model_stays_as_it_is(name):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            return x

    model = one_hidden().append(Counting())
    model[1].weight.requires_grad_(False)
    model[2].eval()
    model(torch.ones(1, 3)).sum().backward()
    before = copy.deepcopy(model)
    requires = [p.requires_grad for p in model.parameters()]
    gradients = [copy.deepcopy(p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    got = measure(name, model, model.state_dict(), (3,))
    assert torch.equal(state, torch.get_rng_state())
    for (key, value), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for p, required, gradient in zip(model.parameters(), requires, gradients, strict=True):
        assert p.requires_grad == required
        assert (p.grad is None and gradient is None) or torch.equal(p.grad, gradient)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert float(measure(name, model, model, (3,))) == float(got)


@everywhere
def test_wrappers_and_state_dicts(name):
    model = one_hidden().double()
    initial = moved(model)
    expected = measure(name, model, initial, (3,))
    wrapped = nn.DataParallel(model)
    assert float(measure(name, wrapped, nn.DataParallel(initial), (3,))) == float(expected)
    assert float(measure(name, model, initial.state_dict(), (3,))) == float(expected)


@everywhere
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.BatchNorm1d(3), r"'1' \(BatchNorm1d\)"),
        (lambda: nn.BatchNorm1d(3, affine=False), r"'1' \(BatchNorm1d\)"),
        (lambda: nn.LayerNorm(3), r"'1' \(LayerNorm\)"),
        (lambda: nn.LayerNorm(3, elementwise_affine=False), r"'1' \(LayerNorm\)"),
        (lambda: nn.Embedding(3, 3), r"'1' \(Embedding\)"),
        (nn.PReLU, r"'1' \(PReLU\)"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 1)), r"'1\.0' \(Conv1d\)"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), r"'1' \(ParametrizedLinear\)"),
        (lambda: nn.LazyLinear(3), r"uninitialized"),
    ],
)
def test_modules_without_a_definition(name, other, message):
    model = nn.Sequential(nn.Linear(3, 3), other(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=message):
        measure(name, model, model, (3,))


@everywhere
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_models_that_do_not_serve(name):
    with pytest.raises(ValueError, match=r"model: expected nn\.Linear or nn\.Conv2d layers, got Sequential"):
        measure(name, nn.Sequential(nn.ReLU()), {}, (3,))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        measure(name, "net", {}, (3,))
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'0' as '2' too"):
        measure(name, nn.Sequential(layer, nn.ReLU(), layer), {}, (3,))
    for value in (math.nan, math.inf):
        model = one_hidden()
        initial = copy.deepcopy(model)
        with torch.no_grad():
            model[3].weight[1, 2] = value
        with pytest.raises(ValueError, match=r"model: '3' \(Linear\): weight: expected finite"):
            measure(name, model, initial, (3,))
    with pytest.raises(ValueError, match="empty"):
        measure(name, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0)), {}, (3,))


@pytest.mark.parametrize("name", ["distance", "bartlett2017", "neyshabur2018"])
def test_initial_that_does_not_fit(name):
    model = one_hidden()
    state = copy.deepcopy(model.state_dict())
    for initial, message in (
        (one_hidden().append(nn.Linear(2, 2)), "'4.bias' in only one"),
        ({k: v for k, v in state.items() if k != "1.weight"}, "'1.weight' in only one"),
        ({f"module.{k}": v for k, v in state.items()}, "in only one"),
        (state | {"1.weight": torch.ones(1, 3)}, r"1\.weight of shape \(5, 3\), got \(1, 3\)"),
        (state | {"3.weight": torch.full((2, 5), torch.nan)}, r"initial: 3\.weight: expected finite"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(name, model, initial, (3,))
    with pytest.raises(TypeError, match="initial: expected a model or its state dict, got list"):
        measure(name, model, [], (3,))
    assert measure(name, model, {k: v.bfloat16() for k, v in state.items()}, (3,)) < math.inf


@pytest.mark.parametrize("zero", [(1,), (3,), (1, 3)])
def test_zero_weights(zero):
    model = one_hidden().double()
    initial = moved(model)
    with torch.no_grad():
        for at in zero:
            model[at].weight.zero_()
            model[at].bias.zero_()
    for name in ("frobenius_product", "spectral_product"):
        assert measure(name, model, initial, (3,)) == 0
    for name in ("path_norm", "distance", "neyshabur2018"):
        assert float(measure(name, model, initial, (3,))) == pytest.approx(ORACLES[name](model, initial), rel=1e-12)
    got = float(bartlett2017(model, initial))
    with torch.no_grad():
        for at in zero:
            model[at].weight[0, 0] = 1e-13
    assert got == pytest.approx(oracles.bartlett2017(model, initial), rel=1e-6, abs=1e-6)
    assert (got == 0) == (len(zero) == 2)


def test_nothing_moved():
    model = mlp()
    assert distance(model, model) == 0
    assert bartlett2017(model, copy.deepcopy(model)) == 0


def test_tied_weights_count_once_in_the_distance_and_by_layer_in_products():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    initial = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight += torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(distance(model, initial)) == pytest.approx(5, rel=1e-6)
    assert float(frobenius_product(model)) == pytest.approx(oracles.squares(oracles.array(model[0].weight)) ** 2)


def test_path_norm_of_other_modules_and_shapes():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)).double()
    w, b, V, c = (oracles.array(p) ** 2 for p in model.parameters())
    hidden = [math.tanh(w[o].sum() + b[o]) for o in range(2)]
    expected = sum(V[k, o] * hidden[o] for k in range(2) for o in range(2)) + c.sum()
    assert float(path_norm(model, (1, 3, 3))) == pytest.approx(expected, rel=1e-12)
    assert float(path_norm(model, torch.Size([1, 3, 3]))) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"expected an output \(1, c\) .* got shape \(1, 1, 3\)"):
        path_norm(mlp(), (1, 3))


def test_neyshabur2018_refuses_other_networks():
    for model in (mlp(), nn.Linear(3, 2)):
        with pytest.raises(ValueError, match="expected one hidden layer, so two layers, got"):
            neyshabur2018(model, model)
    model = cnn()
    with pytest.raises(ValueError, match=r"expected nn\.Linear layers, .* got '0' \(Conv2d\)"):
        neyshabur2018(model, model)
    backwards = nn.ModuleDict({"head": nn.Linear(5, 2), "body": nn.Linear(3, 5)})
    with pytest.raises(ValueError, match=r"expected 'body' \(Linear\) to take the 2 units"):
        neyshabur2018(backwards, backwards)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda")
@everywhere
def test_cuda(name):
    model = one_hidden().half().cuda()
    initial = moved(model)
    got = measure(name, model, copy.deepcopy(initial).cpu(), (3,))
    assert (got.device.type, got.dtype) == ("cuda", torch.float64)
    assert float(got) == pytest.approx(ORACLES[name](model, initial), rel=1e-10)


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_margin(quantile, dtype):
    outputs, y = torch.randn(23, 4, requires_grad=True).to(dtype), torch.randint(4, (23,))
    rows = oracles.array(outputs)
    margins = sorted(rows[i][k] - max(rows[i][j] for j in range(4) if j != k) for i, k in enumerate(y.tolist()))
    at = quantile * 22
    low, high = margins[math.floor(at)], margins[math.ceil(at)]
    got = margin(outputs, y, quantile)
    assert (got.dtype, got.requires_grad) == (torch.float64, False)
    assert float(got) == pytest.approx(low + (at - math.floor(at)) * (high - low), rel=1e-12)
    if quantile == 0:
        assert got == margin(outputs, y) == margins[0]


def test_margin_refuses():
    outputs, y = torch.randn(3, 4), torch.tensor([0, 1, 3])
    for values in (outputs[:, :1], outputs[0], outputs[:0]):
        with pytest.raises(ValueError, match="outputs: expected"):
            margin(values, y)
    for value in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="outputs: expected finite"):
            margin(outputs + value, y)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="quantile: expected"):
            margin(outputs, y, value)
    for labels, message in (
        (torch.eye(4)[:3], "y: expected class indices"),
        (y.float(), "integer class indices"),
        (y + 1, "got 4"),
        (y[:2], "3 inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            margin(outputs, labels)
    with pytest.raises(TypeError, match="expected a tensor"):
        margin(outputs, [0, 1, 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rademacher_bound(dtype):
    lengths, traces = torch.rand(6).to(dtype), 10 * torch.rand(6).to(dtype)
    expected = sum(m / 40 * math.sqrt(t) for m, t in zip(oracles.array(lengths), oracles.array(traces), strict=True))
    got = rademacher_bound(lengths.requires_grad_(), traces, 40)
    assert (got.dtype, got.requires_grad) == (torch.float64, False)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_rademacher_bound_of_a_recorded_path():
    model = mlp()[:2].double()
    x = torch.randn(7, 3, dtype=torch.float64)
    path = PathComplexity(model)
    for _ in range(3):
        path.update(x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        path.step()
    history = path.history()
    got = rademacher_bound(history.lengths, history.traces, int(history.examples[0]))
    assert len(history.lengths) == 3
    assert float(got) == pytest.approx(float(path.compute()) / 7, rel=1e-12)


def test_rademacher_bound_refuses():
    ones = torch.ones(3)
    for lengths, traces in ((ones, torch.ones(4)), (ones[None], ones[None])):
        with pytest.raises(ValueError, match=r"lengths, traces: expected \(T,\) each"):
            rademacher_bound(lengths, traces, 5)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lengths: expected finite"):
            rademacher_bound(value * ones, ones, 5)
        with pytest.raises(ValueError, match="traces: expected finite"):
            rademacher_bound(ones, value * ones, 5)
    for n in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_examples: expected a positive integer"):
            rademacher_bound(ones, ones, n)
