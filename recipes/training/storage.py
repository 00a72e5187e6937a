"""File access: UTF-8 whatever the locale, all or nothing, with clear messages for errors of the system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(place: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Say what could not be written, and why.

    Raises:
        ValueError: for every OSError, including those that safetensors wraps.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{flag}: expected a writable folder, but {place}: {reason}.") from None


def read(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Replace a file by a text, all at once.

    Raises:
        ValueError: if the text cannot be written; the file is then unchanged.
    """
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
