"""Sums that add, numerators that are exact, error bars that cover."""

import oracles
import pytest
import torch
from cases import build

from alignreg import TangentFeatures, moments, sketches
from alignreg.metrics import TangentAlignment, TangentParticipationRatio, TangentTrace

METRICS = {"alignment": TangentAlignment, "trace": TangentTrace, "participation_ratio": TangentParticipationRatio}


def problem():
    model, _, _ = build("mlp")
    x = torch.randn(40, 4, dtype=torch.float64)
    features = TangentFeatures(model.double())
    y = oracles.one_hot(torch.arange(40) % 7 % 3, 3)
    return features, x, y, oracles.jacobian(model, x)


def batch_moments(features, x, y, directions, guess=None):
    guess = y.mean(0) if guess is None else guess
    back = features.pullback(x, (y - guess)[None])
    flat = torch.cat([value.flatten() for value in back.values()])
    return moments.of(features.pushforward(x, directions), y, pullback=flat, guess=guess)


def standard_error(statistic, *, centered=True):
    """A function of moments: the jackknife error of the metric that makes the statistic of them."""
    return METRICS[statistic](torch.nn.Linear(4, 3), 3, centered=centered)._error


def test_moments_are_the_sums_they_say():
    z, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    a, guess = torch.randn(4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    got = moments.of(z, y, pullback=a, guess=guess)
    rows = [(i, k) for i in range(5) for k in range(2)]
    expected = moments.Moments(
        n=torch.tensor(5.0, dtype=torch.float64),
        features=sum(z[i] for i in range(5)),
        gram=sum(torch.outer(z[i, k], z[i, k]) for i, k in rows),
        features_targets=sum(z[i, k] * y[i, k] for i, k in rows),
        targets=sum(y[i] for i in range(5)),
        targets2=sum(y[i, k] ** 2 for i, k in rows),
        pullback=a,
        guess=sum(guess[k] * z[i, k] for i, k in rows),
    )
    for field, mine, theirs in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=field)


def test_additive():
    """moments(a ++ b) == moments(a) + moments(b), in any order."""
    features, x, y, _ = problem()
    S = sketches.gaussian(6, seed=0)
    guess = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    whole = batch_moments(features, x, y, S, guess)
    cuts = [slice(0, 1), slice(1, 15), slice(15, 40)]
    parts = [batch_moments(features, x[c], y[c], S, guess) for c in cuts]
    total = moments.zeros(3, 6, features.num_parameters)
    for part in reversed(parts):
        total = total.merge(part)
    for field, mine, theirs in zip(total._fields, total, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=field)
    z = features.pushforward(x, S)
    added = moments.of(z[:15], y[:15]).add(z[15:], y[15:])
    torch.testing.assert_close(added.gram, moments.of(z, y).gram, rtol=1e-10, atol=1e-10)


def test_centered_gram():
    z, y = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    centered = (z - z.mean(0)).flatten(0, 1)
    torch.testing.assert_close(moments.of(z, y).centered(), centered.T @ centered, rtol=1e-10, atol=1e-12)


def test_numerator_of_one_batch_is_exact():
    features, x, y, jac = problem()
    target = (y - y.mean(0)).flatten()
    expected = (oracles.matrix(jac).T @ target).square().sum()
    for m in (1, 5):
        got = moments.numerator(batch_moments(features, x, y, sketches.gaussian(m, seed=0)))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sizes", [[10] * 4, [1] * 40, [1, 39], [13, 27]])
def test_streamed_numerator_is_unbiased(sizes):
    """Batch means as guesses; batches of one row come from the sketch alone. One pushforward, cut into draws."""
    features, x, y, jac = problem()
    draws, m = 500, 4
    target = (y - y.mean(0)).flatten()
    truth = (oracles.matrix(jac).T @ target).square().sum()
    z = features.pushforward(x, sketches.gaussian(draws * m, seed=5)).unflatten(2, (draws, m))
    batches, start = [], 0
    for size in sizes:
        c = slice(start, start + size)
        guess = y[c].mean(0)
        back = features.pullback(x[c], (y[c] - guess)[None])
        batches.append((c, guess, torch.cat([value.flatten() for value in back.values()])))
        start += size
    values = []
    for d in range(draws):
        total = moments.zeros(3, m, features.num_parameters)
        for c, guess, flat in batches:
            total = total.merge(moments.of(z[c, :, d], y[c], pullback=flat, guess=guess))
        values.append(moments.numerators(total).mean())  # before the clamp at zero, which unbiasedness excludes
    values = torch.stack(values)
    score = (values.mean() - truth) / (values.std() / draws**0.5)
    assert abs(score) < 3.5


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("m", [16, 32])
def test_error_bars_cover(m, centered):
    """±2 s.e. holds the exact value in 91–98 % of 500 draws.

    The jackknife's variance is never too small in the mean (Efron & Stein 1981), and for the quotient of two quadratic
    forms, here with a participation ratio of 4, it is a little too large.
    """
    features, x, y, jac = problem()
    draws = 500
    lam = torch.from_numpy(oracles.eigenvalues(oracles.kernel(oracles.centered_features(jac) if centered else jac)))
    truth = {
        "alignment": oracles.alignment(jac, y, centered),
        "trace": lam.sum(),
        "participation_ratio": lam.sum() ** 2 / (lam**2).sum(),
    }
    z = features.pushforward(x, sketches.gaussian(draws * m, seed=6)).unflatten(2, (draws, m))
    back = features.pullback(x, (y - y.mean(0))[None])
    flat = torch.cat([value.flatten() for value in back.values()])
    hits = dict.fromkeys(truth, 0)
    errors = {name: standard_error(name, centered=centered) for name in truth}
    for d in range(draws):
        batch = moments.of(z[:, :, d], y, pullback=flat, guess=y.mean(0))
        for name, exact in truth.items():
            value = getattr(moments, name)(batch, centered=centered)
            hits[name] += int(abs(value - exact) <= 2 * errors[name](batch))
    print(f"m={m}, centered={centered}: { ({name: count / draws for name, count in hits.items()}) }")
    most = {"alignment": 0.98, "trace": 0.98, "participation_ratio": 0.99}
    assert all(0.91 <= count / draws <= most[name] for name, count in hits.items()), hits


