"""Search for the examples among the leading axes of a tensor inside the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The axis ``axis`` is ``(outer, n, inner)`` flattened, where n are the examples."""

    axis: int
    outer: int
    n: int
    inner: int

    def split(self, x: Tensor, lead: int, offset: int = 0) -> Tensor:
        """Reshape ``(*before, *lead, *after)`` to ``(*before, n, positions, *after)``, given the numbers of axes.

        ``lead`` and ``offset`` are the numbers of axes in *lead* and *before*.
        """
        before, after = x.shape[:offset], x.shape[offset + lead :]
        if lead:
            axis = offset + self.axis
            sizes = (*x.shape[:axis], self.outer, self.n, self.inner, *x.shape[axis + 1 :])
            x = x.reshape(sizes).movedim(axis + 1, offset)
        return x.reshape(*before, self.n, -1, *after)


def candidates(lead: torch.Size, n: int) -> list[Layout]:
    """Return the possible layouts of leading axes of these sizes: examples have their own axis or share one."""
    if n == 1:
        return [Layout(0, 1, 1, lead[0] if lead else 1)]
    own = [Layout(axis, 1, n, 1) for axis, size in enumerate(lead) if size == n]
    merged = [
        layout
        for axis, size in enumerate(lead)
        if size > n and size % n == 0
        for layout in (Layout(axis, 1, n, size // n), Layout(axis, size // n, n, 1))
    ]
    return own + merged


def explains(layout: Layout, gradient: Tensor, lead: int) -> bool:
    """Return whether the gradient of the first example's outputs is nonzero only at that example."""
    return not bool(layout.split(gradient, lead)[1:].any())
