"""The pullback Φᵀ(y − 1πᵀ) of sets of examples, with a guess π of their mean target: the exact part of alignment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignreg import checks, sketches
from alignreg.tangents import TangentFeatures
from alignreg.tangents.batch import Batch, flat, on

HASH_SIZE = 2**22
"""The maximum length of a kept pullback; a longer one is hashed to it (:func:`.sketches.count_sketch`)."""


def length(features: TangentFeatures) -> int:
    """Return the length of a kept pullback."""
    return min(features.num_parameters, HASH_SIZE)


def mean_of_targets(target_mean: Tensor | Sequence[float] | None, c: int) -> Tensor | None:
    """Return an expected mean of the targets ``(c,)`` as a tensor, or ``None`` if none is given.

    Raises:
        ValueError: if it is not a vector of c finite values.
    """
    if target_mean is None:
        return None
    values = target_mean
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values)
        except Exception as error:
            got = checks.shown(target_mean)
            raise ValueError(f"target_mean: expected {c} finite values, got {got}.") from error
    values = checks.values("target_mean", values).detach()
    if values.shape != (c,):
        raise ValueError(f"target_mean: expected {c} finite values, got {checks.shown(target_mean)}.")
    return values.to("cpu", torch.float64)


def guesses(y: Tensor, sets: Sequence[Tensor], expected: Tensor | None) -> Tensor:
    """Return π of each set of examples ``(sets, c)``: the expected mean, or else the mean in this batch."""
    if expected is not None:
        return on(expected.to(y.dtype), y.device).expand(len(sets), -1)
    return torch.stack([y[rows].mean(0) if len(rows) else y.new_zeros(y.shape[1]) for rows in sets])


def pullbacks(
    features: TangentFeatures, batch: Batch, y: Tensor, sets: Sequence[Tensor], guesses: Tensor, *, seed: int
) -> Tensor:
    """Return Φᵀ(y − 1πᵀ) of each set of examples ``(sets, P)``, hashed if long, with one backward pass each."""
    cotangents = y.new_zeros(len(sets), *y.shape)
    for cotangent, rows, guess in zip(cotangents, sets, guesses, strict=True):
        cotangent[rows] = y[rows] - guess
    # A group that is the whole batch has the pullback of the batch, and the pullback of an empty group is zero.
    needed = [0, *(s for s, rows in enumerate(sets) if s and 0 < len(rows) < len(y))]
    back = features.pullback(batch, torch.stack([cotangents[s] for s in needed]))
    kept = length(features)
    if kept < features.num_parameters:
        rows = sketches.count_sketch(back, kept, seed=seed).to(y.device)
    else:
        rows = torch.cat([flat(value).to(y.device, torch.float64) for value in back.values()], dim=1)
    result = rows.new_zeros(len(sets), rows.shape[1])
    for s, members in enumerate(sets):
        if len(members) == len(y):
            result[s] = rows[0]
    for s, row in zip(needed, rows, strict=True):
        result[s] = row
    return result
