"""Losses against their formulas from dense tangent features, and against finite differences."""

import math

import oracles
import pytest
import torch
from loss_cases import LOSSES, NETS, OPTIONS, formula, make, problem, slopes_of
from torch import nn

from alignreg import TangentFeatures, estimators, functional, sketches
from alignreg.losses import AlignmentLoss, ComplexityPenalty, ParticipationRatioLoss
from alignreg.losses.probes import Probed


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient(kind, net, options):
    model, x, y = problem(net)
    reg = make(kind, model, weight=0.7, probes=8, **OPTIONS[options])
    torch.testing.assert_close(
        reg(x, y).detach(), formula(kind, model, x, y, 0.7, **OPTIONS[options]), rtol=1e-9, atol=0
    )

    reg.step.zero_()  # the same probes and examples
    slopes, expected = slopes_of(reg(x, y), model, lambda: formula(kind, model, x, y, 0.7, **OPTIONS[options]))
    assert slopes == pytest.approx(expected, rel=1e-5, abs=1e-7)


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
    plain = AlignmentLoss(model, weight=1.0, probes=4, seed=1, examples=examples, every_n_steps=1)
    strided = AlignmentLoss(model, weight=1.0, probes=4, seed=2, examples=examples, every_n_steps=4)
    with torch.no_grad():
        a = torch.stack([plain(x, y) for _ in range(DRAWS)])
        b = torch.stack([strided(x, y) for _ in range(4 * DRAWS)]).reshape(DRAWS, 4).mean(1)
    z = float((a.mean() - b.mean()) / ((a.var() + b.var()) / DRAWS).sqrt())
    print(f"examples={examples}: plain {float(a.mean()):.4f}, strided {float(b.mean()):.4f}, z = {z:+.2f}")
    assert abs(z) < 3.5


@pytest.mark.parametrize("centered", [True, False])
def test_more_probes_approach_the_exact_numbers(centered):
    model, x, y = problem()
    K = TangentFeatures(model).kernel(x)
    value = make("alignment", model, weight=1.0, probes=3000, centered=centered)(x, y).detach()
    assert float(value) == pytest.approx(-float(functional.alignment(K, y, centered).log()), abs=0.05)
    value = make("participation ratio", model, weight=1.0, probes=3000, centered=centered)(x).detach()
    K = functional.center(K) if centered else K
    assert float(value) == pytest.approx(float(functional.participation_ratio(K).log()), abs=0.05)


@pytest.mark.parametrize("centered", [True, False])
def test_norm_is_never_below_what_the_trace_leaves_possible(centered):
    """K = I has the least norm for its trace, and half of the estimates of it lie below."""
    model, x, y = nn.Linear(7, 3, bias=False).double(), torch.eye(7, dtype=torch.float64), problem()[2]
    rows = (7 - 1) * 3 if centered else 7 * 3
    raised = 0
    for seed in range(40):
        reg = make("alignment", model, weight=1.0, probes=4, seed=seed, centered=centered)
        value = float(reg(x, y).detach())
        assert value == pytest.approx(
            float(formula("alignment", model, x, y, 1.0, probes=4, seed=seed, centered=centered)), rel=1e-9
        )
        omega = sketches.probes(4, 7, 3, seed=seed, like=x)
        omega = (omega - omega.mean(1, keepdim=True) if centered else omega).reshape(4, -1)
        target = (oracles.one_hot(y, 3) - oracles.one_hot(y, 3).mean(0)).reshape(-1)
        along = (omega @ target) ** 2 / target.square().sum()
        trace = 1 + float((omega**2).sum() - along.sum()) / 4  # ‖Φᵀω‖ = ‖ω‖
        least = 0.5 * math.log(trace**2 / rows)  # yᵀKy/‖y‖² = 1
        assert value >= least - 1e-9
        raised += value <= least + 1e-9
    assert 5 <= raised <= 35


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


@pytest.mark.parametrize("gram", [torch.diag(torch.tensor([100.0, 0.01, 0.01, 0.01])), torch.ones(4, 4), torch.eye(4)])
def test_participation_ratio_stays_in_its_range(gram):
    """It does so for any products of probes, such as those of one probe far larger than the others."""
    reg = ParticipationRatioLoss(nn.Linear(2, 1), probes=4)
    value = reg._of_kernel(Probed(gram, 0, n=6, c=1, drawn_from=6))
    assert -1e-6 <= float(value) <= math.log(5) + 1e-6
