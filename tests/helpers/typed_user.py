"""What a typed program sees of the package, checked by mypy --strict and never run (see test_typing.py)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from typing_extensions import assert_type

from alignreg import TangentFeatures, complexity, estimators, functional, losses, metrics, plotting, sketches
from alignreg.metrics import Estimate, PathHistory


def watch(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Metrics, as in the README."""
    metric = metrics.TangentAlignment(model, num_outputs=3, groups=("easy", "difficult"), return_std_error=True)
    metric.update(x, y, group=y % 2)
    assert_type(metric.compute(), Tensor | Estimate | dict[str, Tensor] | dict[str, Estimate])
    assert_type(metric.standard_error(), Tensor | dict[str, Tensor])
    collection = MetricCollection([metrics.TangentTrace(model, 3), metrics.TangentParticipationRatio(model, 3)])
    collection.update(inputs=x, target=y)

    spectrum = metrics.TangentSpectrum(model, num_outputs=3, k=(10, 40), max_examples=50)
    spectrum.update(x, y)
    assert_type(spectrum.compute(), dict[str, Tensor])
    layers = metrics.LayerwiseAlignment(model, num_outputs=3, method="sketch", probes=8)
    layers.update(x, y)
    assert_type(layers.compute(), dict[str, Tensor] | dict[str, Estimate])
    assert_type(layers.standard_error(), dict[str, Tensor])

    path = metrics.PathComplexity(model)
    path.update(x)
    path.step()
    assert_type(path.history(), PathHistory)
    plotting.path(path.history())
    plotting.heat_map([layers.compute(), layers.compute()], steps=[0, 1])
    plotting.estimates({"a": 1.0, "b": Estimate(x.sum(), x.std())})
    return float(assert_type(path.compute(), Tensor))


def features(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Tangent features and what is computed of them."""
    tangent = TangentFeatures(model, params="encoder.*", forward_fn=lambda model, x: model(x).logits)
    kernel = assert_type(tangent.kernel(x), Tensor)
    assert_type(tangent.kernel(x, per_layer=True), dict[str, Tensor])
    assert_type(tangent.kernel(x, x[:5], create_graph=True), Tensor)
    assert_type(tangent.jacobian(x), dict[str, Tensor])
    assert_type(tangent.diagonal(x), Tensor)
    assert_type(tangent.trace(x), Tensor)
    assert_type(tangent.pushforward(x, sketches.gaussian(8, seed=0)), Tensor)
    assert_type(tangent.pullback(x, torch.randn(4, len(x), 3)), dict[str, Tensor])
    gram = sum(tangent.grams(x, torch.randn(4, len(x), 3), create_graph=True).values(), torch.zeros(4, 4))
    torch.autograd.backward(estimators.trace2(gram) / assert_type(estimators.frobenius2(gram), Tensor))
    assert_type(functional.center(kernel), Tensor)
    assert_type(functional.alignment(kernel, y, unbiased=True), Tensor)
    assert_type(functional.spectrum(kernel), Tensor)
    assert_type(functional.effective_rank(kernel), Tensor)
    assert_type(functional.summary(functional.spectrum(kernel), (10,)), dict[str, Tensor])
    assert_type(functional.eigenvector_alignment(kernel, y, k=5), Tensor)
    assert_type(functional.kare(kernel, y, ridge=0.1), Tensor)
    assert_type(complexity.spectral_product(model), Tensor)


def regularize(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Losses, as in the README."""
    regs = [
        losses.ComplexityPenalty(model, weight=0.016, examples=32),
        losses.AlignmentLoss(model, weight=lambda step: 0.1 * min(step / 500, 1), every_n_steps=3),
        losses.ParticipationRatioLoss(model, per_layer=True),
        losses.KARELoss(model, params=["encoder.*"]),
    ]
    for reg in regs:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + assert_type(reg(x, y), Tensor)
        torch.autograd.backward(loss)  # torch leaves its backward() method untyped
        optimizer.step()
