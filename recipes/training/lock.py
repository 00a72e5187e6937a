"""A lock on a folder that admits one writer; it is held by a run or a study and ends with its process."""

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
"""The byte that Windows locks: one beyond the text, so that others can read who holds the lock."""


@contextmanager
def hold(folder: Path, flag: str) -> Iterator[None]:
    """Be the only writer of a folder.

    The lock belongs to the open file, hence to the process: however the process ends, no stale lock remains.

    Raises:
        ValueError: if another process holds the lock (the message names it), or the folder cannot be written.
    """
    path = folder / NAME
    with storage.writing(path, flag):
        file = _open(path)
    try:
        if not file:
            raise ValueError(
                f"{flag}: expected a folder that no other process writes to, but {_holder(path)} holds {path}. "
                "Wait until it ends, or end it; workers outlive a launcher that was killed."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        if file:
            with suppress(OSError):  # Windows does not remove open files
                path.unlink()
            file.close()


def _open(path: Path) -> IO[str] | None:
    """Return the lock file, locked, or None if another process holds the lock."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError as error:
            if error.errno in HELD:
                file.close()
                return None
            print(
                f"{path}: this file system has no locks ({error.strerror}). Make sure that nothing else writes here.",
                file=sys.stderr,
            )
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder removed it between the open and the lock


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # noqa: PLC0415 - exists on Windows alone

    file.seek(BEYOND)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(path: Path) -> str:
    try:
        return storage.read(path) or "another process"
    except OSError:
        return "another process"
