"""What checks of arguments let pass, what they make of it, and that derivatives and transforms go through them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap

from alignreg import (
    TangentFeatures,
    checks,
    complexity,
    estimators,
    formulas,
    functional,
    linear,
    losses,
    metrics,
    moments,
    sketches,
)
from alignreg.targets import encode

LABELS = torch.tensor([0, 2, 1, 1, 0])


def kernels(count=(), n=5, c=3, rank=9):
    phi = torch.randn(*count, n * c, rank, dtype=torch.float64)
    return (phi @ phi.mT).reshape(*count, n, c, n, c)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


OF_KERNEL = {
    "center": functional.center,
    "alignment": lambda K: functional.alignment(K, LABELS),
    "unbiased": lambda K: functional.alignment(K, LABELS, unbiased=True),
    "spectrum": functional.spectrum,
    "effective_rank": functional.effective_rank,
    "participation_ratio": functional.participation_ratio,
    "trace_ratio": lambda K: functional.trace_ratio(K, 2),
    "eigenvector_alignment": lambda K: functional.eigenvector_alignment(K, LABELS, 2),
    "kare": lambda K: functional.kare(K, LABELS, 0.3),
    "summary": lambda K: functional.summary(functional.spectrum(K), [2])["trace_ratio_2"],
    "of_kernel": lambda K: formulas.unbiased_alignment(K, torch.eye(3)[LABELS]),
}
OF_GRAM = {
    "trace": estimators.trace,
    "frobenius2": estimators.frobenius2,
    "trace2": estimators.trace2,
    "gaussian_frobenius2": estimators.gaussian_frobenius2,
    "gaussian_trace2": estimators.gaussian_trace2,
    "cross_frobenius2": estimators.cross_frobenius2,
    "standard_error": lambda G: estimators.standard_error(estimators.frobenius2, G),
    "jackknife": lambda G: estimators.jackknife(G[0]),
    "gram": lambda G: estimators.gram({"a": G}),
    "alignment": lambda G: estimators.alignment(G[0].abs(), G[0].square()),
    "optimal_metric": lambda G: linear.optimal_metric(G[0]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*OF_KERNEL, *OF_GRAM])
def test_half_precision_is_computed_in_float32(name, dtype):
    K = (kernels() / 20).to(dtype)
    call, given = (OF_KERNEL[name], K) if name in OF_KERNEL else (OF_GRAM[name], K.reshape(15, 15))
    found = call(given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, call(given.float()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(OF_KERNEL.keys() - {"effective_rank", "summary"}))
def test_checks_go_through_vmap_and_its_gradients(name):
    call, K = OF_KERNEL[name], kernels((4,), rank=20)
    expected = torch.stack([call(one) for one in K])
    torch.testing.assert_close(vmap(call)(K), expected)

    def total(k):
        return call(k).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(total, one) for one in K])
    for found in (vmap(jacrev(total))(K), grad(lambda k: vmap(total)(k).sum())(K)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["center", "participation_ratio", "trace_ratio", "spectrum"])
def test_checks_leave_a_compiled_function_whole(name):
    K = kernels()
    found = torch.compile(OF_KERNEL[name], fullgraph=True, backend="eager")(K)
    torch.testing.assert_close(found, OF_KERNEL[name](K))


def test_shapes_alone_need_no_values():
    assert functional.center(torch.ones(2, 3, 2, 3, device="meta")).shape == (2, 3, 2, 3)


def test_a_large_sum_is_not_taken_for_infinity():
    K = 1e38 * torch.ones(3, 2, 3, 2)
    assert K.sum() == torch.inf
    assert functional.center(K).abs().sum() == 0
    with pytest.raises(ValueError, match="K: expected finite values"):
        functional.center(10 * K)


def test_what_rounding_leaves_of_a_constant_kernel_is_none():
    phi = torch.randn(1, 3, 7).expand(8, 3, 7).reshape(24, 7)
    K = (phi @ phi.T).reshape(8, 3, 8, 3)
    K = K * (1 + 1e-7 * torch.randn(8, 3, 8, 3))
    assert functional.effective_rank(functional.center(K)) == 0
    assert functional.alignment(K, torch.arange(8) % 3).isnan()
    small = functional.center(K + 1e-3 * torch.eye(24).reshape(8, 3, 8, 3))
    assert functional.effective_rank(small) > 15


@pytest.mark.parametrize("kind", [metrics.TangentSpectrum, metrics.TangentParticipationRatio, metrics.TangentTrace])
def test_identical_examples_are_legal_in_metrics(kind):
    """Of their centered kernel rounding errors are left, which are neither symmetric nor positive."""
    options = {} if kind is metrics.TangentSpectrum else {"method": "exact"}
    metric = kind(net(), 3, **options)
    metric.update(torch.randn(1, 4).expand(7, 4) * (1 + 1e-7 * torch.randn(7, 1)))
    metric.compute()


COUNTS = {
    "k": lambda n: functional.trace_ratio(kernels(), n),
    "sketch_dim": lambda n: metrics.TangentTrace(net(), n, sketch_dim=n, groups=n, seed=n).sketch_dim,
    "max_examples": lambda n: metrics.TangentSpectrum(net(), n, k=n, max_examples=n).max_examples,
    "probes": lambda n: losses.ComplexityPenalty(net(), probes=n, examples=n, every_n_steps=n, seed=n).probes,
    "m": lambda n: sketches.gaussian(n, n).m,
    "n": lambda n: sketches.probes(n, n, n, seed=n, step=n, offset=n).shape[0],
    "num_examples": lambda n: complexity.rademacher_bound(torch.ones(2), torch.ones(2), n),
}


@pytest.mark.parametrize("name", COUNTS)
def test_integers_of_numpy_are_integers(name):
    torch.manual_seed(0)
    expected = COUNTS[name](3)
    for kind in (np.int64, np.int32, np.uint8):
        torch.manual_seed(0)
        found = COUNTS[name](kind(3))
        assert found == expected
        assert not isinstance(found, np.integer)


def test_numbers_of_numpy_are_numbers():
    K = kernels()
    assert functional.kare(K, LABELS, np.float64(0.5)) == functional.kare(K, LABELS, 0.5)
    reg = losses.ComplexityPenalty(net(), weight=np.float32(0.5))
    assert type(reg.weight) is float
    assert complexity.frobenius_product(net(), margin=torch.tensor(2.0, dtype=torch.float64)) > 0


def test_metrics_of_equal_options_share_whatever_their_integers_are():
    model = net()
    one, two = (metrics.TangentTrace(model, 3, sketch_dim=n(8), seed=n(1)) for n in (int, np.int64))
    assert one.metric_state.keys() == two.metric_state.keys()


@pytest.mark.parametrize("seed", [-1, 2**64, 0])
def test_any_integer_is_a_seed(seed):
    model, x, y = net(), torch.randn(6, 4), torch.arange(6) % 3
    metric = metrics.TangentAlignment(model, 3, sketch_dim=4, seed=seed)
    metric.update(x, y)
    direct = TangentFeatures(model).pushforward(x, sketches.rademacher(4, seed))
    whole = moments.of(direct, encode(y, 3))
    torch.testing.assert_close(getattr(metric, metric._name("gram"))[0], whole.gram, rtol=1e-5, atol=1e-5)
    losses.AlignmentLoss(model, seed=seed, every_n_steps=1)(x, y).backward()


@pytest.mark.parametrize("given", [None, True, "0.1", float("nan"), float("inf"), -1, 10**400, 1j, torch.tensor(0.1)])
def test_rubbish_of_a_schedule_is_refused_and_the_step_does_not_count(given):
    reg = losses.ComplexityPenalty(net(), weight=lambda _: given)
    with pytest.raises(ValueError, match="weight: expected a finite number of at least 0, from the schedule at step 0"):
        reg(torch.randn(6, 4))
    assert int(reg.step) == 0


class Mixed(nn.Module):
    """A complex layer among real ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.spectral = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

    def forward(self, x):
        return (self.first(x).to(self.spectral) @ self.spectral).real


