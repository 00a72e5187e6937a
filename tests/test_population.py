"""Alignment of the population, from sums over different examples."""

import math

import oracles
import pytest
import torch
from torch import nn

from alignreg import formulas, functional, moments, population
from alignreg.metrics import TangentAlignment
from alignreg.targets import ConstantTargetError


def sample(n, c, features, seed=0):
    """Features of a mean that is not zero, and targets that follow them."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, c, features, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(n, c, generator=generator, dtype=torch.float64) + phi[..., 0] + 0.5
    return phi, y


def kernel(phi):
    return torch.einsum("ikp,jlp->ikjl", phi, phi)


@pytest.mark.parametrize("c", [1, 3])
def test_exact_kernel(c):
    phi, y = sample(7, c, 5)
    expected = oracles.unbiased_alignment({"w": phi}, y)
    assert float(functional.alignment(kernel(phi), y, unbiased=True)) == pytest.approx(float(expected), rel=1e-10)


def test_of_one_output_it_is_hsic_1():
    """Song et al. 2012, equation 5, of kernels without their diagonals."""
    phi, y = sample(9, 1, 4)
    K, L = kernel(phi)[:, 0, :, 0], y @ y.T

    def hsic1(K, L):
        K, L, n = K - K.diag().diag(), L - L.diag().diag(), len(K)
        sums = K.sum() * L.sum() / ((n - 1) * (n - 2))
        return ((K @ L).trace() + sums - 2 * (K @ L).sum() / (n - 2)) / (n * (n - 3))

    expected = hsic1(K, L) / (hsic1(K, K) * hsic1(L, L)).sqrt()
    found = functional.alignment(kernel(phi), y, unbiased=True)
    assert float(found) == pytest.approx(float(expected), rel=1e-10)


def standard_error(sums, pairs, block=1):
    """The error that the metric gives of these sums."""
    metric = TangentAlignment(network(), 3, unbiased=True)
    seen = metric._sketched(sums, pairs)
    return seen._replace(block=block).standard_error(metric._of_sketch)


@pytest.mark.parametrize("c", [1, 3])
def test_sums_of_a_sketch(c):
    """Each column, and each pair of columns, against all quadruples of examples."""
    phi, y = sample(6, c, 8)
    z = phi @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    L = kernel(y[..., None])
    of_columns = [kernel(z[..., a : a + 1]) for a in range(4)]
    sums, pairs = moments.of(z, y), population.of(z, y)
    products = torch.stack([oracles.mean_over_different(K, L) for K in of_columns])
    squares = torch.stack([torch.stack([oracles.mean_over_different(a, b) for b in of_columns]) for a in of_columns])
    torch.testing.assert_close(population._products(sums, pairs), products, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(population._squares(sums, pairs), squares, rtol=1e-9, atol=1e-9)
    off = squares.sum() - squares.diagonal().sum()
    expected = products.mean() / (off / 12 * oracles.mean_over_different(L, L)).sqrt()
    assert float(population.alignment(sums, pairs)) == pytest.approx(float(expected), rel=1e-9)
    without = []
    for left_out in range(4):
        rest = [a for a in range(4) if a != left_out]
        some = squares[rest][:, rest]
        norm = (some.sum() - some.diagonal().sum()) / 6 * oracles.mean_over_different(L, L)
        without.append(products[rest].mean() / norm.sqrt())
    error = (torch.stack(without) - torch.stack(without).mean()).square().sum() * 3 / 4
    assert float(standard_error(sums, pairs)) == pytest.approx(float(error.sqrt()), rel=1e-9)


def test_blocks_of_dependent_columns():
    """Norms come from pairs of columns of different blocks, errors from leaving blocks out."""
    phi, y = sample(6, 2, 8)
    z = phi @ torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    L = kernel(y[..., None])
    of_columns = [kernel(z[..., a : a + 1]) for a in range(6)]
    sums, pairs = moments.of(z, y), population.of(z, y)

    def value(blocks):
        columns = [a for block in blocks for a in (2 * block, 2 * block + 1)]
        products = [oracles.mean_over_different(of_columns[a], L) for a in columns]
        across = [(a, b) for a in columns for b in columns if a // 2 != b // 2]
        norms = [oracles.mean_over_different(of_columns[a], of_columns[b]) for a, b in across]
        scale = torch.stack(norms).mean() * oracles.mean_over_different(L, L)
        return torch.stack(products).mean() / scale.sqrt()

    assert float(population.alignment(sums, pairs, block=2)) == pytest.approx(float(value([0, 1, 2])), rel=1e-9)
    without = torch.stack([value(rest) for rest in ([1, 2], [0, 2], [0, 1])])
    error = ((without - without.mean()).square().sum() * 2 / 3).sqrt()
    assert float(standard_error(sums, pairs, block=2)) == pytest.approx(float(error), rel=1e-9)


def test_the_exact_numerator_counts():
    phi, y = sample(8, 2, 6)
    S = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guess = torch.tensor([0.3, -0.2], dtype=torch.float64)
    back = torch.einsum("ikp,ik->p", phi, y - guess)
    sums, z = moments.of(phi @ S, y, pullback=back, guess=guess), phi @ S
    own = float(moments.numerators(sums).mean() - moments.numerators(moments.of(z, y)).mean())
    both = [population._products(a, population.of(z, y)).mean() for a in (sums, moments.of(z, y))]
    n = 8
    weight = (n * n - 3 * n + 1) / (n * (n - 1) * (n - 2) * (n - 3))
    assert abs(own) > 0.1
    assert float(both[0] - both[1]) == pytest.approx(own * weight, rel=1e-9)


def test_batches_add_and_shifts_change_nothing():
    phi, y = sample(12, 3, 6)
    z = phi @ torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(*parts):
        sums, pairs = moments.zeros(3, 4, 0), population.zeros(3, 4)
        for a, b in parts:
            sums = sums.merge(moments.of(a, b))
            pairs = population.PairSums(*(mine + other for mine, other in zip(pairs, population.of(a, b), strict=True)))
        return float(population.alignment(sums, pairs))

    whole = value((z, y))
    assert value((z[:5], y[:5]), (z[5:6], y[5:6]), (z[6:], y[6:])) == pytest.approx(whole, rel=1e-10)
    assert value((z + torch.randn(3, 4, dtype=torch.float64), y - 2)) == pytest.approx(whole, rel=1e-8)
    assert value((3 * z, 0.1 * y)) == pytest.approx(whole, rel=1e-10)


def test_samples_tell_of_their_population():
    """Numerator and norms, sketched from eight examples, against those of the finite population that they are from."""
    phi, y = sample(40, 2, 5, seed=3)
    centered, wanted = phi - phi.mean(0), y - y.mean(0)
    K, L = kernel(centered), kernel(wanted[..., None])
    whole = {"products": (K * L).mean((0, 2)).sum(), "squares": K.square().mean((0, 2)).sum()}
    whole["targets"] = L.square().mean((0, 2)).sum()
    generator = torch.Generator().manual_seed(0)
    draws = {name: [] for name in whole}
    for _ in range(3000):
        rows = torch.randint(40, (8,), generator=generator)
        z, some = phi[rows] @ torch.randn(5, 4, generator=generator, dtype=torch.float64), y[rows]
        sums, pairs = moments.of(z, some), population.of(z, some)
        squares = population._squares(sums, pairs)
        draws["products"].append(population._products(sums, pairs).mean())
        draws["squares"].append((squares.sum() - squares.diagonal().sum()) / 12)
        draws["targets"].append(population._norm2_of_targets(sums, pairs))
    for name, drawn in draws.items():
        values = torch.stack(drawn)
        assert abs(float(values.mean() - whole[name]) / float(values.std() / 3000**0.5)) < 3.5, name


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_metric_over_batches_and_groups(method):
    net = network()
    x = torch.randn(40, 3, dtype=torch.float64)
    y = x.argmax(1)
    group = (torch.arange(40) % 4 == 0).long()
    options = {"sketch_dim": 200, "unbiased": True, "groups": 2, "method": method}
    metric = TangentAlignment(net, 3, **options)
    for rows in torch.arange(40).split([17, 1, 22]):
        metric.update(x[rows], y[rows], group[rows])
    found, errors = metric.compute(), metric.standard_error()
    jac = oracles.jacobian(net, x)
    for name, rows in (("total", torch.arange(40)), ("group_0", (group == 0).nonzero()[:, 0])):
        K = oracles.kernel({key: value[rows] for key, value in jac.items()})
        exact = formulas.unbiased_alignment(K, oracles.one_hot(y[rows], 3))
        if method == "exact":
            assert float(found[name]) == pytest.approx(float(exact), rel=1e-9)
            assert float(errors[name]) == 0
        else:
            assert abs(float(found[name] - exact)) < 4 * float(errors[name])
            assert 0 < float(errors[name]) < 0.2 * float(exact)
    whole = TangentAlignment(net, 3, **{**options, "groups": None})
    whole.update(x, y)
    tolerance = 1e-9 if method == "exact" else 0.05
    assert float(whole.compute()) == pytest.approx(float(found["total"]), rel=tolerance)


def test_it_does_not_share_with_the_biased_one():
    from torchmetrics import MetricCollection

    net = network()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(3, (30,))
    kinds = {"sample": False, "population": True}
    both = MetricCollection({name: TangentAlignment(net, 3, unbiased=unbiased) for name, unbiased in kinds.items()})
    both.update(inputs=x[:20], target=y[:20])
    both.update(inputs=x[20:], target=y[20:])
    for name, unbiased in kinds.items():
        alone = TangentAlignment(net, 3, unbiased=unbiased)
        alone.update(x[:20], y[:20])
        alone.update(x[20:], y[20:])
        assert float(both.compute()[name]) == pytest.approx(float(alone.compute()), rel=1e-12)


def test_what_is_undefined():
    phi, y = sample(6, 2, 5)
    assert math.isnan(functional.alignment(kernel(phi[:3]), y[:3], unbiased=True))
    assert math.isnan(functional.alignment(torch.zeros(6, 2, 6, 2, dtype=torch.float64), y, unbiased=True))
    with pytest.raises(ConstantTargetError):
        functional.alignment(kernel(phi), torch.ones(6, 2), unbiased=True)
    for call in (
        lambda: functional.alignment(kernel(phi), y, centered=False, unbiased=True),
        lambda: TangentAlignment(network(), 3, centered=False, unbiased=True),
    ):
        with pytest.raises(ValueError, match="expected the centered kernel"):
            call()
    z = phi[..., :4]
    for function in (population.alignment, standard_error):
        assert math.isnan(function(moments.of(z[:3], y[:3]), population.of(z[:3], y[:3])))
    for function in (population.alignment, standard_error):
        with pytest.raises(ConstantTargetError):
            function(moments.of(z, torch.ones(6, 2)), population.of(z, torch.ones(6, 2)))
        with pytest.raises(ValueError, match="no examples"):
            function(moments.zeros(2, 4, 0), population.zeros(2, 4))
    metric = TangentAlignment(network(), 3, unbiased=True)
    assert metric.set_dtype(torch.float32)._defaults[metric._name("outer")].dtype == torch.float64
