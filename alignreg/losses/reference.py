"""A reference from one module to another that does not make it a submodule."""

from __future__ import annotations

from typing import Any, final

from torch import nn


@final
class Reference:
    """A reference that hides a module from the registry of submodules; a copy of the holder keeps the same module."""

    def __init__(self, module: nn.parallel.DistributedDataParallel | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return Reference(memo.get(id(self.module), self.module))
