"""Products of pullbacks whose gradient is computed for a few examples at a time, to save memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignreg import estimators
from alignreg.tangents import TangentFeatures
from alignreg.tangents.batch import Batch, size, slice_examples


def grams(features: TangentFeatures, x: Batch, cotangents: Tensor, step: int) -> dict[str, Tensor]:
    r"""Return ω_aᵀK_wω_b by parameter w, like :meth:`.TangentFeatures.grams`, differentiable once.

    The pullbacks g_a = Σ_i Φ_iᵀω_ai are sums over examples. With C = ∂L/∂G for a loss L of the products G,

        dL = Σ_ab C_ab d(g_a·g_b) = Σ_a ⟨v_a, dg_a⟩,  v_a = Σ_b (C_ab + C_ba) g_b,

    which for fixed v is again a sum over examples. One pass over the examples gives g, a second one the gradient.
    ``step`` examples go through the model at once; they must not depend on each other.
    """
    leaves = features.leaves(slice_examples(x, 0, 1))
    names = list(features.parameters)
    products = _Grams.apply(features, x, cotangents, step, leaves, *leaves)  # type: ignore[no-untyped-call]
    return dict(zip(names, products, strict=True))


@final
class _Grams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: TangentFeatures,
        x: Batch,
        cotangents: Tensor,
        step: int,
        leaves: list[Tensor],
        *_: Tensor,
    ) -> tuple[Tensor, ...]:
        total: dict[str, Tensor] = {}
        for start in range(0, size(x), step):
            some = slice(start, start + step)
            part = features.pullback(slice_examples(x, start, start + step), cotangents[:, some])
            for name in list(part):
                value = part.pop(name)
                total[name] = total[name].add_(value) if name in total else value
        ctx.given = features, x, cotangents, step, leaves, total
        return tuple(estimators.inner_products(columns) for columns in total.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        features, x, cotangents, step, leaves, columns = ctx.given
        total: list[Tensor | None] = [None] * len(leaves)
        # One cotangent at a time, so that memory holds the graph of one pullback, and one v.
        for a, cotangent in enumerate(cotangents):
            weights = {
                name: torch.tensordot((slope + slope.T)[a].to(columns[name]), columns[name], dims=1)
                for name, slope in zip(columns, slopes, strict=True)
            }
            for start in range(0, size(x), step):
                some = slice_examples(x, start, start + step)
                part = _gradients(features, some, cotangent[None, start : start + step], weights, leaves)
                total = [_sum(before, new) for before, new in zip(total, part, strict=True)]
        return None, None, None, None, None, *total


def _gradients(
    features: TangentFeatures, x: Batch, cotangent: Tensor, weights: Mapping[str, Tensor], leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        pulled = features.pullback(x, cotangent, create_graph=True)
        products = [(value[0] * weights[name]).sum() for name, value in pulled.items()]
        total = torch.stack(products).sum()
        if not total.requires_grad:
            return (None,) * len(leaves)
        return torch.autograd.grad(total, leaves, allow_unused=True)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
