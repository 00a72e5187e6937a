"""Norms whose second derivatives at zero vectors follow torch's convention that the gradient there is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Dims = int | Sequence[int] | None


def root(x: Tensor, p: float = 2.0) -> Tensor:
    """Return the p-th root; it is zero, with zero gradient, at zero."""
    zero = x == 0
    return x.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)


def vector_norm(
    x: Tensor,
    ord: float = 2,  # noqa: A002 - torch's name
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of vectors."""
    axes = _axes(x, dim)
    if ord <= 0 or not axes:  # x is a number, or the function is no norm
        unchanged: Tensor = torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype)
        return unchanged
    zero = (x == 0).all(axes, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(x.masked_fill(zero, 1), ord, axes, keepdim=True, dtype=dtype)
    norm = norm.masked_fill(zero, 0)
    return norm if keepdim else norm.squeeze(axes)


def matrix_norm(
    A: Tensor,
    ord: float | str = "fro",  # noqa: A002
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of matrices; torch computes all but the Frobenius norm."""
    if ord == "fro":
        return vector_norm(A, 2, dim, keepdim, dtype=dtype)
    other: Tensor = torch.linalg.matrix_norm(A, ord, tuple(dim), keepdim, dtype=dtype)
    return other


def linalg_norm(
    A: Tensor,
    ord: float | str | None = None,  # noqa: A002
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of vectors or matrices, depending on ``dim``."""
    if ord is None:
        return vector_norm(A, 2, dim, keepdim, dtype=dtype)
    axes = _axes(A, dim)
    if len(axes) == 1 and not isinstance(ord, str):
        return vector_norm(A, ord, dim, keepdim, dtype=dtype)
    if len(axes) == 2 and ord == "fro":
        return vector_norm(A, 2, axes, keepdim, dtype=dtype)
    other: Tensor = torch.linalg.norm(A, ord, dim, keepdim, dtype=dtype)
    return other


def norm(
    input: Tensor,  # noqa: A002
    p: float | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm of vectors, by default over all axes together."""
    if input.layout != torch.strided or p == "nuc":
        other: Tensor = torch.norm(input, p, dim, keepdim, dtype=dtype)
        return other
    order = 2.0 if p is None or p == "fro" else float(p)
    return vector_norm(input, order, dim, keepdim, dtype=dtype)


def normalize(
    input: Tensor,  # noqa: A002
    p: float = 2.0,
    dim: Dims = 1,
    eps: float = 1e-12,
    **rest: Any,
) -> Tensor:
    """Return vectors divided by their norm."""
    if any(value is not None for value in rest.values()):
        return F.normalize(input, p, dim, eps, **rest)  # type: ignore[arg-type]
    return input / vector_norm(input, p, dim, True).clamp_min(eps)


def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:  # noqa: A002
    """Return slices along ``dim``, scaled down to the largest allowed norm."""
    axes = [axis for axis in range(input.ndim) if axis != dim % input.ndim]
    size = vector_norm(input, p, axes, True)
    return input * (maxnorm / (size + 1e-7)).masked_fill(size <= maxnorm, 1.0)


def lp_pool(avg_pool: Callable[..., Tensor], spatial: int) -> Callable[..., Tensor]:
    """Return the function that computes norms of windows, given the one for means of windows, with ``spatial`` axes."""

    def pool(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:  # noqa: A002
        sizes = (kernel_size,) * spatial if isinstance(kernel_size, int) else tuple(kernel_size)
        numbers = math.prod(sizes * spatial if len(sizes) == 1 else sizes)
        return root(avg_pool(input.pow(norm_type), kernel_size, stride, 0, ceil_mode) * numbers, norm_type)

    return pool


def _axes(x: Tensor, dim: Dims) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    return axes or tuple(range(x.ndim))
