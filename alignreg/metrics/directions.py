"""The random directions of a sketch metric."""

from __future__ import annotations

import math
from typing import Literal

from alignreg import checks, sketches

RANK = 4
"""The rank of each copy in a factored sketch. A sketch with ``2 * sketch_dim`` vectors for each side of a weight then
has about the error of ``sketch_dim`` directions (``benchmarks/scale.py``, part ``factored``)."""
SKETCH_DIM_PER_OUTPUT = 64
"""The least ``sketch_dim`` per output at which ``"auto"`` chooses a factored sketch. It needs one pass for each output;
directions of equal error need one pass each (``benchmarks/scale.py``, part ``factored``)."""
Kind = Literal["rademacher", "gaussian", "factored"]
Sketch = sketches.RandomDirections | sketches.FactoredDirections


def choose(sketch: Literal["rademacher", "gaussian", "factored", "auto"], num_outputs: int, sketch_dim: int) -> Kind:
    """Return a kind of directions, which ``"auto"`` leaves open."""
    checks.choice("sketch", sketch, ("rademacher", "gaussian", "factored", "auto"))
    if sketch == "auto":
        return "factored" if num_outputs * SKETCH_DIM_PER_OUTPUT <= sketch_dim else "rademacher"
    return sketch


def draw(kind: Kind | None, count: int, seed: int) -> Sketch:
    """Return directions, as many as have about the error of ``count`` independent ones."""
    if kind == "factored":
        return sketches.factored(max(3, math.ceil(2 * count / RANK)), RANK, seed)
    return sketches.gaussian(count, seed) if kind == "gaussian" else sketches.rademacher(count, seed)
