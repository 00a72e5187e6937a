"""Unbiasedness over a fixed number of draws, |z| < 3.5, from one large pushforward or pullback cut into sketches."""

import re

import oracles
import pytest
import torch
from cases import build

from alignreg import TangentFeatures, estimators, moments, sketches

DRAWS = 600


def z_score(values, truth):
    values = torch.as_tensor(values, dtype=torch.float64)
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


def problem(name="mlp"):
    model, x, _ = build(name)
    features = TangentFeatures(model.double())
    jac = oracles.jacobian(model, x)
    y = torch.randn(len(x), next(iter(jac.values())).shape[1], dtype=torch.float64)
    return features, x.double(), jac, y


@pytest.fixture(scope="module")
def feature_sketches():
    """DRAWS sketches of m directions each, by distribution and m."""
    features, x, jac, y = problem()
    out = {}
    for distribution in ("gaussian", "rademacher"):
        for m in (3, 8):
            lazy = sketches.RandomDirections(DRAWS * m, 11, distribution)
            out[distribution, m] = features.pushforward(x, lazy).unflatten(2, (DRAWS, m)).unbind(2)
    return out, jac, y


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("m", [3, 8])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_feature_sketch_is_unbiased(feature_sketches, distribution, m, centered):
    draws, jac, y = feature_sketches
    K = oracles.kernel(oracles.centered_features(jac) if centered else jac)
    target = (y - y.mean(0)).flatten()
    truth = {
        "trace": torch.einsum("ikik->", K),
        "frobenius2": K.square().sum(),
        "trace2": torch.einsum("ikik->", K).square(),
        "numerator": target @ oracles.matrix(jac) @ oracles.matrix(jac).T @ target,
    }
    samples = {key: [] for key in truth}
    for z in draws[distribution, m]:
        batch = moments.of(z, y)
        gram = batch.centered() if centered else batch.gram
        samples["trace"].append(moments.trace(batch, centered=centered))
        samples["frobenius2"].append(moments.frobenius2(batch, centered=centered))
        samples["trace2"].append(estimators.trace2(gram))
        samples["numerator"].append(moments.numerator(batch))
    for key, values in samples.items():
        assert abs(z_score(values, truth[key])) < 3.5, key


def test_naive_frobenius_would_be_caught(feature_sketches):
    """The power of the test above: the biased estimate is far outside."""
    draws, jac, y = feature_sketches
    truth = oracles.kernel(oracles.centered_features(jac)).square().sum()
    naive = [moments.of(z, y).centered().square().mean() for z in draws["gaussian", 8]]
    assert z_score(naive, truth) > 10


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_probe_sketch_is_unbiased(distribution):
    features, x, jac, _ = problem()
    n, c, m = 6, 3, 4
    K = oracles.kernel(oracles.centered_features(jac))
    truth = (torch.einsum("ikik->", K), K.square().sum(), torch.einsum("ikik->", K).square())
    omega = torch.cat(
        [sketches.probes(m, n, c, seed=3, step=t, distribution=distribution, like=x) for t in range(DRAWS)]
    )
    omega = omega - omega.mean(1, keepdim=True)  # centering the probes centers the kernel
    back = features.pullback(x, omega)
    g = torch.cat([value.flatten(1) for value in back.values()], dim=1).unflatten(0, (DRAWS, m))
    grams = g @ g.mT
    for fn, want in zip((estimators.trace, estimators.frobenius2, estimators.trace2), truth, strict=True):
        assert abs(z_score([fn(G) for G in grams], want)) < 3.5, fn.__name__
    if distribution == "gaussian":  # the only columns that those for Gaussian ones suit
        for fn, want in zip((estimators.gaussian_frobenius2, estimators.gaussian_trace2), truth[1:], strict=True):
            assert abs(z_score([fn(G) for G in grams], want)) < 3.5, fn.__name__
    else:
        assert abs(z_score([estimators.gaussian_frobenius2(G) for G in grams], truth[1])) > 3.5


