"""Groups of examples: their names, and the examples of a batch that belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignreg import checks


def names(groups: int | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the groups, an empty tuple without groups.

    Raises:
        ValueError: if ``groups`` is neither a positive integer nor a sequence of different names other than "total".
    """
    if groups is None:
        return ()
    expected = "a positive integer or different names other than 'total'"
    found = checks.each(groups)
    if len(found) == 1 and found[0] is groups:
        number = checks.integer("groups", groups, expected)
        return tuple(f"group_{index}" for index in range(checks.count("groups", number)))
    if not found or not all(isinstance(name, str) for name in found) or len({*found, "total"}) <= len(found):
        raise ValueError(f"groups: expected {expected}, got {checks.shown(groups)}.")
    return found


def encode(group: Tensor | None, count: int, n: int) -> Tensor:
    """Return the group of each of n examples as indices ``(n,)`` on the CPU; zeros without groups.

    Raises:
        TypeError: if ``group`` is not a tensor.
        ValueError: if it is missing, unexpected, not made of indices, or out of range.
    """
    if group is None:
        if count:
            raise ValueError(f"group: expected indices (n,) of the {count} groups, got none. Pass group, too.")
        return torch.zeros(n, dtype=torch.long, device="cpu")
    if not count:
        raise ValueError("group: expected none, as the metric has no groups. Create it with groups=..., or omit group.")
    group = checks.dense("group", group)
    if group.shape != (n,) or group.is_floating_point() or group.is_complex():
        raise ValueError(f"group: expected indices ({n},), got {group.dtype} of shape {tuple(group.shape)}.")
    members = group.detach().cpu().long()
    outside = members[(members < 0) | (members >= count)]
    if len(outside):
        raise ValueError(f"group: expected indices in [0, {count}), got {outside[0].item()}.")
    return members


def sets(members: Tensor, count: int) -> list[Tensor]:
    """Return the indices of all examples, and then of the examples of each group."""
    each = (members == index for index in range(count))
    return [torch.arange(len(members), device=members.device), *(member.nonzero().flatten() for member in each)]


def named(values: Sequence[Any], names: Sequence[str]) -> Any:
    """Return a dict of the values of each group and of all examples (``"total"``), or the one value without groups."""
    return dict(zip((*names, "total"), (*values[1:], values[0]), strict=True)) if names else values[0]
