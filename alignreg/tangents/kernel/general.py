"""Products of the Jacobians of any parameters, in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from alignreg.tangents.batch import flat
from alignreg.tangents.jacobian import JacobianRows
from alignreg.tangents.kernel.gradients import Close
from alignreg.tangents.kernel.gram import rows_gram
from alignreg.tangents.linearization import Linearization


class Piece(NamedTuple):
    """Entries ``start:stop`` of the flattened parameter ``name``."""

    name: str
    start: int
    stop: int


def pieces(sizes: Mapping[str, int], limit: int) -> Iterator[list[Piece]]:
    """Cut parameters of given sizes into groups of at most ``limit`` ≥ 1 numbers, and large parameters into slices."""
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


def gram(left: Linearization, right: Linearization | None, group: list[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Yield the contribution of each piece to the products of rows at two batches, or to their half at one."""
    others: Iterable[tuple[Piece, Tensor | None]] = zip(group, repeat(None)) if right is None else rows(right, group)
    for (piece, u), (_, v) in zip(rows(left, group), others, strict=True):
        yield piece, rows_gram([(u, v)])


def rows(at: Linearization, group: list[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Yield the columns of the Jacobian that belong to each piece, ``(n, c, stop - start)``."""

    def gather(jacobian: Iterator[JacobianRows]) -> Tensor:
        parts: list[Tensor] = []
        matrix: Tensor | None = None
        for examples, rows in jacobian:
            columns = {name: flat(value, 2) for name, value in rows.items()}
            part = torch.cat([columns[name][..., start:stop] for name, start, stop in group], dim=-1)
            # Use float32 at least, since products in half precision would lose digits of the Jacobian.
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            if at.create_graph:
                parts.append(part)
                continue
            if matrix is None:
                matrix = part.new_empty(at.n, *part.shape[1:])
            matrix[examples] = part
        return torch.cat(parts) if matrix is None else matrix

    columns = at.reduce_rows(gather, [name for name, _, _ in group], independent=True)
    yield from zip(group, torch.split(columns, [stop - start for _, start, stop in group], dim=-1), strict=True)


def diagonal(at: Linearization, names: Sequence[str], close: Close) -> dict[str, Tensor]:
    """Return the products of each example's own rows, by parameter."""

    def gather(jacobian: Iterator[JacobianRows]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for _, rows in jacobian:
            for name, value in rows.items():
                some = flat(value, 2).to(at.gram_dtype)
                parts[name].append(close(some, some))
        return {name: torch.cat(part) for name, part in parts.items()}

    return at.reduce_rows(gather, names)
