"""Search for the examples among the leading axes of a tensor inside the model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """The places of the examples in the leading axes of a tensor."""

    def split(self, x: Tensor, lead: int, offset: int = 0) -> Tensor:
        """Reshape ``(*before, *lead, *after)`` to ``(*before, n, positions, *after)``, given the numbers of axes.

        ``lead`` and ``offset`` are the numbers of axes in *lead* and *before*.
        """


class Axis(NamedTuple):
    """The axis ``axis`` is ``(outer, n, inner)`` flattened, where n are the examples."""

    axis: int
    outer: int
    n: int
    inner: int

    def split(self, x: Tensor, lead: int, offset: int = 0) -> Tensor:
        """Reshape as :class:`Layout` says."""
        before, after = x.shape[:offset], x.shape[offset + lead :]
        if lead:
            axis = offset + self.axis
            sizes = (*x.shape[:axis], self.outer, self.n, self.inner, *x.shape[axis + 1 :])
            x = x.reshape(sizes).movedim(axis + 1, offset)
        return x.reshape(*before, self.n, -1, *after)


class Scattered(NamedTuple):
    """The flattened items of the leading axes belong to the examples in any order and number."""

    items: Tensor
    """The indices of the items of each example ``(n, positions)``, filled up with the total number of items."""

    def split(self, x: Tensor, lead: int, offset: int = 0) -> Tensor:
        """Gather as :class:`Layout` says, with zeros where an example has fewer positions than others."""
        x = x.flatten(offset, offset + lead - 1)
        x = torch.cat([x, x.new_zeros(*x.shape[:offset], 1, *x.shape[offset + 1 :])], dim=offset)
        found = x.index_select(offset, self.items.flatten())
        return found.reshape(*found.shape[:offset], *self.items.shape, *found.shape[offset + 1 :])


def candidates(lead: torch.Size, n: int) -> list[Axis]:
    """Return the possible layouts of leading axes of these sizes: examples have their own axis or share one."""
    if n == 1:
        return [Axis(0, 1, 1, lead[0] if lead else 1)]
    own = [Axis(axis, 1, n, 1) for axis, size in enumerate(lead) if size == n]
    merged = [
        layout
        for axis, size in enumerate(lead)
        if size > n and size % n == 0
        for layout in (Axis(axis, 1, n, size // n), Axis(axis, size // n, n, 1))
    ]
    return own + merged


def weights(n: int) -> Tensor:
    """Return weights 1, −1, 2, −2, 3, ... of the outputs of n examples, which identify the gradients of each."""
    index = torch.arange(n, device="cpu")
    return (1 + index // 2) * (1 - 2 * (index % 2))


def find(possible: list[Axis], plain: Tensor, weighted: Tensor, lead: int, n: int) -> Layout | None:
    """Return the layout that explains a weighted gradient; ``None`` if items belong to several examples.

    If an item belongs to example i, its gradient of the weighted sum of outputs is w_i times that of the plain sum.
    An item without a gradient may belong to any example.

    Args:
        possible: the layouts that the sizes allow.
        plain: the gradient ``(*lead, *rest)`` of the sum of the outputs over the examples.
        weighted: the gradient of their sum with :func:`weights`.
        lead: the number of leading axes.
        n: the number of examples.
    """
    plain, weighted = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (plain, weighted))
    w = weights(n).to(plain)
    allowed = 0.1 * torch.linalg.vector_norm(weighted)
    for layout in possible:
        mine, theirs = layout.split(plain, lead), layout.split(weighted, lead)
        difference = theirs - w.reshape(n, *(1,) * (mine.ndim - 1)) * mine
        if bool(torch.linalg.vector_norm(difference) <= allowed):
            return layout
    return _scattered(plain.reshape(*plain.shape[:lead], -1).flatten(0, lead - 1), weighted, w) if lead else None


def _scattered(plain: Tensor, weighted: Tensor, w: Tensor) -> Scattered | None:
    weighted = weighted.reshape(plain.shape)
    energy = plain.square().sum(1)
    known = energy > 0
    ratio = (weighted * plain).sum(1) / energy.where(known, 1)
    owner = 2 * (ratio.abs().round().long() - 1) + (ratio < 0).long()
    owner = owner.masked_fill(~known, -1)
    if not bool((owner[known].clamp(0, len(w) - 1) == owner[known]).all()):
        return None
    error = torch.linalg.vector_norm(weighted - w[owner.clamp(min=0)][:, None] * plain, dim=1)
    if not bool((error <= 0.25 * energy.sqrt())[known].all()):
        return None  # the item belongs to several examples
    counts = torch.bincount(owner[known], minlength=len(w))
    order = owner.argsort(stable=True)[len(owner) - int(known.sum()) :]
    place = torch.arange(len(order), device=owner.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    items = owner.new_full((len(w), max(1, int(counts.max()))), len(owner))
    items[owner[order], place] = order
    return Scattered(items)
