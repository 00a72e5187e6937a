"""Rules for products of matrices, in which the weight may be on either side."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.tangents.kernel.calls import Maps
from alignreg.tangents.kernel.rules.linear import linear


def addmm(
    input: Tensor,  # noqa: A002 - torch's name
    mat1: Tensor,
    mat2: Tensor,
    beta: float = 1,
    alpha: float = 1,
) -> Maps | None:
    """Return the map y = b + x W, with a transposed weight; ``None`` if the terms are scaled."""
    if beta != 1 or alpha != 1 or input.ndim != 1 or input.shape[0] != mat2.shape[1]:
        return None
    return linear(mat1, mat2)._replace(transposed=True)


def matmul(place: int, shape: torch.Size, result: Tensor, input: Tensor, other: Tensor) -> Maps | None:  # noqa: A002, ARG001
    """Return the map y = x W, or y = W x, or y = x·w for a vector w; ``None`` for more axes.

    ``place`` tells which of the two factors is the parameter, and ``shape`` is its shape.
    """
    if len(shape) == 1:
        x = (input, other)[1 - place]
        vectors = x if place == 1 or x.ndim == 1 else x.mT
        return Maps(
            lead=vectors.ndim - 1,
            inputs=lambda: vectors[..., None, :, None],
            outputs=lambda d: d[..., None, None, None],
        )
    if len(shape) > 2:
        return None
    if place == 1:
        return linear(input, other)._replace(transposed=True)
    if other.ndim < 2:
        return None
    if other.ndim == 2:  # examples are columns
        return linear(other.mT, input)._replace(region=lambda y: y.mT)
    return Maps(
        lead=other.ndim - 2,
        inputs=lambda: other[..., None, :, :],
        outputs=lambda d: d[..., None, :, :],
    )
