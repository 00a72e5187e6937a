"""Features along directions, ΦS, from the gradients of layers: one backward pass an output serves all directions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from alignreg.sketches.directions import Directions, FactoredDirections, RandomDirections, parts_of
from alignreg.tangents.kernel import general
from alignreg.tangents.kernel.gradients import Gradients, Sums
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.per_example import by_example
from alignreg.tangents.kernel.taps import Site
from alignreg.tangents.kernel.tokens import TokenSums


def features(rules: Rules, directions: Directions) -> Tensor:
    """Return ΦS ``(n, c, m)``.

    Parameters without a rule go by their rows of the Jacobian.

    Args:
        rules: those of the model at the examples.
        directions: S.
    """
    at = rules.at
    found, rest = by_example(rules, partial(_along, directions, rules))
    total = torch.zeros(at.n, at.c, directions.m, dtype=at.gram_dtype, device=at.y.device)
    for part in found.values():
        total = total + part.to(total.device)
    numbers = at.fit(at.gram_dtype.itemsize * (at.n * at.c + directions.m), part=8)
    for group in general.pieces({name: at.params[name].numel() for name in rest}, numbers):
        for piece, rows in general.rows(at, group):
            S = directions.block(piece.name, at.params[piece.name], 0, directions.m).reshape(directions.m, -1)
            total = total + (rows @ S[:, piece.start : piece.stop].to(rows).T).to(total.device)
    return total


def _along(directions: Directions, rules: Rules, site: Site, gradients: Gradients) -> Tensor:
    parts = parts_of(directions)
    if len(parts) > 1 and (isinstance(gradients, TokenSums) or any(isinstance(s, FactoredDirections) for s in parts)):
        return torch.cat([_along(part, rules, site, gradients) for part in parts], dim=-1)
    params, dtype = {kind: rules.at.params[name] for kind, name in site.names.items()}, rules.at.gram_dtype
    if isinstance(directions, FactoredDirections):
        # For a weight that is used at positions t, ⟨Σ_t d_t a_tᵀ, p qᵀ⟩ = Σ_t (p·d_t)(q·a_t).
        factors = {kind: directions.factors(name, params[kind]) for kind, name in site.names.items()}
        return gradients.project({kind: (p.to(dtype), q.to(dtype)) for kind, (p, q) in factors.items()}).flatten(2)
    draw = directions.block
    numbers = sum(p.numel() for p in params.values())
    if isinstance(gradients, TokenSums) and isinstance(directions, RandomDirections):
        draw = partial(directions.rows, rows=gradients.labels)
        numbers = len(gradients.labels) * params["weight"].shape[1]
        gradients = gradients.compact()
    if isinstance(gradients, Sums) and gradients.forms_rows(directions.m):  # once for as many directions as can be
        step = rules.at.fit(numbers * dtype.itemsize, part=4)
    else:
        step = max(1, rules.limit // max(1, numbers))
    found = []
    for start in range(0, directions.m, step):
        stop = min(start + step, directions.m)
        S = {kind: draw(name, params[kind], start, stop).reshape(stop - start, -1) for kind, name in site.names.items()}
        found.append(gradients.along({kind: s.to(dtype) for kind, s in S.items()}, rules.limit))
    return torch.cat(found, dim=-1)
