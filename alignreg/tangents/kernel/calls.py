"""Three kinds of calls of layers' functions, which give the gradients of their parameters.

The leading axes of the output of a call, *lead*, hold one item each; some of these axes are examples
(:mod:`.layout` finds out which). t are positions inside an item, c are the outputs of the model, and d is the gradient
of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alignreg.tangents.kernel.gradients import Factors, OuterProducts, Rows
from alignreg.tangents.kernel.layout import Layout
from alignreg.tangents.kernel.tokens import TokenSums


class Call(Protocol):
    """A call of a function with a weight and perhaps a bias."""

    @property
    def lead(self) -> int:
        """The number of leading axes of its output."""

    @property
    def region(self) -> Callable[[Tensor], Tensor]:
        """Selects the part of the output with the parameters, and moves leading axes first.

        It works on the last axes, so that the argument may have axes before those of the output.
        """

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Factors:
        """Return the per-example gradients of the weight, the bias or both, in a dtype.

        ``gradient`` is that of the region, ``(c, *region)``, and ``layout`` tells which leading axes are examples.
        """


def _same(y: Tensor) -> Tensor:
    return y


class Maps(NamedTuple):
    """A linear map or convolution, with weight gradient Σ_t d_t a_tᵀ and bias gradient Σ_t d_t."""

    lead: int
    inputs: Callable[[], Tensor]
    """Returns a ``(*lead, groups, in, t)``; called when needed, since unfolded inputs are large."""
    outputs: Callable[[Tensor], Tensor]
    """Maps the gradient of the region ``(c, *region)`` to d ``(c, *lead, groups, out, t)``."""
    region: Callable[[Tensor], Tensor] = _same
    transposed: bool = False
    """True if the axes of the weight are ``(in, out)``."""

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Factors:
        """Return outer products, or rows for the bias only."""
        d = layout.split(self.outputs(gradient.to(dtype)), self.lead, 1)
        if not weight:
            return Rows({"bias": d.sum((2, -1)).transpose(0, 1).flatten(2)})
        d = d.transpose(0, 1).movedim(2, -2).flatten(-2)
        a = layout.split(self.inputs().to(dtype), self.lead).movedim(1, -2).flatten(-2)
        return OuterProducts(*_without_idle(a, d), bias=bias)


def _without_idle(a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Drop positions that no output depends on: in the last block of a transformer, all but the token that is read."""
    if d.shape[-1] == 1 or d.requires_grad:  # zeros may have derivatives
        return a, d
    if bool(d[0, 0].flatten(0, -2).any(0).all()):
        return a, d
    live = d.flatten(0, -2).any(0).nonzero()[:, 0]
    if 0 < len(live) < d.shape[-1]:
        return a.index_select(-1, live), d.index_select(-1, live)
    return a, d


class Scales(NamedTuple):
    """The affine part of a normalization, with weight gradient Σ_t d_t ∘ a_t and bias gradient Σ_t d_t."""

    lead: int
    inputs: Callable[[], Tensor]
    """Returns a ``(*lead, p, t)``."""
    outputs: Callable[[Tensor], Tensor]
    """Maps the gradient of the region ``(c, *region)`` to d ``(c, *lead, p, t)``."""
    region: Callable[[Tensor], Tensor] = _same

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Factors:
        """Return rows."""
        d = layout.split(self.outputs(gradient.to(dtype)), self.lead, 1)
        values = {"bias": d.sum((2, -1)).transpose(0, 1)} if bias else {}
        if weight:
            a = layout.split(self.inputs().to(dtype), self.lead)
            # One output at a time, since storing a product as large as d would cost more than its multiplications.
            values["weight"] = torch.stack([(one * a).sum((1, -1)) for one in d], dim=1)
        return Rows(values)


class Lookups(NamedTuple):
    """An embedding, with weight gradient Σ_t e_token(t) d_tᵀ."""

    lead: int
    tokens: Tensor
    """The row of the weight ``(*lead)``, or a negative number where its gradient is dropped."""
    rows: int
    """The number of rows of the weight."""
    region: Callable[[Tensor], Tensor] = _same

    def gradients(self, layout: Layout, gradient: Tensor, *, weight: bool, bias: bool, dtype: torch.dtype) -> Factors:  # noqa: ARG002
        """Return sums over tokens."""
        d = layout.split(gradient.to(dtype), self.lead, 1)
        return TokenSums(layout.split(self.tokens, self.lead), d.permute(1, 0, 3, 2)[:, :, None], self.rows)
