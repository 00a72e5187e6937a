"""Embeddings, and bags of embeddings, since the backward pass of the fused kernel of bags has no derivative."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    """Return torch's embeddings, with dense gradients; refuse those whose gradient is no derivative."""
    if scale_grad_by_freq:
        raise _by_frequency("embedding")
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


def _by_frequency(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected scale_grad_by_freq=False, got True. Gradients divided by counts are no derivatives, "
        "and cannot be differentiated. Leave it out."
    )


def embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return bags of embeddings; torch's own if ``max_norm`` rescales rows."""
    if scale_grad_by_freq:
        raise _by_frequency("embedding_bag")
    if max_norm is not None:
        rest = mode, sparse, per_sample_weights, include_last_offset, padding_idx
        return F.embedding_bag(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, *rest)
    if input.ndim == 2:
        bags, bag = len(input), torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
    else:
        assert offsets is not None  # torch requires them
        bags = len(offsets) - include_last_offset
        places = torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(offsets[:bags].contiguous(), places, right=True) - 1
    tokens = input.reshape(-1).long()
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if padding_idx is not None:
        counted = tokens != padding_idx % len(weight)
    rows = F.embedding(tokens, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    empty = rows.new_zeros(bags, weight.shape[1])
    if mode == "max":
        rows = rows.masked_fill(~counted[:, None], -math.inf)
        y = empty.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
        return y.masked_fill(y == -math.inf, 0)
    total = empty.index_add(0, bag, rows * counted[:, None])
    if mode == "sum":
        return total
    numbers = rows.new_zeros(bags).index_add(0, bag, counted.to(rows.dtype))
    return total / numbers.clamp_min(1)[:, None]