@pytest.mark.parametrize(
    ("fn", "mean"),
    [(estimators.gaussian_frobenius2, estimators.frobenius2), (estimators.gaussian_trace2, estimators.trace2)],
)
def test_gaussian_estimates_are_means_over_rotations(fn, mean):
    Z = torch.randn(9, 4, dtype=torch.float64)
    rotations = torch.linalg.qr(torch.randn(4000, 4, 4, dtype=torch.float64)).Q
    values = [mean(Q.T @ Z.T @ Z @ Q) for Q in rotations]
    assert abs(z_score(values, fn(Z.T @ Z))) < 3.5
    turned = Z @ rotations[0]
    torch.testing.assert_close(fn(turned.T @ turned), fn(Z.T @ Z))


def test_gaussian_norm_of_nearly_equal_columns_keeps_its_digits():
    """The difference of two sums would be zero in single precision."""
    G = torch.eye(5) * 1e4 + torch.diag(torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]))
    assert float(estimators.gaussian_frobenius2(G)) == pytest.approx(2 / 28)


@pytest.fixture(scope="module")
def deflated_grams():
    """Products of a direction u that matters and of 4 probes orthogonal to it, and of probes that are not."""
    _, x, jac, y = problem()
    K = oracles.kernel(oracles.centered_features(jac)).flatten(2).flatten(0, 1)
    u = (torch.linalg.eigh(K).eigenvectors[:, -2:] @ torch.tensor([0.6, 0.8], dtype=torch.float64)).reshape(y.shape)
    omega = torch.cat([sketches.probes(4, *y.shape, seed=5, step=t, like=x) for t in range(DRAWS)])
    omega = omega - omega.mean(1, keepdim=True)
    orthogonal = omega - (omega * u).sum((1, 2), keepdim=True) * u
    phi = oracles.matrix(jac)
    found = {}
    for name, probes in (("orthogonal", orthogonal), ("any", omega)):
        g = (probes.flatten(1) @ phi).unflatten(0, (DRAWS, 4))
        g = torch.cat([(u.flatten() @ phi).expand(DRAWS, 1, -1), g], dim=1)
        found[name] = g @ g.mT
    return found, K


@pytest.mark.parametrize(
    "fn",
    [
        estimators.trace,
        estimators.frobenius2,
        estimators.trace2,
        estimators.gaussian_frobenius2,
        estimators.gaussian_trace2,
    ],
)
def test_an_exact_column_leaves_estimates_unbiased(deflated_grams, fn):
    grams, K = deflated_grams
    truth = K.trace() if fn is estimators.trace else K.trace() ** 2 if "trace2" in fn.__name__ else K.square().sum()
    assert abs(z_score([fn(G, exact=1) for G in grams["orthogonal"]], truth)) < 3.5
    assert z_score([fn(G, exact=1) for G in grams["any"]], truth) > 3.5  # what orthogonal probes are for


def test_an_exact_column_and_rotations_reduce_the_noise(deflated_grams):
    grams, K = deflated_grams
    spreads = [
        torch.stack([fn(G) for G in grams[name]]).std()
        for name, fn in (
            ("any", lambda G: estimators.frobenius2(G[1:, 1:])),
            ("any", lambda G: estimators.gaussian_frobenius2(G[1:, 1:])),
            ("orthogonal", lambda G: estimators.gaussian_frobenius2(G, exact=1)),
        )
    ]
    print([float(spread / K.square().sum()) for spread in spreads])
    assert spreads[0] > spreads[1] > spreads[2]


def test_probes_over_ranks_are_one_global_draw():
    """Two ranks with their own rows: G is the sum of their pullbacks, and the norm includes the blocks between them."""
    features, x, jac, _ = problem()
    K = oracles.kernel(jac)
    own, same = [], []
    for step in range(DRAWS):
        first, second = (sketches.probes(4, 3, 3, seed=1, step=step, offset=o, like=x) for o in (0, 3))
        for probes, into in (((first, second), own), ((first, first), same)):
            parts = [features.pullback(x[3 * r : 3 * r + 3], omega) for r, omega in enumerate(probes)]
            g = torch.cat([(parts[0][key] + parts[1][key]).flatten(1) for key in parts[0]], dim=1)
            into.append(estimators.frobenius2(g @ g.T))
    assert abs(z_score(own, K.square().sum())) < 3.5
    assert z_score(same, K.square().sum()) > 5  # the mistake this prevents


