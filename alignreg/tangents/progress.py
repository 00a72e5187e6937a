"""A progress bar where one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int, *, show: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function that is told how much more is done, and shows it on the terminal if ``show``.

    Args:
        description: what is going on.
        total: how much there is to do.
        show: whether to show it, which takes the package rich.

    Raises:
        ImportError: if rich is missing.
    """
    if not show:
        yield lambda _: None
        return
    try:
        from rich.progress import Progress  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("progress=True: expected the package rich. Install it: pip install rich.") from error
    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
