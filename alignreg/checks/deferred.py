"""Checks whose outcomes are read from the device together, so that the program waits for the device once.

A GPU queues operations, and reading a number waits for all of them. Inside :func:`deferred`, checks on a GPU are
recorded and read when the owner of the block asks for them. Elsewhere, and on the CPU, they are read immediately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor


@final
class SelfCheckError(RuntimeError):
    """A self-check failed after its result was used, since checks of this kind had passed before."""

    def __init__(self) -> None:
        super().__init__(
            "the derivative of this batch failed its self-check, which passed for batches of this kind before. Call "
            "again to try another route. Is the model a deterministic function of its parameters and inputs?"
        )


@final
class Deferred:
    """A list of checks to be read later, in order."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._verdicts: list[Tensor] = []
        self._then: list[Callable[[list[float]], None]] = []

    def __bool__(self) -> bool:
        return bool(self._then)

    def add(self, values: Tensor, then: Callable[[list[float]], None]) -> None:
        """Record numbers and the function to call with them."""
        self._values.append(values.detach())
        self._then.append(then)

    def require(self, holds: Tensor, error: Callable[[], Exception | None]) -> None:
        """Record a condition and the function that makes its error (``None`` if it holds after all)."""

        def then(numbers: list[float]) -> None:
            if not numbers[0] and (found := error()) is not None:
                raise found

        self.add(holds, then)
        self._verdicts.append(holds.detach())

    def held(self, device: torch.device) -> Tensor:
        """Return whether all recorded conditions hold, as a tensor."""
        flags = [verdict.to(device, torch.bool) for verdict in self._verdicts]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)

    def settle(self) -> None:
        """Read everything in order, until an error is raised, and clear the list."""
        values, then = self._values, self._then
        self._values, self._then, self._verdicts = [], [], []
        if not values:
            return
        packed = torch.cat([value.flatten().to(values[-1].device, torch.float64) for value in values])
        numbers = iter(packed.tolist())
        for value, act in zip(values, then, strict=True):
            act(list(islice(numbers, value.numel())))


_SCOPE: ContextVar[Deferred | None] = ContextVar("alignreg_deferred", default=None)


@contextmanager
def deferred(scope: Deferred | None = None) -> Iterator[Deferred]:
    """Record the checks inside the block, to be read when ``settle()`` is called."""
    scope = Deferred() if scope is None else scope
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(token)


def waits(device: torch.device) -> bool:
    """Return whether reading a number from the device waits for the operations queued on it."""
    return device.type not in ("cpu", "meta")


def require(holds: Tensor, error: Callable[[], Exception | None]) -> None:
    """Raise ``error()``, now or later, unless a scalar condition holds.

    ``error`` returns ``None`` if the condition was too strict.
    """
    scope = _SCOPE.get()
    if scope is not None and waits(holds.device):
        scope.require(holds, error)
    elif not bool(holds) and (found := error()) is not None:
        raise found


def look(values: Tensor, then: Callable[[list[float]], None]) -> None:
    """Pass numbers to a function, now or later."""
    scope = _SCOPE.get()
    if scope is not None and waits(values.device):
        scope.add(values, then)
    else:
        then(values.detach().flatten().tolist())


def passes(holds: Tensor, key: Any, proven: set[Any]) -> bool:
    """Return whether a self-check passes; assume so, and read it later, if a check of its kind passed before.

    ``key`` is the kind of the check, and is added to or removed from ``proven``, the kinds that have passed. A wrong
    assumption raises a :class:`SelfCheckError` later.
    """
    scope = _SCOPE.get()
    if scope is not None and key in proven and waits(holds.device):

        def error() -> Exception:
            proven.discard(key)
            return SelfCheckError()

        scope.require(holds, error)
        return True
    settle()  # an earlier check may explain a failure
    if bool(holds):
        proven.add(key)
        return True
    proven.discard(key)
    return False


def settle() -> None:
    """Read all checks that have been deferred so far."""
    if (scope := _SCOPE.get()) is not None:
        scope.settle()
