"""functional and TangentFeatures.kernel against numbers of the paper's own code, and against formulas."""

import numpy as np
import oracles
import pytest
import torch
from paper_cases import EXPECTED, oracle_case

from alignreg import TangentFeatures, formulas, functional


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_of_the_paper_code(name):
    model, x, y = oracle_case(name)
    features = TangentFeatures(model)
    K, layers = features.kernel(x), features.kernel(x, per_layer=True)
    values = EXPECTED[name]["values"]
    errors = {"trK": features.trace(x) / len(x) / values["trK"] - 1}
    for centered, key in ((True, "centering_true"), (False, "centering_false")):
        want = values[key]
        Kc = functional.center(K) if centered else K
        spectrum = functional.spectrum(Kc)
        got = {
            "alignment": functional.alignment(K, y, centered),
            "trace": torch.einsum("ikik->", Kc),
            "frobenius": Kc.square().sum().sqrt(),
            "effective_rank": functional.effective_rank(Kc),
        }
        for label, value in got.items():
            errors[key, label] = value / want[label] - 1
        for k, ratio in want["trace_ratio"].items():
            errors[key, "trace_ratio", k] = functional.trace_ratio(Kc, int(k)) / ratio - 1
        for j, eigenvalue in enumerate(want["top20_eigenvalues"]):
            errors[key, "eigenvalue", j] = spectrum[j] / eigenvalue - 1
        for layer, alignment in zip(EXPECTED[name]["layer_names"], want["layer_alignment"], strict=True):
            errors[key, "layer", layer] = functional.alignment(layers[layer], y, centered) / alignment - 1
    worst = max(errors, key=lambda key: abs(errors[key]))
    print(f"{name}: largest relative error of {len(errors)} numbers: {abs(float(errors[worst])):.1e} ({worst})")
    assert abs(errors[worst]) <= 1e-9, worst


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_of_the_paper_code_in_single_precision(name):
    model, x, y = oracle_case(name, torch.float32)
    K = TangentFeatures(model).kernel(x)
    for centered, key in ((True, "centering_true"), (False, "centering_false")):
        got = float(functional.alignment(K, y, centered))
        want = EXPECTED[name]["values"][key]["alignment"]
        print(f"{name} {key}: {abs(got / want - 1):.1e}")
        assert got == pytest.approx(want, rel=5e-4)


def random_kernel(n=7, c=3, rank=9):
    phi = torch.randn(n * c, rank, dtype=torch.float64)
    return (phi @ phi.T).reshape(n, c, n, c), phi


def test_center_is_the_kernel_of_centered_features():
    K, phi = random_kernel()
    centered = phi.reshape(7, 3, -1) - phi.reshape(7, 3, -1).mean(0)
    expected = torch.einsum("ikp,jlp->ikjl", centered, centered)
    torch.testing.assert_close(functional.center(K), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("centered", [True, False])
def test_alignment_laws(centered):
    K, phi = random_kernel()
    y = torch.randn(7, 3, dtype=torch.float64)
    value = functional.alignment(K, y, centered)
    expected = oracles.alignment({"w": phi.reshape(7, 3, -1)}, y, centered)
    assert float(value) == pytest.approx(expected, rel=1e-9)
    assert 0 <= value <= 1
    order = torch.randperm(7)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    mixed = torch.einsum("ikjl,kp,lq->ipjq", K, Q, Q)
    for other in (
        functional.alignment(3.7 * K, y, centered),
        functional.alignment(K, -0.2 * y, centered),
        functional.alignment(K, y + torch.randn(3, dtype=torch.float64), centered),
        functional.alignment(K[order][:, :, order], y[order], centered),
        functional.alignment(mixed, y @ Q, centered),
    ):
        torch.testing.assert_close(other, value, rtol=1e-9, atol=0)


def test_alignment_of_labels_is_that_of_one_hot_values():
    K, _ = random_kernel()
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 0])
    torch.testing.assert_close(functional.alignment(K, labels), functional.alignment(K, oracles.one_hot(labels, 3)))


@pytest.mark.parametrize("centered", [True, False])
def test_eigenvector_alignment(centered):
    K, phi = random_kernel(rank=40)
    y = torch.randn(7, 3, dtype=torch.float64)
    shares = functional.eigenvector_alignment(K, y, centered=centered)
    assert shares.shape == (21,)
    assert float(shares.sum()) == pytest.approx(1, rel=1e-12)
    features = oracles.centered_features({"w": phi.reshape(7, 3, -1)})["w"].reshape(21, -1) if centered else phi
    target = (y - y.mean(0)).flatten()
    vectors = torch.linalg.svd(features)[0].T
    expected = [float((u @ target) ** 2 / (target @ target)) for u in vectors]
    nonzero = 18 if centered else 21  # of equal eigenvalues only the sum is defined
    assert shares[:nonzero].tolist() == pytest.approx(expected[:nonzero], rel=1e-7, abs=1e-9)
    assert float(shares[nonzero:].sum()) == pytest.approx(sum(expected[nonzero:]), abs=1e-9)
    torch.testing.assert_close(functional.eigenvector_alignment(K, y, k=4, centered=centered), shares[:4])
    eigenvalues = functional.spectrum(functional.center(K) if centered else K)
    norm = torch.linalg.vector_norm(eigenvalues)
    torch.testing.assert_close((eigenvalues * shares).sum() / norm, functional.alignment(K, y, centered))
    with pytest.raises(ValueError, match="constant"):
        functional.eigenvector_alignment(K, torch.ones(7, 3))
    with pytest.raises(ValueError, match="k: expected a positive integer"):
        functional.eigenvector_alignment(K, y, k=0)
    labels = functional.eigenvector_alignment(K.half(), torch.arange(7) % 3, k=2, centered=centered)
    assert labels.dtype == torch.float32


