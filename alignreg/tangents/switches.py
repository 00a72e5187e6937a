"""Settings of the whole process that the passes of this library need, in any thread."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

P = ParamSpec("P")
T = TypeVar("T")


def eager(fn: Callable[P, T]) -> Callable[P, T]:
    """Run a function eagerly in a compiled step, which breaks its graph there, without importing the compiler."""

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        result: T = torch.compiler.disable(fn)(*args, **kwargs)  # type: ignore[no-untyped-call]
        return result

    return run


@final
class Switches:
    """Settings that are shared by blocks: the first block to enter sets them, the last one to leave restores them.

    Several threads may be in such blocks at the same time. If each block saved and restored the settings by itself,
    the last one would restore a value that another block had set. ``settings`` yields context managers that set and
    restore.
    """

    def __init__(self, settings: Callable[[], Iterator[AbstractContextManager[Any]]]) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._users = 0
        self._stack = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Apply the settings inside the block."""
        with self._lock:
            if self._users == 0:
                with ExitStack() as stack:
                    for setting in self._settings():
                        stack.enter_context(setting)
                    self._stack = stack.pop_all()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._stack.close()


@contextmanager
def _muted(*messages: str) -> Iterator[None]:
    # Unlike catch_warnings, keep the filters that other threads add in the meantime.
    own = []
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
        own.append(warnings.filters[0])
    try:
        yield
    finally:
        for entry in own:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]  # it is a list, unlike its declared type
        warnings._filters_mutated()  # type: ignore[attr-defined]  # noqa: SLF001 - as warnings.filterwarnings does


@contextmanager
def _slow_attention_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _no_cached_parametrizations() -> Iterator[None]:
    # Inside ``parametrize.cached()`` weights would not be functions of the given parameters.
    parametrize = torch.nn.utils.parametrize
    users, cache = parametrize._cache_enabled, parametrize._cache  # noqa: SLF001 - there is no other switch
    parametrize._cache_enabled -= users  # noqa: SLF001
    parametrize._cache = {}  # noqa: SLF001
    try:
        yield
    finally:
        parametrize._cache_enabled += users  # noqa: SLF001 - other threads may have changed it in the meantime
        parametrize._cache = cache if users else {}  # noqa: SLF001


_EVERYWHERE = torch.nn.modules.module.__dict__
_GLOBAL = ("_global_backward_hooks", "_global_backward_pre_hooks")


def global_hooks_on_gradients() -> bool:
    """Return whether there are hooks on the gradients of all modules."""
    return any(_EVERYWHERE[place] for place in _GLOBAL)


@contextmanager
def _no_global_hooks_on_gradients() -> Iterator[None]:
    # Like the hooks of a single module, they are meant for the gradients of training.
    before = {place: _EVERYWHERE[place] for place in _GLOBAL}
    _EVERYWHERE.update({place: OrderedDict() for place in _GLOBAL})
    try:
        yield
    finally:
        for place, hooks in before.items():
            hooks.update(_EVERYWHERE[place])  # hooks that other threads registered in the meantime
        _EVERYWHERE.update(before)


def _differentiable() -> Iterator[AbstractContextManager[Any]]:
    # These warnings, about a missing batching rule and about the switch of recurrent layers below, change no result.
    yield _muted("There is a performance drop because", "TF32 acceleration on top of oneDNN")
    yield sdpa_kernel(SDPBackend.MATH)
    # In evaluation mode attention would use a fused path that has no forward-mode derivative.
    yield _slow_attention_path()
    yield _no_cached_parametrizations()
    yield _no_global_hooks_on_gradients()
    if "torch._dynamo" in sys.modules:  # otherwise no part of the model is compiled
        yield torch.compiler.set_stance("force_eager")


def _recurrent() -> Iterator[AbstractContextManager[Any]]:
    yield torch.backends.mkldnn.flags(enabled=False)
    if torch.cuda.is_available():
        yield torch.backends.cudnn.flags(enabled=False)


DIFFERENTIABLE = Switches(_differentiable)
"""Kernels that are differentiable twice and forward, weights that are functions of the parameters, no compilation."""
RECURRENT = Switches(_recurrent)
"""No fused kernels of recurrent layers, which are not."""
