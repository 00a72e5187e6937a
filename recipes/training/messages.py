"""Messages for the user: one line instead of a traceback, readable on any terminal."""

from __future__ import annotations

import io
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SHORT = reprlib.Repr()
DIGITS, LENGTH = 50, 60
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, LENGTH, LENGTH, DIGITS + 10


class ToldError(ValueError):
    """An error whose text tells the user all they need, as does a ValueError whose text begins with a flag."""


@contextmanager
def in_words() -> Iterator[None]:
    """Turn errors about flags, files, memory or numbers into one line and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show "±" still shows the table
    try:
        yield
    except (ValueError, MemoryError, RuntimeError) as error:
        if is_told(error):
            told = str(error)
        elif _is_memory(error):
            told = f"expected sizes that fit into memory, but {_first_line(error)} Lower --hidden, --batch_size, ..."
        else:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {told}")


def is_told(error: BaseException) -> bool:
    """Return whether the text of an error tells the user all they need."""
    return isinstance(error, ToldError) or (isinstance(error, ValueError) and str(error).startswith("--"))


def short(value: Any) -> str:
    """Return a short text for a value of any size."""
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        return f"a number of more than {DIGITS} digits"
    return SHORT.repr(value)


def shortened(text: str) -> str:
    """Return a text, cut if it is too long for a message."""
    return text if len(text) <= LENGTH else f"{text[:LENGTH]}..."


def _is_memory(error: BaseException) -> bool:
    # The CPU allocator has no error class of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0].rpartition("DefaultCPUAllocator: ")[2]
    return f"{line or 'there is not enough of it'}".rstrip(".") + "."
