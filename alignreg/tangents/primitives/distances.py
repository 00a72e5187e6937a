"""Distances and similarities, since the backward passes of torch's kernels have no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.tangents.primitives.norms import vector_norm


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Return the distances between all vectors of two sets."""
    if p == 0:
        return torch.cdist(x1, x2, p) if compute_mode is None else torch.cdist(x1, x2, p, compute_mode)
    return vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:  # noqa: A002 - torch's name
    """Return the distances between the vectors of one set."""
    if p == 0:
        return torch.nn.functional.pdist(input, p)
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return vector_norm(input[i] - input[j], p, -1)


def dist(input: Tensor, other: Tensor, p: float = 2.0) -> Tensor:  # noqa: A002
    """Return the norm of a difference."""
    return vector_norm(input - other, p)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """Return the distances between corresponding vectors of two sets."""
    return vector_norm(x1 - x2 + eps, p, -1, keepdim)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Return the cosines between corresponding vectors; zero for zero vectors."""
    dtype = torch.promote_types(x1.dtype, x2.dtype)
    x1, x2 = torch.broadcast_tensors(x1.to(dtype), x2.to(dtype))  # type: ignore[no-untyped-call]
    one, two = (x / vector_norm(x, 2, dim, True).clamp_min(eps) for x in (x1, x2))
    return (one * two).sum(dim)
