"""Metrics of factored sketches: against their directions written out, within their errors, and when they are chosen."""

import oracles
import pytest
import torch
from metric_rows import feed, problem

from alignreg import population, sketches
from alignreg.metrics import TangentAlignment, TangentParticipationRatio, TangentTrace


def of_copies(statistic):
    """Mean of a statistic of two directions ``(4·16, 4·16)`` over pairs of different copies, and without each copy."""
    each = statistic.reshape(4, 16, 4, 16).mean((1, 3))

    def mean(kept):
        return torch.stack([each[a, b] for a in kept for b in kept if a != b]).mean()

    return mean(range(4)), torch.stack([mean([a for a in range(4) if a != left]) for left in range(4)])


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", [TangentAlignment, TangentTrace, TangentParticipationRatio])
def test_factored_sketches_against_their_directions(kind, centered):
    """All from the Jacobian and dense directions, copies taken apart."""
    model, x, y, _ = problem(20)
    metric = kind(model, 3, sketch="factored", sketch_dim=8, seed=3, centered=centered, return_std_error=True)
    metric.update(x, y)
    found = metric.compute()
    jac = oracles.jacobian(model, x)
    S = sketches.factored(4, 4, seed=3)
    parts = [value.flatten(2) @ S.block(name, value[0, 0], 0, 64).flatten(1).T for name, value in jac.items()]
    z = torch.stack(parts).sum(0)
    z = (z - z.mean(0) if centered else z).flatten(0, 1)
    G = z.T @ z
    norm2, norms2 = of_copies(G.square())
    trace2, traces2 = of_copies(torch.outer(G.diagonal(), G.diagonal()))
    if kind is TangentAlignment:
        projection = (
            oracles.alignment(jac, oracles.one_hot(y, 3), centered)
            * oracles.kernel(oracles.centered_features(jac) if centered else jac).square().sum().sqrt()
        )
        value, without = projection / norm2.sqrt(), projection / norms2.sqrt()
    elif kind is TangentTrace:
        each = G.diagonal().reshape(4, 16).mean(1)
        value, without = each.mean(), (each.sum() - each) / 3
    else:
        value, without = trace2 / norm2, traces2 / norms2
    error = ((without - without.mean()).square().sum() * 3 / 4).sqrt()
    assert float(found.value) == pytest.approx(float(value), rel=1e-9)
    assert float(found.standard_error) == pytest.approx(float(error), rel=1e-9)


def test_copies_count_for_unbiased_alignment_too():
    model, x, y, _ = problem(20)
    metric = TangentAlignment(model, 3, sketch="factored", sketch_dim=8, unbiased=True, return_std_error=True)
    metric.update(x, y)
    ((sums, pairs),) = metric._moments()
    value, error = metric.compute()
    assert value == population.alignment(sums, pairs, block=16) != population.alignment(sums, pairs)
    seen = population.columns(sums, pairs)
    without = []
    for left in range(0, 64, 16):
        rest = [a for a in range(64) if not left <= a < left + 16]
        some = seen._replace(products=seen.products[rest], squares=seen.squares[rest][:, rest])
        without.append(some.alignment(block=16))
    without = torch.stack(without)
    expected = ((without - without.mean()).square().sum() * 3 / 4).sqrt()
    torch.testing.assert_close(error, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("unbiased", [False, True])
def test_factored_sketches_are_within_their_errors(unbiased):
    """Of 24 draws, in units of the standard errors that they report: about as far as a normal variable goes."""
    model, x, y, group = problem()
    options = {"groups": ("a", "b"), "unbiased": unbiased}
    exact = feed(TangentAlignment(model, 3, method="exact", **options), x, y, group).compute()
    scores = []
    for seed in range(24):
        metric = TangentAlignment(
            model, 3, sketch="factored", sketch_dim=8 if unbiased else 32, seed=seed, return_std_error=True, **options
        )
        found = feed(metric, x, y, group).compute()
        scores.append([float((value - exact[name]) / error) for name, (value, error) in found.items()])
    z = torch.tensor(scores)
    assert z.mean(0).abs().max() < 3.5 / 24**0.5 * 1.5  # the ratio has a small bias of its own
    assert 0.6 < z.std() < 1.7


def test_which_sketch_is_chosen():
    model, x, y, _ = problem()
    for c, dim, expected in ((1, 64, "factored"), (2, 64, "rademacher"), (2, 128, "factored"), (3, 184, "rademacher")):
        assert TangentTrace(model, c, sketch="auto", sketch_dim=dim).sketch == expected
    assert TangentTrace(model, 1).sketch == "rademacher"
    chosen = feed(TangentTrace(model, 3, sketch="auto", sketch_dim=192), x, y).compute()
    assert chosen == feed(TangentTrace(model, 3, sketch="factored", sketch_dim=192), x, y).compute()
    assert [TangentTrace(model, 1, sketch="factored", sketch_dim=m)._directions.copies for m in (3, 5, 6, 7)] == [
        3,
        3,
        3,
        4,
    ]
    with pytest.raises(
        ValueError, match="sketch: expected 'rademacher', 'gaussian', 'factored' or 'auto', got 'dense'"
    ):
        TangentTrace(model, 1, sketch="dense")
