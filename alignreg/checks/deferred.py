"""Numbers that decide something, read from the device together, so that it is waited for once.

On a GPU operations are queued, and reading a number waits for all of them. Inside :func:`deferred` what is read on such
a device is noted, and looked at when the block's owner asks; anywhere else, and on the CPU, it is looked at at once.
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
    """A check of a derivative failed that held before, after the result was used."""

    def __init__(self) -> None:
        super().__init__(
            "the derivative of this batch failed its self-check, which held for batches of this kind before. Call "
            "again: other ways to it are tried then. Is the model a deterministic function of its parameters and "
            "inputs?"
        )


@final
class Deferred:
    """What is to be looked at later."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._verdicts: list[Tensor] = []
        self._then: list[Callable[[list[float]], None]] = []

    def __bool__(self) -> bool:
        """Whether there is something."""
        return bool(self._then)

    def add(self, values: Tensor, then: Callable[[list[float]], None]) -> None:
        """Note numbers, and what is to be done with them."""
        self._values.append(values.detach())
        self._then.append(then)

    def require(self, holds: Tensor, error: Callable[[], Exception | None]) -> None:
        """Note a condition, and the error where it does not hold; ``None`` if it does after all."""

        def then(numbers: list[float]) -> None:
            if not numbers[0] and (found := error()) is not None:
                raise found

        self.add(holds, then)
        self._verdicts.append(holds.detach())

    def held(self, device: torch.device) -> Tensor:
        """Return whether all conditions hold that were noted, as a tensor."""
        flags = [verdict.to(device, torch.bool) for verdict in self._verdicts]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)

    def settle(self) -> None:
        """Look at everything, in order, until an error is raised; then forget it."""
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
    """Look later, when ``settle()`` is called, at what is read inside the block."""
    scope = Deferred() if scope is None else scope
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        _SCOPE.reset(token)


def waits(device: torch.device) -> bool:
    """Say whether reading a number from the device waits for what it was told to do before."""
    return device.type not in ("cpu", "meta")


def require(holds: Tensor, error: Callable[[], Exception | None]) -> None:
    """Raise an error unless a condition holds, here or later.

    Args:
        holds: the condition, a scalar.
        error: makes it; returns ``None`` if the condition was too strict.
    """
    scope = _SCOPE.get()
    if scope is not None and waits(holds.device):
        scope.require(holds, error)
    elif not bool(holds) and (found := error()) is not None:
        raise found


def look(values: Tensor, then: Callable[[list[float]], None]) -> None:
    """Do something with numbers, here or later."""
    scope = _SCOPE.get()
    if scope is not None and waits(values.device):
        scope.add(values, then)
    else:
        then(values.detach().flatten().tolist())


def passes(holds: Tensor, key: Any, proven: set[Any]) -> bool:
    """Say whether a self-check holds; one of a kind that held before is taken to, and looked at later.

    Args:
        holds: the outcome, a scalar.
        key: the kind of the check.
        proven: the kinds that held; this one is added or taken away.

    Raises:
        SelfCheckError: later, if it does not hold.
    """
    scope = _SCOPE.get()
    if scope is not None and key in proven and waits(holds.device):

        def error() -> Exception:
            proven.discard(key)
            return SelfCheckError()

        scope.require(holds, error)
        return True
    settle()  # what came before may explain a failure
    if bool(holds):
        proven.add(key)
        return True
    proven.discard(key)
    return False


def settle() -> None:
    """Look at everything that was put off so far."""
    if (scope := _SCOPE.get()) is not None:
        scope.settle()
