"""Features along directions that are products of two vectors, from the factors of layers without a pushforward."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.sketches import FactoredDirections
from alignreg.tangents.kernel import general
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.per_example import by_example
from alignreg.tangents.kernel.taps import Site


def features(rules: Rules, directions: FactoredDirections) -> Tensor:
    """Return ΦS ``(n, c, m)`` for the directions S, from one backward pass per output for all layers and directions.

    For a weight that is used at positions t, ⟨Σ_t d_t a_tᵀ, p qᵀ⟩ = Σ_t (p·d_t)(q·a_t). Parameters without a rule
    are multiplied by their rows of the Jacobian.
    """
    at = rules.at

    def measure(site: Site, gradients: Gradients) -> Tensor:
        factors = {kind: directions.factors(name, at.params[name]) for kind, name in site.names.items()}
        return gradients.project({kind: (p.to(at.gram_dtype), q.to(at.gram_dtype)) for kind, (p, q) in factors.items()})

    parts, rest = by_example(rules, measure)
    total = torch.stack([value.flatten(2) for value in parts.values()]).sum(0) if parts else None
    numbers = at.fit(at.gram_dtype.itemsize * (at.n * at.c + directions.m), part=8)
    for group in general.pieces({name: at.params[name].numel() for name in rest}, numbers):
        for piece, rows in general.rows(at, group):
            S = directions.block(piece.name, at.params[piece.name], 0, directions.m)
            part = rows @ S.reshape(directions.m, -1)[:, piece.start : piece.stop].to(rows).T
            total = part if total is None else total + part
    assert total is not None
    return total
