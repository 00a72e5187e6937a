"""Which parameters of a model count."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def select(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, those that match a glob pattern where there are patterns.

    Raises:
        ValueError: if nothing is trainable, has no shape yet, or a pattern matches nothing.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lazy = [name for name, p in trainable.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"model: parameters {lazy} have no shape yet. Run one forward pass first.")
    if not trainable:
        raise ValueError("model: expected a trainable parameter, got none with requires_grad=True.")
    if patterns is None:
        return trainable
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"params: the pattern {pattern!r} matches no trainable parameter. There are: {', '.join(trainable)}."
            )
    chosen = {name: p for name, p in trainable.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError("params: expected at least one pattern, got none.")
    return chosen
