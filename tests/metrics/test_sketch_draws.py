"""The number of each metric that streams a sketch, over many draws, and from columns that depend on each other."""

import oracles
import pytest
import torch
from metric_rows import KINDS, NUMBERS, feed, problem

from alignreg import TangentFeatures, moments, sketches

UNBIASED = {of.kind: of.unbiased for of in KINDS}
DRAWS, M = 500, 16


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", NUMBERS)
def test_values_are_right_on_average(kind, centered):
    """An unbiased value is right within 3.5 standard errors of the mean, and a quotient of estimates within 10 %."""
    model, x, y, _ = problem(40)
    features, y = TangentFeatures(model), oracles.one_hot(y, 3)
    exact = float(NUMBERS[kind](oracles.jacobian(model, x), y, centered))
    z = features.pushforward(x, sketches.gaussian(DRAWS * M, seed=6)).unflatten(2, (DRAWS, M))
    back = features.pullback(x, (y - y.mean(0))[None])
    flat = torch.cat([value.flatten() for value in back.values()])
    metric = kind(model, 3, sketch_dim=M, centered=centered)
    sums = [moments.of(z[:, :, d], y, pullback=flat, guess=y.mean(0)) for d in range(DRAWS)]
    values = torch.stack([metric._of_sketch(metric._sketched(draw)) for draw in sums])
    score = float((values.mean() - exact) / (values.std() / DRAWS**0.5))
    print(f"{kind.__name__}, centered={centered}: score {score:.2f}, relative {float(values.mean()) / exact - 1:.3f}")
    assert abs(score) < 3.5 or (not UNBIASED[kind] and float(values.mean()) == pytest.approx(exact, rel=0.1))


@pytest.mark.parametrize("kind", NUMBERS)
def test_equal_columns_of_one_block_count_once(kind):
    """A formula that ignores ``block`` counts pairs of one block, which depend on each other."""
    model, x, y, _ = problem()
    metric = feed(kind(model, 3, sketch_dim=8), x, y)
    ((sums,),) = metric._moments()
    once = metric._sketched(sums)
    gram = once.gram.repeat_interleave(3, 0).repeat_interleave(3, 1)
    thrice = once._replace(gram=gram, numerators=once.numerators.repeat_interleave(3), block=3)
    for number in (metric._of_sketch, lambda seen: seen.standard_error(metric._of_sketch)):
        torch.testing.assert_close(number(thrice), number(once), rtol=1e-10, atol=0)