def test_cross_estimate_holds_for_structured_sketches():
    """CountSketch: columns are not independent. The column formula is biased, two independent sketches are not."""
    _, _, jac, _ = problem()
    phi = oracles.matrix(oracles.centered_features(jac))
    p, m = phi.shape[1], 8
    generator = torch.Generator().manual_seed(4)

    def count_sketch():
        S = torch.zeros(p, m, dtype=torch.float64)
        S[torch.arange(p), torch.randint(m, (p,), generator=generator)] = (
            torch.randint(2, (p,), generator=generator).double() * 2 - 1
        )
        return phi @ S * m**0.5  # E[SSᵀ] = m·I

    truth = (phi @ phi.T).square().sum()
    draws = [(count_sketch(), count_sketch()) for _ in range(DRAWS)]
    assert abs(z_score([estimators.cross_frobenius2(a.T @ b) for a, b in draws], truth)) < 3.5
    assert abs(z_score([estimators.frobenius2(a.T @ a) for a, _ in draws], truth)) > 5


def jackknife(without):
    """The error from the values without each column, written out."""
    return (sum((v - without.mean()) ** 2 for v in without) * (len(without) - 1) / len(without)) ** 0.5


@pytest.mark.parametrize(
    "statistic", [estimators.trace, estimators.frobenius2, estimators.trace2, estimators.off_diagonal_mean]
)
def test_leaving_columns_out(statistic):
    """Each column of all tables at once, against the columns that are left."""
    Z, each = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    G = Z.T @ Z
    seen = []

    def quotient(G, each):
        seen.append(each)
        return statistic(G) / each.square().mean()

    keep = [[b for b in range(5) if b != a] for a in range(5)]
    expected = torch.stack([statistic(G[k][:, k]) / each[k].square().mean() for k in keep])
    torch.testing.assert_close(estimators.standard_error(quotient, G, each), jackknife(expected), rtol=1e-10, atol=0)
    assert [rest.tolist() for rest in seen] == [each[k].tolist() for k in keep]


def test_gram_of_lower_precision():
    columns = {"a": torch.randn(3, 50, 40).bfloat16(), "b": torch.randn(3, 7).half()}
    G = estimators.gram(columns)
    assert G.dtype == torch.float32
    torch.testing.assert_close(G, estimators.gram({name: value.float() for name, value in columns.items()}))


@pytest.mark.parametrize(
    ("fn", "least"),
    [
        (estimators.trace, 1),
        (estimators.frobenius2, 2),
        (estimators.trace2, 2),
        (estimators.gaussian_frobenius2, 2),
        (estimators.gaussian_trace2, 2),
    ],
)
def test_too_few_columns(fn, least):
    assert fn(torch.eye(least)).isfinite().all()
    for bad in (torch.zeros(least - 1, least - 1), torch.zeros(3, 4), torch.zeros(4)):
        with pytest.raises(ValueError, match=f"of at least {least} columns"):
            fn(bad)


@pytest.mark.parametrize(("count", "block"), [(0, 1), (1, 1), (3, 3)])
def test_one_block_cannot_be_left_out(count, block):
    with pytest.raises(ValueError, match=f"at least two blocks of columns, got {count // block}"):
        estimators.standard_error(torch.mean, torch.ones(count), block=block)


@pytest.mark.parametrize("tables", [(), (torch.eye(3), torch.ones(4)), (torch.ones(3, 4),), (torch.tensor(1.0),)])
def test_tables_that_are_not_of_the_same_columns(tables):
    shapes = re.escape(str([tuple(table.shape) for table in tables]))
    with pytest.raises(ValueError, match=rf"tables: expected \(m,\) or \(m, m\) of the same m columns, got .*{shapes}"):
        estimators.standard_error(torch.mean, *tables)