@pytest.mark.parametrize(("cut", "size"), [(15, 1), (39, 0)])
@pytest.mark.parametrize("statistic", ["alignment", "trace", "participation_ratio"])
def test_std_error_is_the_jackknife(statistic, cut, size):
    """Against recomputing the statistic from the columns that are left; of size 0, a numerator is negative."""
    features, x, y, _ = problem()
    m = 6
    z = features.pushforward(x, sketches.gaussian(m, seed=0))
    back = features.pullback(x[:cut], (y[:cut] - y[:cut].mean(0))[None])
    flat = size * torch.cat([value.flatten() for value in back.values()])

    def of(columns):
        first = moments.of(z[:cut, :, columns], y[:cut], pullback=flat, guess=y[:cut].mean(0))
        rest = moments.of(z[cut:, :, columns], y[cut:], pullback=flat * 0, guess=y[cut:].mean(0))
        return first.merge(rest)

    fn = getattr(moments, statistic)
    left = torch.stack([fn(of([b for b in range(m) if b != a])) for a in range(m)])
    expected = (((left - left.mean()) ** 2).sum() * (m - 1) / m) ** 0.5
    torch.testing.assert_close(standard_error(statistic)(of(list(range(m)))), expected, rtol=1e-9, atol=0)


def test_participation_ratio_converges():
    features, x, y, jac = problem()
    m = 4000
    z = features.pushforward(x, sketches.gaussian(m, seed=0))
    batch = moments.of(z, y)
    for centered in (True, False):
        lam = torch.from_numpy(oracles.eigenvalues(oracles.kernel(oracles.centered_features(jac) if centered else jac)))
        expected = lam.sum() ** 2 / (lam**2).sum()
        got = moments.participation_ratio(batch, centered=centered)
        assert abs(got / expected - 1) < 0.1
        few = moments.of(z[:, :, :400], y)  # the error falls as 1/√m
        assert abs(got - expected) < 3.5 * standard_error("participation_ratio", centered=centered)(few) / 10**0.5


def test_bounds_hold_however_bad_the_sketch():
    """With three directions the norm is far off; values stay in their range."""
    features, x, y, _ = problem()
    for seed in range(50):
        batch = batch_moments(features, x[:6], y[:6], sketches.gaussian(3, seed=seed))
        assert 0 <= moments.alignment(batch) <= 1
        assert 1 <= moments.participation_ratio(batch) <= 18
    line = torch.randn(6, 1, dtype=torch.float64)  # f = w·x: the kernel is xxᵀ, and y = x is aligned with it
    for seed in range(50):
        z = line[:, None] * sketches.gaussian(3, seed=seed).block("w", torch.zeros((), dtype=torch.float64), 0, 3)
        assert 0 <= moments.alignment(moments.of(z, line)) <= 1 + 1e-12
        assert 1 <= moments.participation_ratio(moments.of(z, line)) <= 6
    zero = moments.of(torch.zeros(4, 2, 3), torch.randn(4, 2))
    assert moments.participation_ratio(zero) == 0
    assert moments.alignment(zero).isnan()


def test_constant_targets_and_no_examples():
    z = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="constant"):
        moments.alignment(moments.of(z, torch.full((5, 2), 0.3)))
    for n in range(2, 40):  # rounding leaves some of them a variance
        with pytest.raises(ValueError, match="constant"):
            moments.alignment(moments.of(torch.randn(n, 2, 3), torch.full((n, 2), 0.1, dtype=torch.float64)))
    with pytest.raises(ValueError, match="no examples"):
        moments.alignment(moments.zeros(2, 3, 0))
    assert moments.trace(moments.zeros(2, 3, 0)) == 0
    with pytest.raises(ValueError, match="cannot add"):
        moments.zeros(2, 3, 0).merge(moments.zeros(2, 4, 0))
    with pytest.raises(ValueError, match=r"expected \(n, c, m\)"):
        moments.of(z, torch.zeros(4, 2))