def test_summary_is_what_the_functions_say():
    K, _ = random_kernel()
    found = functional.summary(functional.spectrum(K), k=[1, 4])
    for name, expected in {
        "effective_rank": functional.effective_rank(K),
        "participation_ratio": functional.participation_ratio(K),
        "trace_ratio_1": functional.trace_ratio(K, 1),
        "trace_ratio_4": functional.trace_ratio(K, 4),
        "mean_eigenvalue": torch.einsum("ikik->", K) / 21,
    }.items():
        torch.testing.assert_close(found[name], expected)
    with pytest.raises(ValueError, match="eigenvalues: expected"):
        functional.summary(K)
    with pytest.raises(ValueError, match="k: expected a positive integer"):
        functional.summary(functional.spectrum(K), k=[0])


@pytest.mark.parametrize("options", [{}, {"centered": False}, {"unbiased": True}])
def test_alignment_in_blocks(monkeypatch, options):
    """A kernel of many blocks has the alignment and the gradient that it has as one, and stays as it was."""
    K, _ = random_kernel()
    y = torch.randn(7, 3, dtype=torch.float64)
    found = []
    for size in (formulas._BLOCK, 2 * 3 * 7 * 3, 1):
        monkeypatch.setattr(formulas, "_BLOCK", size)
        own = K.clone().requires_grad_()
        value = functional.alignment(own, y, **options)
        found.append((value.detach(), *torch.autograd.grad(value, own)))
        assert torch.equal(own, K)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_alignment_of_single_precision_keeps_the_digits_of_the_kernel(unbiased):
    """Centering leaves a thousandth of this kernel, so sums in single precision would lose three digits."""
    phi = torch.randn(30, 3, 40) + 30
    phi = phi.flatten(0, 1)
    K = (phi.double() @ phi.double().T).reshape(30, 3, 30, 3).float()
    y = torch.arange(30) % 3
    value = functional.alignment(K, y, unbiased=unbiased)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), functional.alignment(K.double(), y, unbiased=unbiased), rtol=2e-7, atol=0
    )


def test_centering_leaves_the_kernel_as_it_was():
    K, _ = random_kernel()
    before = K.clone()
    functional.center(K)
    assert torch.equal(K, before)


def test_alignment_extremes():
    y = torch.randn(6, 2, dtype=torch.float64)
    y -= y.mean(0)
    own = torch.einsum("ik,jl->ikjl", y, y)
    assert float(functional.alignment(own, y)) == pytest.approx(1, rel=1e-12)
    assert functional.alignment(torch.zeros(6, 2, 6, 2), y).isnan()
    with pytest.raises(ValueError, match="constant"):
        functional.alignment(own, torch.full((6, 2), 0.1))


def test_spectrum_and_ranks():
    K, _ = random_kernel()
    lam = oracles.eigenvalues(K)
    got = functional.spectrum(K)
    np.testing.assert_allclose(got, lam, rtol=1e-9, atol=1e-11)
    assert (got >= 0).all()
    assert (got.diff() <= 0).all()
    assert float(functional.effective_rank(K)) == pytest.approx(oracles.effective_rank(K), rel=1e-9)
    assert float(functional.participation_ratio(K)) == pytest.approx(lam.sum() ** 2 / (lam**2).sum(), rel=1e-9)
    for k in (1, 4, 21, 30):
        assert float(functional.trace_ratio(K, k)) == pytest.approx(lam[:k].sum() / lam.sum(), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 4])
def test_ranks_of_a_projection(rank):
    """0·log 0 = 0: the other eigenvalues are exactly or nearly zero."""
    K = torch.diag(torch.cat([torch.ones(rank), torch.zeros(6 - rank)])).reshape(3, 2, 3, 2)
    assert float(functional.effective_rank(K)) == pytest.approx(rank)
    assert float(functional.participation_ratio(K)) == pytest.approx(rank)


def test_zero_kernel():
    K = torch.zeros(3, 2, 3, 2)
    assert functional.effective_rank(K) == 0
    assert functional.participation_ratio(K) == 0
    assert functional.trace_ratio(K, 1).isnan()


def test_kare():
    K, _ = random_kernel()
    y = torch.randn(7, 3, dtype=torch.float64)
    for ridge in (0.01, 1.0):
        assert float(functional.kare(K, y, ridge)) == pytest.approx(oracles.kare(K, y, ridge), rel=1e-9)


@pytest.mark.parametrize(
    "fn",
    [
        lambda K, y: functional.center(K).square().sum(),
        functional.alignment,
        lambda K, y: functional.alignment(K, y, False),
        lambda K, y: functional.alignment(K, y, unbiased=True),
        lambda K, y: functional.effective_rank(K),
        lambda K, y: functional.participation_ratio(K),
        lambda K, y: functional.trace_ratio(K, 2),
        lambda K, y: functional.kare(K, y, 0.3),
        lambda K, y: functional.spectrum(K)[:2].sum(),
    ],
)
def test_gradients(fn):
    y = torch.randn(4, 2, dtype=torch.float64)
    phi = torch.randn(8, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: fn((p @ p.T).reshape(4, 2, 4, 2), y), phi)


def test_gradient_of_effective_rank_at_zero_eigenvalues():
    phi = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    functional.effective_rank(functional.center((phi @ phi.T).reshape(4, 2, 4, 2))).backward()
    assert phi.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_spectrum(dtype):
    assert functional.spectrum(torch.eye(4, dtype=dtype).reshape(2, 2, 2, 2)).dtype == torch.float32
