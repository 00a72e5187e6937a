"""Features along directions, ΦS, from the gradients of layers: one backward pass an output serves all directions."""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.sketches import Directions, FactoredDirections
from alignreg.tangents.kernel import general
from alignreg.tangents.kernel.gradients import Gradients
from alignreg.tangents.kernel.passes import Rules
from alignreg.tangents.kernel.per_example import by_example
from alignreg.tangents.kernel.recorder import Site


def features(rules: Rules, directions: Directions) -> Tensor:
    """Return ΦS ``(n, c, m)``.

    Parameters without a rule go by their rows of the Jacobian.

    Args:
        rules: those of the model at the examples.
        directions: S.
    """
    at = rules.at

    def measure(site: Site, gradients: Gradients) -> Tensor:
        if isinstance(directions, FactoredDirections):
            return _factored(gradients, site, directions, rules)
        numbers = sum(at.params[name].numel() for name in site.names.values())
        step, parts = at.fit(numbers * at.gram_dtype.itemsize, part=4), []
        for start in range(0, directions.m, step):
            stop = min(start + step, directions.m)
            S = {kind: _block(directions, name, rules, start, stop) for kind, name in site.names.items()}
            parts.append(gradients.along(S, rules.limit))
        return torch.cat(parts, dim=-1)

    found, rest = by_example(rules, measure)
    total = torch.stack(list(found.values())).sum(0) if found else at.y.new_zeros(at.n, at.c, directions.m)
    numbers = at.fit(at.gram_dtype.itemsize * (at.n * at.c + directions.m), part=8)
    for group in general.pieces({name: at.params[name].numel() for name in rest}, numbers):
        for piece, rows in general.rows(at, group):
            S = _block(directions, piece.name, rules, 0, directions.m)
            total = total + rows @ S[:, piece.start : piece.stop].to(rows).T
    return total


def _factored(gradients: Gradients, site: Site, directions: FactoredDirections, rules: Rules) -> Tensor:
    # For a weight that is used at positions t, ⟨Σ_t d_t a_tᵀ, p qᵀ⟩ = Σ_t (p·d_t)(q·a_t).
    dtype, params = rules.at.gram_dtype, rules.at.params
    factors = {kind: directions.factors(name, params[name]) for kind, name in site.names.items()}
    return gradients.project({kind: (p.to(dtype), q.to(dtype)) for kind, (p, q) in factors.items()}).flatten(2)


def _block(directions: Directions, name: str, rules: Rules, start: int, stop: int) -> Tensor:
    block = directions.block(name, rules.at.params[name], start, stop)
    return block.reshape(stop - start, -1).to(rules.at.gram_dtype)
