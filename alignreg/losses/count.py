"""A count in a buffer that is read from its device only after other code has written to the buffer."""

from __future__ import annotations

from typing import final

from torch import Tensor


@final
class Count:
    """A copy of the number in a buffer, so that reading the number need not wait for the buffer's device."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, int] | None = None

    def read(self, buffer: Tensor) -> int:
        """Return the number in the buffer."""
        if buffer.is_inference():  # inference tensors do not track changes in place
            return int(buffer)
        if self._known is None or self._known[0] is not buffer or self._known[1] != buffer._version:  # noqa: SLF001 - counts changes in place
            self._known = buffer, buffer._version, int(buffer)  # noqa: SLF001
        return self._known[2]

    def add_one(self, buffer: Tensor) -> None:
        """Add one to the number in the buffer."""
        number = self.read(buffer) + 1
        buffer.add_(1)
        if not buffer.is_inference():
            self._known = buffer, buffer._version, number  # noqa: SLF001

    def __getstate__(self) -> dict[str, None]:
        return {"_known": None}  # a copy belongs to another buffer
