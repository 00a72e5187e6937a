"""Eigenvalues of a kernel and what they come to, where it is known to be one.

Centering a kernel that is nearly constant leaves rounding errors, which need be neither symmetric nor positive. Numbers
of such a rest are noise, and computed here like any others. :mod:`.functional` refuses it: who hands over a tensor may
have no kernel at all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(K: Tensor) -> Tensor:
    """Return a kernel ``(n, c, n, c)`` as a matrix ``(n·c, n·c)``."""
    rows = K.shape[0] * K.shape[1]
    return K.reshape(rows, rows)


def symmetric(K: Tensor) -> Tensor:
    """Return the symmetric part of a kernel, as a matrix."""
    found = matrix(K)
    return (found + found.T) / 2


def eigenvalues(K: Tensor) -> Tensor:
    """Return all eigenvalues of a kernel, descending; rounding makes some negative."""
    found: Tensor = torch.linalg.eigvalsh(symmetric(K))
    return found.flip(0)


def effective_rank(values: Tensor) -> Tensor:
    """Return exp(−Σ_j μ_j log μ_j), μ_j = λ_j / Σλ, of the positive ones of some eigenvalues; 0 without any."""
    values = values[values > 0]
    if len(values) == 0:
        return values.sum()
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()


def participation_ratio(K: Tensor) -> Tensor:
    """Return (tr K)² / ‖K‖_F² of a kernel, 0 for zero."""
    found = matrix(K)
    return ratio(found.diagonal().sum(), found.square().sum())


def ratio(trace: Tensor, squares: Tensor) -> Tensor:
    """Return trace² / squares, 0 where both are zero."""
    return trace.square() / torch.where(squares > 0, squares, torch.ones_like(squares))
