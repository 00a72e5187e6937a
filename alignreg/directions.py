"""Directions in parameter space, as whoever pushes features forward along them asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, final

import torch
from torch import Tensor

from alignreg import checks


class Directions(Protocol):
    """m directions in parameter space, drawn block by block."""

    @property
    def m(self) -> int:
        """Number of directions."""

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """Return directions ``start:stop`` for the parameter ``name``, ``(stop - start, *like.shape)``."""


@final
class GivenDirections:
    """Directions that the caller holds as tensors."""

    def __init__(self, directions: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        if directions.keys() != shapes.keys():
            raise ValueError(
                f"directions: expected one tensor for each of {list(shapes)}, "
                f"got {sorted(directions.keys() - shapes.keys())} too many and "
                f"{sorted(shapes.keys() - directions.keys())} missing."
            )
        for name, value in directions.items():
            label = f"directions[{name!r}]"
            checks.values(label, value)
        first = next(iter(directions.values()))
        self.m = len(first) if first.ndim else 0
        for name, shape in shapes.items():
            if directions[name].shape != (self.m, *shape):
                raise ValueError(
                    f"directions: expected {name!r} of shape {(self.m, *shape)}, got {tuple(directions[name].shape)}."
                )
        self._directions = directions

    def block(self, name: str, like: Tensor, start: int, stop: int) -> Tensor:
        """See :class:`Directions`."""
        return self._directions[name][start:stop].to(like)
