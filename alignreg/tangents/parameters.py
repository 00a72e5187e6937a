"""Selection of the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from alignreg.checks import each


def as_patterns(params: Any) -> tuple[str, ...] | None:
    """Return the glob patterns of parameter names, given as one or several strings; ``None`` for all parameters."""
    if params is None:
        return None
    patterns = each(params)
    odd = [type(pattern).__name__ for pattern in patterns if not isinstance(pattern, str)]
    if odd:
        raise TypeError(
            f"params: expected glob patterns of parameter names, such as 'head.*', got {odd[0]}. "
            "Pass names, not parameters."
        )
    if not patterns:
        raise ValueError("params: expected at least one pattern, got none. Leave params out for all parameters.")
    return patterns


def require_values(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if parameters are on the meta device."""
    meta = [name for name, p in parameters.items() if p.is_meta]
    if meta:
        raise ValueError(
            f"model: expected parameters with values, got {_some(meta)} on the meta device. "
            "Allocate them with model.to_empty(device=...) and load the weights first."
        )


def select(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; with patterns, only those that match one.

    A ``ValueError`` is raised if a pattern matches none, or one has no shape or values yet, or is complex.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lazy = [name for name, p in (*trainable.items(), *model.named_buffers()) if nn.parameter.is_lazy(p)]
    if lazy:
        kind = "parameters" if trainable.keys() & set(lazy) else "buffers"
        raise ValueError(f"model: {kind} {lazy} have no shape yet. Run one forward pass first.")
    require_values(dict(model.named_parameters()))
    if not trainable:
        raise ValueError("model: expected a trainable parameter, got none with requires_grad=True.")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"params: the pattern {pattern!r} matches no trainable parameter. Choose from: {', '.join(trainable)}."
            )
    chosen = {
        name: p
        for name, p in trainable.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    # Real directions and probes would only see one of the two real numbers of a complex one.
    odd = [name for name, p in chosen.items() if p.is_complex()]
    if odd:
        raise ValueError(
            f"model: expected real parameters, got complex ones, {_some(odd)}. Leave them out with params=, patterns "
            "that match only the others, or store them as real ones (torch.view_as_real)."
        )
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
