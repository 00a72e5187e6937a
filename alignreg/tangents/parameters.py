"""Which parameters of a model count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from alignreg.checks import each


def as_patterns(params: Any) -> tuple[str, ...] | None:
    """Return glob patterns of parameter names, as given alone or several; ``None`` for all parameters.

    Raises:
        TypeError: if they are no strings.
        ValueError: if there are none.
    """
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
    """Check that parameters are on a device that holds values.

    Raises:
        ValueError: if they are not.
    """
    meta = [name for name, p in parameters.items() if p.is_meta]
    if meta:
        raise ValueError(
            f"model: expected parameters with values, got {_some(meta)} on the meta device. "
            "Give them memory with model.to_empty(device=...) and load the weights first."
        )


def select(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, those that match a glob pattern where there are patterns.

    Raises:
        ValueError: if nothing is trainable, has no shape or no values yet, or is complex, or a pattern matches nothing.
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
                f"params: the pattern {pattern!r} matches no trainable parameter. There are: {', '.join(trainable)}."
            )
    chosen = {
        name: p
        for name, p in trainable.items()
        if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    # Each complex number is two real ones, of which real directions and probes would see one.
    odd = [name for name, p in chosen.items() if p.is_complex()]
    if odd:
        raise ValueError(
            f"model: expected real parameters, got complex ones, {_some(odd)}. Leave them out with params=, patterns "
            "that match the others alone, or hold them as real ones (torch.view_as_real)."
        )
    return chosen


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
