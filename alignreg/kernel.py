"""The exact tangent kernel from the Jacobian, in pieces of parameters that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignreg.jacobian import Block


class Piece(NamedTuple):
    """Entries ``start:stop`` of the flattened parameter ``name``."""

    name: str
    start: int
    stop: int


def pieces(sizes: Mapping[str, int], limit: int) -> Iterator[list[Piece]]:
    """Cut parameters into groups of at most ``limit`` numbers, large ones into slices.

    Args:
        sizes: numbers in each parameter.
        limit: numbers in a group, at least 1.
    """
    group: list[Piece] = []
    room = limit
    for name, numel in sizes.items():
        start = 0
        while start < numel:
            stop = min(numel, start + room)
            group.append(Piece(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], limit
    if group:
        yield group


def collect(blocks: Iterator[Block], group: list[Piece], *, rows: int, create_graph: bool) -> Tensor:
    """Lay out the columns ``group`` of a Jacobian as a matrix ``(rows, numbers in the group)``.

    Half-precision Jacobians come out in float32: their Gram matrix would lose what they still hold.
    """
    parts: list[Tensor] = []
    matrix: Tensor | None = None
    for examples, block in blocks:
        flat = {name: value.flatten(0, 1).flatten(1) for name, value in block.items()}
        part = torch.cat([flat[name][:, start:stop] for name, start, stop in group], dim=1)
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        if create_graph:
            parts.append(part)
            continue
        if matrix is None:
            matrix = part.new_empty(rows, part.shape[1])
        outputs = part.shape[0] // (examples.stop - examples.start)
        matrix[examples.start * outputs : examples.stop * outputs] = part
    return torch.cat(parts) if matrix is None else matrix


def gram(
    left: Callable[[list[Piece]], Tensor],
    right: Callable[[list[Piece]], Tensor] | None,
    groups: list[list[Piece]],
    layer_of: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return, by layer, the Gram matrix of the columns that belong to it, summed over groups.

    Args:
        left: gives the columns of a group for the rows of the result.
        right: the same for its columns; ``None`` stands for ``left``.
        groups: pieces of parameters to go through, one group in memory at a time.
        layer_of: the layer of each parameter.
    """
    total: dict[str, Tensor] = {}
    for group in groups:
        a = left(group)
        _add_gram(total, group, a, a if right is None else right(group), layer_of)
        del a  # before the next group takes its place
    return total


def _add_gram(total: dict[str, Tensor], group: list[Piece], a: Tensor, b: Tensor, layer_of: Mapping[str, str]) -> None:
    widths = [stop - start for _, start, stop in group]
    for piece, u, v in zip(group, torch.split(a, widths, dim=1), torch.split(b, widths, dim=1), strict=True):
        layer = layer_of[piece.name]
        if layer not in total:
            total[layer] = u @ v.T
        elif u.requires_grad or v.requires_grad:
            total[layer] = total[layer] + u @ v.T
        else:
            total[layer].addmm_(u, v.T)