@pytest.mark.parametrize(
    "make",
    [
        TangentFeatures,
        *(lambda model, params=None, kind=kind: kind(model, 3, params=params) for kind in (metrics.TangentTrace,)),
        metrics.PathComplexity,
        losses.ComplexityPenalty,
        losses.KARELoss,
    ],
)
def test_complex_parameters_are_refused_where_they_are_selected(make):
    model = Mixed()
    for params in (None, "spec*"):
        with pytest.raises(ValueError, match=r"model: expected real parameters, got complex ones, 'spectral'.*params="):
            make(model, params=params)
    make(model, params="first.*")
    x = torch.randn(6, 4)
    trace = float(TangentFeatures(model, params="first.*").trace(x))
    rows = jacrev(lambda w: torch.func.functional_call(model, {"first.weight": w}, (x,)))(model.first.weight.detach())
    bias = model.spectral.detach().real.square().sum() * 6
    assert trace == pytest.approx(float(rows.square().sum() + bias), rel=1e-4)


def test_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"model: expected parameters with values, got '0.weight', .* meta device"):
        TangentFeatures(net().to("meta"))


def test_what_to_do_about_labels():
    labels = torch.tensor([0, -100, 2])
    with pytest.raises(ValueError, match=r"^target: .*got -100\. -100 is the ignore_index.*keep = target != -100"):
        encode(labels, 3)
    keep = labels != -100
    assert encode(labels[keep], 3).shape == (2, 3)
    with pytest.raises(ValueError, match=r"\[0, 3\), got -1\.$"):
        encode(torch.tensor([0, -1]), 3)
    tokens = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(ValueError, match=r"target: expected .*shape \(4, 7\).*model\(x\)\[:, -1\].*target\[:, -1\]"):
        encode(tokens, 3)
    assert encode(tokens[:, -1], 3).shape == (4, 3)
    with pytest.raises(ValueError, match=r"got shape \(4, 7\)\.$"):
        encode(tokens.double(), 3)
    with pytest.raises(ValueError, match=r"^y: expected one row for each of the 5 inputs"):
        functional.alignment(kernels(), LABELS[:-1])


def test_what_a_message_shows():
    assert checks.shown("a\nb") == "'a\\nb'"
    assert len(checks.shown(list(range(1000)))) == 80
    assert checks.shown(10**5000) == "a int"