def test_a_statistic_is_a_scalar():
    with pytest.raises(ValueError, match=r"statistic: expected a scalar, got shape \(2,\)"):
        estimators.standard_error(torch.square, torch.ones(3))
    with pytest.raises(TypeError, match="statistic: expected a tensor, got float"):
        estimators.standard_error(lambda values: float(values.sum()), torch.ones(3))


def test_jackknife():
    values = torch.randn(6, dtype=torch.float64)
    expected = (5 / 6 * sum((v - values.mean()) ** 2 for v in values)) ** 0.5
    torch.testing.assert_close(estimators.jackknife(values), expected)


@pytest.mark.parametrize(
    "fn",
    [
        estimators.trace,
        estimators.frobenius2,
        estimators.trace2,
        estimators.cross_frobenius2,
        estimators.gaussian_frobenius2,
        estimators.gaussian_trace2,
        lambda G: estimators.gaussian_frobenius2(G, exact=1),
        lambda G: estimators.gaussian_trace2(G, exact=1),
    ],
)
def test_gradients(fn):
    Z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fn(z.T @ z), Z)


def test_blocks_of_columns_that_depend_on_each_other():
    """Against sums written out, over columns of different blocks."""
    Z = torch.randn(7, 12, dtype=torch.float64)
    G, block = Z.T @ Z, 4
    inside = [slice(start, start + block) for start in range(0, 12, block)]

    def norm(kept):
        pairs = [G[a, b].square().mean() for a in kept for b in kept if a is not b]
        return torch.stack(pairs).mean()

    def squared_trace(kept):
        pairs = [G[a, a].diagonal().mean() * G[b, b].diagonal().mean() for a in kept for b in kept if a is not b]
        return torch.stack(pairs).mean()

    def trace(kept):
        return torch.stack([G[a, a].diagonal().mean() for a in kept]).mean()

    for statistic, expected in (
        (lambda G: estimators.frobenius2(G, block), norm),
        (lambda G: estimators.trace2(G, block), squared_trace),
        (estimators.trace, trace),
    ):
        torch.testing.assert_close(statistic(G), expected(inside))
        rest = torch.stack([expected([a for a in inside if a is not left_out]) for left_out in inside])
        torch.testing.assert_close(estimators.standard_error(statistic, G, block=block), jackknife(rest))
    with pytest.raises(ValueError, match="expected a number that divides the 12 columns"):
        estimators.frobenius2(G, 5)
    with pytest.raises(ValueError, match="block: expected a positive integer"):
        estimators.trace2(G, 0)
    for few in (estimators.trace2, estimators.frobenius2):
        with pytest.raises(ValueError, match="at least"):
            few(G, 12)


def test_a_factored_sketch_is_unbiased():
    """Of a kernel whose features are matrices, over draws of the directions."""
    phi = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = phi.flatten(1)
    K = flat @ flat.T
    draws = {"norm": [], "trace2": [], "trace": [], "naive": []}
    for seed in range(1500):
        S = sketches.factored(3, 2, seed).block("w", torch.zeros(5, 4, dtype=torch.float64), 0, 12).flatten(1)
        G = (flat @ S.T).T @ (flat @ S.T)
        draws["norm"].append(estimators.frobenius2(G, 4))
        draws["naive"].append(estimators.frobenius2(G))
        draws["trace2"].append(estimators.trace2(G, 4))
        draws["trace"].append(estimators.trace(G))
    exact = {"norm": K.square().sum(), "naive": K.square().sum(), "trace2": K.trace() ** 2, "trace": K.trace()}
    z = {}
    for name, drawn in draws.items():
        values = torch.stack(drawn)
        z[name] = abs(float(values.mean() - exact[name]) / float(values.std() / 1500**0.5))
    assert z.pop("naive") > 6  # what the blocks are for
    assert max(z.values()) < 3.5, z
