"""Minimize the estimated risk of kernel regression with the tangent kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignreg import checks, functional
from alignreg.checks import deferred
from alignreg.distributed.wrappers import concatenate_over_ranks, counts_of_ranks
from alignreg.losses.base import TangentLoss, Weight
from alignreg.losses.sample import Sample, UndefinedLossError
from alignreg.tangents.batch import map_tensors, size
from alignreg.tangents.linearization import ForwardFn
from alignreg.tangents.normalization import Statistics
from alignreg.targets import encode


@final
class KARELoss(TangentLoss):
    r"""Minimize weight · KARE(K_c, y), the kernel alignment risk estimate of ridge regression with the tangent kernel.

    KARE = [yᵀ(K/N + ρI)⁻²y / N] / [tr (K/N + ρI)⁻¹ / N]², N = n·c (Jacot et al. 2020, arXiv 2006.09796; as a loss for
    tangent kernels: arXiv 2505.11347; :func:`alignreg.functional.kare`). The loss uses no probes: it computes the exact
    kernel of the examples, differentiates it through the rules of layers, and solves its N equations in float64. It is
    the most expensive of the losses here, with a cost that grows as N².

    KARE does not change if K and ρ are scaled by the same factor. Compare ρ with tr K / N², the mean eigenvalue of K/N.

    Targets that are constant over the examples leave nothing to predict. The loss is then exactly zero, and warns once.

    Args:
        model: the model, as in :class:`.TangentLoss`, like all options that are not listed here. By default ``weight``
            is 1 and ``examples`` is 16.
        ridge: ρ > 0.
        sync: with several processes, gather their examples; each rank computes the kernel of all of them.

    Example:
        >>> import torch
        >>> from alignreg.losses import KARELoss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> reg = KARELoss(net, ridge=0.1)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss = torch.nn.functional.cross_entropy(net(x), y) + reg(x, y)
        >>> loss.backward()
    """

    default_weight: ClassVar[float] = 1.0
    needs_targets: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        ridge: float = 0.1,
        weight: Weight | None = None,
        examples: int | None = 16,
        every_n_steps: int = 3,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        centered: bool = True,
        per_layer: bool = False,
        sync: bool = False,
        statistics: Statistics = "training",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        clip: float | None = 0.25,
        params: str | Sequence[str] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__(
            model,
            weight=weight,
            examples=examples,
            every_n_steps=every_n_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            centered=centered,
            per_layer=per_layer,
            sync=sync,
            statistics=statistics,
            on_nonfinite=on_nonfinite,
            clip=clip,
            params=params,
            forward_fn=forward_fn,
        )
        self.ridge = checks.positive("ridge", ridge)

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ridge={self.ridge}"

    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor:
        assert sample.y is not None
        x, y = sample.x, encode(sample.y, self._width(sample.x), size(sample.x))
        if self.sync:
            device = self._features.like.device
            (sizes,) = counts_of_ranks((len(y),), device, self._group)
            x = map_tensors(lambda t: concatenate_over_ranks(t.to(device), sizes, self._group), x)
            y = concatenate_over_ranks(y.to(device), sizes, self._group)
        deferred.require(
            (y != y[0]).any(),
            lambda: UndefinedLossError(
                "All examples of a batch have the same target, so there is nothing to predict and the loss is zero."
            ),
        )
        if self._features.couples_examples:
            self._warn(
                "The model normalizes by batch statistics, so its kernel is computed from rows of the whole Jacobian, "
                "n·c backward passes whose graphs are all kept. This costs hundreds of times as much as a training "
                "step, and gigabytes for a deep network. Use fewer examples, or GroupNorm, which normalizes each "
                "example by itself."
            )
        if self.per_layer:
            layers = self._features.kernel(x, per_layer=True, create_graph=create_graph)
        else:
            layers = {"": self._features.kernel(x, create_graph=create_graph)}
        return self._mean_over_layers({layer: self._of_kernel(K, y) for layer, K in layers.items()})

    def _of_kernel(self, K: Tensor, y: Tensor) -> Tensor:
        dtype, K = K.dtype, K.to(torch.float64)
        return functional.kare(functional.center(K) if self.centered else K, y, self.ridge).to(dtype)
