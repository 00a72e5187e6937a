"""Checks of arguments: each kind of mistake has one message, raised before anything has changed.

A wrong option (a number, a flag, a name) is a ``ValueError``, what is no object of the kind (a tensor, a function) a
``TypeError``. A check returns what it was given as the rest of the package wants it: numbers of numpy become those of
Python, half precision becomes float32. Checks of values leave gradients alone, and pass over values that cannot be
read: those of ``torch.compile``, ``vmap``, the meta device or a CUDA graph that is being captured.
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
    """Return what a message says of a value: on one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - of an integer of 5,000 digits, or of a class of somebody's
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def flag(name: str, value: Any) -> bool:
    """Return a switch, True or False.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}.")  # noqa: TRY004 - an option like others
    return value


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """Return a whole number of any kind, those of numpy among them, as one of Python.

    Raises:
        ValueError: for anything else, flags and tensors among it.
    """
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}.{_convert(value, 'int')}")


def count(name: str, value: Any, least: int = 1, why: str = "") -> int:
    """Return a whole number that is not below ``least``.

    Raises:
        ValueError: if it is not, or too large for the size of a tensor.
    """
    expected = ("a positive integer" if least == 1 else f"an integer of at least {least}") + why
    found = integer(name, value, expected)
    if not least <= found < 2**63:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}.")
    return found


def seed(value: Any) -> int:
    """Return a seed: any integer.

    Raises:
        ValueError: if it is none.
    """
    return integer("seed", value)


def number(
    name: str,
    value: Any,
    expected: str = "a finite number",
    holds: Callable[[float], bool] = math.isfinite,
    hint: str = "",
) -> float:
    """Return a finite real number for which ``holds`` holds, as a float.

    Raises:
        ValueError: for anything else, flags and tensors among it.
    """
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            found = float(value)
        except OverflowError:  # an integer beyond all floats
            found = math.inf
        if math.isfinite(found) and holds(found):
            return found
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}.{_convert(value, 'float')}{hint}")


def positive(name: str, value: Any, hint: str = "") -> float:
    """Return a finite number above zero.

    Raises:
        ValueError: if it is none.
    """
    return number(name, value, "a positive number", lambda found: found > 0, hint)


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """Return one of some names.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in options:
        *others, last = map(repr, options)
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {shown(value)}.")
    return value


def each(value: Any) -> tuple[Any, ...]:
    """Return what a collection holds, or the value alone where it is none; a text is one."""
    try:
        return (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        return (value,)


def function(name: str, value: Any, signature: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name}: expected a function {signature}, got {shown(value)}.")


def dense(name: str, value: Any) -> Tensor:
    """Return a plain tensor of any dtype.

    Raises:
        TypeError: if it is no tensor, or sparse, nested or quantized.
    """
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
    """Return a tensor of real numbers, in float32 at least; integers, where they are welcome, in float64.

    Whether its numbers are finite, :func:`finite` says.

    Raises:
        TypeError: as :func:`dense`, or if the tensor is complex, or of integers that are not welcome.
    """
    tensor = dense(name, value)
    if tensor.is_complex():
        raise TypeError(f"{name}: expected a real tensor, got {tensor.dtype}. Take the real part, if that is meant.")
    if integers and tensor.dtype in _INTEGERS:
        return tensor.to(torch.float64)
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}. Convert it with .float().")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite(name: str, value: Tensor) -> Tensor:
    """Return a tensor none of whose numbers is NaN or infinite.

    Raises:
        ValueError: if one is.
    """

    def error() -> ValueError | None:
        # A sum is cheap, and not finite if one of its terms is not; after an overflow the terms are looked at.
        overflow = bool(torch.isfinite(value.detach()).all())
        return None if overflow else ValueError(f"{name}: expected finite values, got NaN or inf.")

    require(value, lambda v: torch.isfinite(v.sum()), error)
    return value


def values(name: str, value: Any, *, integers: bool = True) -> Tensor:
    """Return a tensor of finite real numbers, as :func:`real` and :func:`finite` do.

    Raises:
        TypeError: as :func:`real`.
        ValueError: as :func:`finite`.
    """
    return finite(name, real(name, value, integers=integers))


def text(name: str, value: Any) -> str:
    """Return a text.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a text, got {shown(value)}.")
    return value


def by_name(name: str, value: Any) -> dict[str, Tensor]:
    """Return vectors of parameter space, ``(m, *shape)`` by parameter name, as real tensors.

    Raises:
        TypeError: if they are no mapping of real tensors.
        ValueError: if there are none, or not as many of each parameter.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected vectors by parameter name, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"{name}: expected vectors by parameter name, got none.")
    found = {key: real(f"{name}[{key!r}]", part) for key, part in value.items()}
    sizes = {len(part) if part.ndim else 0 for part in found.values()}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"{name}: expected (m, *shape) of every parameter, got m = {sorted(sizes)}.")
    return found


def require(value: Tensor, condition: Callable[[Tensor], Tensor], error: Callable[[], Exception | None]) -> None:
    """Raise an error unless a condition on the numbers of a tensor holds, which it does where they cannot be read.

    Args:
        value: the tensor.
        condition: of it, a scalar.
        error: makes the error; returns ``None`` if the condition was too strict.
    """
    if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    try:
        deferred.require(condition(value.detach()), error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of vmap, and of tensors without numbers; `error` makes none
        return


def _convert(value: Any, to: str) -> str:
    return f" Convert it with {to}()." if isinstance(value, Tensor) else ""
