"""One writer at a time: a lock on a folder, held while a run or a study lives, that ends with its process."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from training import storage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)
BEYOND = 2**30
"""A byte that Windows locks: one beyond the text, or nobody could read who holds it."""


@contextmanager
def hold(folder: Path, flag: str) -> Iterator[None]:
    """Be the only one that writes to a folder.

    The lock belongs to the open file and so to the process, however that ends: none is left to be cleared away.

    Raises:
        ValueError: if another process holds it, by its number, or the folder cannot be written.
    """
    path = folder / NAME
    with storage.writing(path, flag):
        file = _open(path)
    try:
        if not file:
            raise ValueError(
                f"{flag}: expected a folder that nothing else writes to, but {_holder(path)} does, and holds {path}. "
                "Wait until it ends, or end it: workers outlive a launcher that was killed."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        if file:
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink()
            file.close()


def _open(path: Path) -> IO[str] | None:
    """Return the file of the lock, locked, or nothing if that is held."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in HELD:
                file.close()
                return None
            print(
                f"{path}: this file system has no locks ({error.strerror}). See to it that nothing else writes here.",
                file=sys.stderr,
            )
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder removed it between the opening and the lock


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # noqa: PLC0415 - Windows alone has it

    file.seek(BEYOND)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(path: Path) -> str:
    try:
        return storage.read(path) or "another process"
    except OSError:
        return "another process"
