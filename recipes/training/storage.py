"""Files of runs: UTF-8 whatever the locale, whole or as they were, and what the system refuses in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(place: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Name what could not be written, and why.

    Raises:
        ValueError: for every OSError, and what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{flag}: expected a folder that can be written, but {place}: {reason}.") from None


def read(path: Path) -> str:
    """Return a file's text."""
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Put a text in the place of a file, all of it at once.

    Raises:
        ValueError: if it cannot be written; the file is then what it was.
    """
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
