"""Linear models in the eigenbasis against an implementation with P weights and matrices A_ν."""

import pytest
import torch
from linear_oracle import Explicit, gradient

from alignreg.linear import GradientDescent, SuperNat, one_step_bound, optimal_metric

GAUGES = ["max", "trace", "mean", 0.1]
LOSSES = ["squared", "logistic"]


def data(n=12, P=17, loss="squared", m=5):
    phi = torch.randn(n, P, dtype=torch.float64)
    y = torch.randn(n, dtype=torch.float64)
    return phi, y if loss == "squared" else (y > 0).double() * 2 - 1, torch.randn(m, P, dtype=torch.float64)


def close(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def run(model, steps):
    for _ in range(steps):
        model.step()
    return model


def test_the_optimal_metric_minimizes_the_bound():
    n, P = 8, 20
    phi, y, _ = data(n, P)
    U, S, Vh = torch.linalg.svd(phi, full_matrices=False)
    a = U.T @ gradient(torch.zeros(n, dtype=torch.float64), y, "squared")

    def slow(nu):  # ‖A_νᵀ∇_w L‖ ‖A_ν⁻¹Φᵀ‖_F with matrices
        A = torch.eye(P, dtype=torch.float64) + sum(
            (v.sqrt() - 1) * torch.outer(row, row) for v, row in zip(nu, Vh, strict=True)
        )
        step = phi.T @ gradient(torch.zeros(n, dtype=torch.float64), y, "squared")
        return (A.T @ step).norm() * (torch.linalg.inv(A) @ phi.T).norm()

    lam = S.square()
    nu = optimal_metric(a, kappa=0.7)
    close(nu, torch.tensor([0.7 / abs(float(value)) for value in a], dtype=torch.float64))
    least = one_step_bound(lam, a, nu)
    close(least, slow(nu))
    close(least, sum(float(lam[j]) * abs(float(a[j])) for j in range(n)) * torch.ones((), dtype=torch.float64))
    close(one_step_bound(lam, a, 5 * nu), least)
    for scale in (1e-3, 0.1, 1.0, 3.0):
        for _ in range(200):
            other = nu * (scale * torch.randn(n, dtype=torch.float64)).exp()
            bound = one_step_bound(lam, a, other)
            assert bound >= least * (1 - 1e-12)
        close(bound, slow(other))
    assert one_step_bound(lam, a, torch.ones_like(a)) > least * 1.01


def test_clamping():
    close(optimal_metric(torch.tensor([-2.0, 0.0, 0.5]), kappa=3.0, eps=0.5), torch.tensor([1.5, 3.0, 3.0]))
    close(optimal_metric(torch.zeros(3), kappa=3.0), torch.ones(3))
    assert optimal_metric(torch.tensor([1.0, 0.0])).isfinite().all()


# Matrices of modes whose λ differ by more than about 1e16 lose the small ones to rounding: over many steps, only with a
# large eps.
@pytest.mark.parametrize(("steps", "eps"), [(20, 0.4), (4, 1e-12)])
@pytest.mark.parametrize("shape", [(12, 17), (12, 7)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gauge", [None, *GAUGES])
def test_against_matrices(gauge, loss, shape, steps, eps):
    phi, y, new = data(*shape, loss=loss)
    lr = 0.01
    model = GradientDescent(phi, y, lr, loss) if gauge is None else SuperNat(phi, y, lr, loss, gauge, eps)
    explicit = Explicit(phi, y, lr, loss, gauge, eps)
    assert (model.outputs == 0).all()
    assert model.complexity == 0
    for _ in range(steps):
        model.step()
        explicit.step()
        f = explicit.phi @ explicit.w
        close(model.outputs, f)
        close(model.predict(new), explicit.predict(new))
        close(model.correlations.abs(), (explicit.U.T @ gradient(f, explicit.y, loss)).abs())
        close(model.complexity, torch.tensor(explicit.complexity, dtype=torch.float64))
        close(model.eigenvalues, explicit.eigenvalues())
        close(model.eigenvalues.sum(), explicit.phi.square().sum())
    assert model.outputs.norm() > 0.01


@pytest.mark.parametrize("gauge", GAUGES)
def test_the_reparametrization_leaves_the_outputs(gauge):
    """After the first step, taken in the parametrization at the start, both models have the same f, but not the λ."""
    phi, y, new = data()
    plain, super_nat = run(GradientDescent(phi, y, 0.1), 1), run(SuperNat(phi, y, 0.1, gauge=gauge), 1)
    close(super_nat.outputs, plain.outputs, 1e-13)
    close(super_nat.predict(new), plain.predict(new), 1e-13)
    close(super_nat.weights, plain.weights, 1e-13)
    close(super_nat.complexity, plain.complexity, 1e-13)
    assert (super_nat.eigenvalues / plain.eigenvalues).log().std() > 0.1
    close(super_nat.predict(phi), super_nat.outputs, 1e-13)
    super_nat.step()
    plain.step()
    assert (super_nat.outputs - plain.outputs).norm() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_descent_is_that_of_torch(loss):
    phi, y, new = data(loss=loss)
    w = torch.zeros(17, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.2)
    model = GradientDescent(phi, y, 0.2, loss)
    first = model.eigenvalues
    close(first, torch.linalg.eigvalsh(phi @ phi.T).flip(0))
    for _ in range(30):
        f = phi @ w
        value = (f - y).square().mean() / 2 if loss == "squared" else torch.log1p(torch.exp(-y * f)).mean()
        close(model.loss_value, value.detach())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        model.step()
        close(model.weights, w.detach())
        close(model.predict(new), new @ w.detach())
        assert torch.equal(model.eigenvalues, first)


def test_gauges_keep_what_they_say():
    phi, y, _ = data()
    for lr in (0.1, 0.02):
        models = {gauge: SuperNat(phi, y, lr, gauge=gauge) for gauge in GAUGES}
        for _ in range(10):
            before = {gauge: model.eigenvalues for gauge, model in models.items()}
            for model in models.values():
                model.step()
            after = {gauge: model.eigenvalues for gauge, model in models.items()}
            size = {gauge: model.correlations.abs() for gauge, model in models.items()}
            close(after["max"].max(), before["max"].max())
            close(after["trace"].sum(), before["trace"].sum())
            close(after["mean"], before["mean"] * size["mean"] / size["mean"].mean())
            close(after[0.1], before[0.1] * size[0.1] / 0.1)
            for gauge in GAUGES:  # the gauge is a common factor and no more
                ratio = after[gauge] / before[gauge] / size[gauge]
                close(ratio / ratio[0], torch.ones_like(ratio))


def test_clamped_modes_of_the_model():
    phi = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    y = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # the second mode never correlates
    model = run(SuperNat(phi, y, 0.1, eps=0.01), 1)
    largest = model.correlations.abs().max()
    expected = phi.diagonal().square() * torch.maximum(model.correlations.abs(), 0.01 * largest)
    close(model.eigenvalues, expected * 9 / expected.max())
    run(model, 2000)  # a λ that has long been too small for float64
    assert model.eigenvalues[1] == 0
    assert model.outputs.isfinite().all()
    close(model.outputs, y)


@pytest.mark.parametrize("gauge", GAUGES)
def test_without_correlations_nothing_is_stretched(gauge):
    phi, _, new = data()
    model = SuperNat(phi, torch.zeros(12), gauge=gauge)
    before = model.eigenvalues
    run(model, 3)
    assert torch.equal(model.eigenvalues, before)
    assert (model.predict(new) == 0).all()
    assert model.complexity == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", LOSSES)
def test_rank_deficient_features(loss, dtype):
    phi, y, new = data(12, 4, loss)
    mix = torch.randn(4, 17, dtype=torch.float64)
    phi, new = (phi @ mix).to(dtype), (new @ mix).to(dtype)
    model = run(SuperNat(phi, y.to(dtype), 0.02, loss), 20)
    assert model.eigenvalues.shape == model.correlations.shape == (4,)
    assert {model.outputs.dtype, model.predict(new).dtype, model.loss_value.dtype} == {torch.float64}
    explicit = Explicit(phi, y.to(dtype), 0.02, loss, "max", dropped=8)
    for _ in range(20):
        explicit.step()
    close(model.predict(new), explicit.predict(new), 1e-9 if dtype == torch.float64 else 1e-5)
    close(model.outputs, model.predict(phi), 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", [GradientDescent, SuperNat])
def test_labels_of_either_kind(kind):
    phi, y, _ = data(loss="logistic")
    expected = run(kind(phi, y, 0.3, "logistic"), 5)
    for labels in ((y + 1) / 2, (y > 0).long(), y > 0, y.int()):
        other = run(kind(phi, labels, 0.3, "logistic"), 5)
        assert torch.equal(other.outputs, expected.outputs)
        assert torch.equal(other.loss_value, expected.loss_value)


def test_default_learning_rate():
    phi, y, _ = data()
    largest = torch.linalg.eigvalsh(phi @ phi.T)[-1]
    assert GradientDescent(phi, y).lr == pytest.approx(float(12 / largest), rel=1e-12)
    assert SuperNat(phi, y > 0, loss="logistic").lr == pytest.approx(float(48 / largest), rel=1e-12)
    model = run(GradientDescent(phi, y), 1)  # its first step brings the largest mode to its target
    assert abs(float(model.correlations[0])) < 1e-12


def test_inputs_are_neither_changed_nor_needed():
    phi, y, new = data()
    phi.requires_grad_()
    kept = phi.detach().clone()
    model = SuperNat(phi, y, 0.1)
    model.step()
    assert torch.equal(phi, kept)
    assert not model.predict(new).requires_grad
    total = model.complexity
    total += 1
    assert model.complexity != total


def test_divergence_leaves_the_state():
    phi, y, _ = data()
    model = GradientDescent(phi, y, lr=1e4)
    with pytest.raises(RuntimeError, match=r"step: expected finite .* lr=10000. Lower lr"):
        run(model, 1000)
    outputs = model.outputs
    assert outputs.isfinite().all()
    with pytest.raises(RuntimeError, match="Lower lr"):
        model.step()
    assert torch.equal(model.outputs, outputs)


NAN = torch.tensor([1.0, float("nan")])
BAD = {
    "features of three axes": (lambda: SuperNat(torch.ones(2, 1, 3), torch.ones(2)), r"features: expected a matrix"),
    "no features": (lambda: SuperNat(torch.ones(2, 0), torch.ones(2)), r"features: expected a matrix \(n, P\)"),
    "NaN features": (lambda: SuperNat(NAN[:, None], torch.ones(2)), "features: expected finite"),
    "zero features": (lambda: SuperNat(torch.zeros(2, 3), torch.ones(2)), "features: expected some that are not 0"),
    "targets of another length": (lambda: SuperNat(torch.eye(2), torch.ones(3)), r"targets: expected \(2,\)"),
    "targets of two axes": (lambda: SuperNat(torch.eye(2), torch.ones(2, 1)), r"targets: expected \(2,\)"),
    "NaN targets": (lambda: GradientDescent(torch.eye(2), NAN), "targets: expected finite"),
    "no labels": (lambda: SuperNat(torch.eye(2), torch.tensor([1, 2]), None, "logistic"), "targets: expected 0 and 1"),
    "mixed labels": (lambda: SuperNat(torch.eye(2), torch.tensor([0, -1]), None, "logistic"), "-1 and 1"),
    "unknown loss": (
        lambda: SuperNat(torch.eye(2), torch.ones(2), loss="hinge"),
        "loss: expected 'squared'",
    ),
    "unknown gauge": (
        lambda: SuperNat(torch.eye(2), torch.ones(2), gauge="min"),
        "gauge: .* got 'min'",
    ),
    "negative gauge": (lambda: SuperNat(torch.eye(2), torch.ones(2), gauge=-1.0), "gauge: expected a positive number"),
    "true gauge": (lambda: SuperNat(torch.eye(2), torch.ones(2), gauge=True), "gauge: expected a positive number"),
    "zero lr": (lambda: GradientDescent(torch.eye(2), torch.ones(2), lr=0.0), "lr: expected a positive number"),
    "negative lr": (lambda: SuperNat(torch.eye(2), torch.ones(2), lr=-0.1), "lr: expected a positive number, got -0.1"),
    "zero eps": (lambda: SuperNat(torch.eye(2), torch.ones(2), eps=0.0), r"eps: expected a number in \(0, 1\]"),
    "large eps": (lambda: optimal_metric(torch.ones(2), eps=1.5), r"eps: expected a number in \(0, 1\]"),
    "zero kappa": (lambda: optimal_metric(torch.ones(2), kappa=0.0), "kappa: expected a positive number"),
    "a matrix": (lambda: optimal_metric(torch.ones(2, 2)), "correlations: expected a vector"),
    "NaN correlations": (lambda: optimal_metric(NAN), "correlations: expected finite"),
    "lengths": (
        lambda: one_step_bound(torch.ones(2), torch.ones(2), torch.ones(3)),
        "nu: expected one for each of 2 eigenvalues, got 3",
    ),
    "zero nu": (lambda: one_step_bound(torch.ones(2), torch.ones(2), torch.zeros(2)), "nu: expected positive"),
    "negative": (lambda: one_step_bound(-torch.ones(2), torch.ones(2), torch.ones(2)), "eigenvalues: expected none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_new_points():
    phi, y, new = data()
    model = run(SuperNat(phi, y, 0.1), 1)
    for bad in (new[:, 1:], new[0], new[:0]):
        with pytest.raises(ValueError, match=r"features: expected a matrix \(m, 17\)"):
            model.predict(bad)
    with pytest.raises(ValueError, match="features: expected finite"):
        model.predict(new / 0)
