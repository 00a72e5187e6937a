"""A module that is referred to by another, without being one of its submodules."""

from __future__ import annotations

from typing import Any, final

from torch import nn


@final
class Reference:
    """Keeps a module out of the registry of submodules, and a copy of the holder on the same module."""

    def __init__(self, module: nn.parallel.DistributedDataParallel | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return Reference(memo.get(id(self.module), self.module))
