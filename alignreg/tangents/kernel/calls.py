"""What the call of a layer's function says about the gradients of its parameters: three kinds of calls.

Axes: *lead* are the leading axes of the call's output, one item each, some of which are examples (:mod:`.layout`
finds out which); t are positions inside an item; c are the outputs of the model, and d is the gradient of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alignreg.tangents.kernel.gradients import Gradients, OuterProducts, Rows, TokenSums
from alignreg.tangents.kernel.layout import Layout


class Call(Protocol):
    """A call of a function with a weight and perhaps a bias."""

    @property
    def lead(self) -> int:
        """How many leading axes its output has."""

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients:
        """Return the per-example gradients of its parameters.

        Args:
            layout: which of the leading axes are examples.
            gradient: of its output, ``(c, *output)``.
            weight: whether the weight is one of the parameters in question.
            bias: whether the bias is.
            dtype: to compute in.
        """


class Maps(NamedTuple):
    """Weight gradient Σ_t d_t a_tᵀ, bias gradient Σ_t d_t: linear maps and convolutions."""

    lead: int
    inputs: Callable[[], Tensor]
    """a ``(*lead, groups, in, t)``; called when needed, since unfolded inputs are large."""
    outputs: Callable[[Tensor], Tensor]
    """Gradient of the call's output ``(c, *output)`` to d ``(c, *lead, groups, out, t)``."""

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients:
        """See :class:`Call`."""
        d = layout.split(self.outputs(gradient.to(dtype)), self.lead, 1)
        if not weight:
            return Rows({"bias": d.sum((2, -1)).transpose(0, 1).flatten(2)})
        d = d.transpose(0, 1).movedim(2, -2).flatten(-2)
        a = layout.split(self.inputs().to(dtype), self.lead).movedim(1, -2).flatten(-2)
        return OuterProducts(a, d, bias=bias)


class Scales(NamedTuple):
    """Weight gradient Σ_t d_t ∘ a_t, bias gradient Σ_t d_t: the affine part of a normalization."""

    lead: int
    inputs: Callable[[], Tensor]
    """a ``(*lead, p, t)``."""
    outputs: Callable[[Tensor], Tensor]
    """Gradient of the call's output ``(c, *output)`` to d ``(c, *lead, p, t)``."""

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients:
        """See :class:`Call`."""
        d = layout.split(self.outputs(gradient.to(dtype)), self.lead, 1)
        values = {"bias": d.sum((2, -1)).transpose(0, 1)} if bias else {}
        if weight:
            a = layout.split(self.inputs().to(dtype), self.lead)
            # One output at a time: a product as large as d would cost more than its multiplications.
            values["weight"] = torch.stack([(one * a).sum((1, -1)) for one in d], dim=1)
        return Rows(values)


class Lookups(NamedTuple):
    """Weight gradient Σ_t e_token(t) d_tᵀ: embeddings."""

    lead: int
    tokens: Tensor
    """``(*lead)``: the row of the weight, or a negative number where its gradient is dropped."""
    rows: int
    """How many the weight has."""

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Gradients:  # noqa: ARG002
        """See :class:`Call`."""
        d = layout.split(gradient.to(dtype), self.lead, 1)
        return TokenSums(layout.split(self.tokens, self.lead), d.permute(1, 0, 3, 2)[:, :, None], self.rows)
