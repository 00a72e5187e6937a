"""Checks of arguments: each kind of mistake has one message, raised before anything has changed.

A check returns its value in the form that the rest of the package needs: numbers of numpy become Python numbers, and
half precision becomes float32. It raises a ``ValueError`` for a wrong option (a number, flag or name) or wrong numbers
in a tensor, and a ``TypeError`` for an object of a wrong kind (no tensor, no function). Checks of tensor values do not
affect gradients, and they pass if values cannot be read: under ``torch.compile`` or ``vmap``, on the meta device, or
while a CUDA graph is being captured.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from alignreg.checks import deferred

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LONGEST = 80


def shown(value: Any) -> str:
    """Return the text of a value for a message: one line, shortened if it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - an integer of 5,000 digits, or a faulty repr of a user's class
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def flag(name: str, value: Any) -> bool:
    """Return a flag, True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}.")  # noqa: TRY004 - all options raise it
    return value


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """Return an integer of any type, including numpy's, as a Python ``int``; flags and tensors are refused."""
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}.{_convert(value, 'int')}")


def count(name: str, value: Any, least: int = 1, why: str = "") -> int:
    """Return an integer that is at least ``least``, and small enough to be the size of a tensor."""
    expected = ("a positive integer" if least == 1 else f"an integer of at least {least}") + why
    checked = integer(name, value, expected)
    if not least <= checked < 2**63:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}.")
    return checked


def seed(value: Any) -> int:
    """Return a seed, which may be any integer."""
    return integer("seed", value)


def number(
    name: str,
    value: Any,
    expected: str = "a finite number",
    holds: Callable[[float], bool] = math.isfinite,
    hint: str = "",
) -> float:
    """Return a finite real number that satisfies ``holds``, as a float; flags and tensors are refused."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            converted = float(value)
        except OverflowError:  # an integer beyond the range of floats
            converted = math.inf
        if math.isfinite(converted) and holds(converted):
            return converted
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}.{_convert(value, 'float')}{hint}")


def positive(name: str, value: Any, hint: str = "") -> float:
    """Return a finite number above zero."""
    return number(name, value, "a positive number", lambda converted: converted > 0, hint)


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """Return a name, which must be one of the options."""
    if not isinstance(value, str) or value not in options:
        *others, last = map(repr, options)
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {shown(value)}.")
    return value


def each(value: Any) -> tuple[Any, ...]:
    """Return the elements of a collection, or the value itself as the only element; a string is one element."""
    try:
        return (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        return (value,)


def function(name: str, value: Any, signature: str) -> None:
    """Check that a value can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function {signature}, got {shown(value)}.")


def dense(name: str, value: Any) -> Tensor:
    """Return a plain tensor of any dtype: not sparse, nested or quantized."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}. Convert it with torch.as_tensor.")
    if value.is_quantized:
        raise TypeError(f"{name}: expected a plain tensor, got one of {value.dtype}. Convert it with .dequantize().")
    if value.is_nested:
        raise TypeError(f"{name}: expected a plain tensor, got a nested one. Pad it with .to_padded_tensor().")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a plain tensor, got one of {value.layout}. Convert it with .to_dense().")
    return value


def real(name: str, value: Any, *, integers: bool = False) -> Tensor:
    """Return a tensor of real numbers, in float32 at least; ``integers``, if allowed, become float64.

    The numbers may be NaN or infinite; see :func:`finite`.
    """
    tensor = dense(name, value)
    if tensor.is_complex():
        raise TypeError(f"{name}: expected a real tensor, got {tensor.dtype}. Pass the real part if you mean that.")
    if integers and tensor.dtype in _INTEGERS:
        return tensor.to(torch.float64)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}. Convert it with .float().")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite(name: str, value: Tensor) -> Tensor:
    """Return a tensor, whose values must be finite."""

    def error() -> ValueError | None:
        # The cheap sum is not finite if a term is not, but it may also overflow; only then, look at the terms.
        overflow = bool(torch.isfinite(value.detach()).all())
        return None if overflow else ValueError(f"{name}: expected finite values, got NaN or inf.")

    require(value, lambda v: torch.isfinite(v.sum()), error)
    return value


def values(name: str, value: Any, *, integers: bool = True) -> Tensor:
    """Return a tensor of finite real numbers, checked by :func:`real` and :func:`finite`."""
    return finite(name, real(name, value, integers=integers))


def text(name: str, value: Any) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {shown(value)}.")
    return value


def by_name(name: str, value: Any) -> dict[str, Tensor]:
    """Return m vectors in parameter space, ``(m, *shape)`` by parameter name, as real tensors."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected vectors by parameter name, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"{name}: expected vectors by parameter name, got none.")
    vectors = {key: real(f"{name}[{key!r}]", part) for key, part in value.items()}
    sizes = {len(part) if part.ndim else 0 for part in vectors.values()}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"{name}: expected (m, *shape) of every parameter, got m = {sorted(sizes)}.")
    return vectors


def require(value: Tensor, condition: Callable[[Tensor], Tensor], error: Callable[[], Exception | None]) -> None:
    """Raise ``error()`` unless ``condition(value)``, a scalar, holds; pass if the values cannot be read.

    ``error`` returns ``None`` if the condition was too strict.
    """
    if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    try:
        deferred.require(condition(value.detach()), error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # under vmap, or for tensors without values; `error` never returns one
        return


def _convert(value: Any, to: str) -> str:
    return f" Convert it with {to}()." if isinstance(value, Tensor) else ""
