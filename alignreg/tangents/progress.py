"""An optional progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(description: str, total: int, *, show: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances a bar by an amount; ``show`` the bar on the terminal if the package rich exists.

    Raises:
        ImportError: if the bar is to be shown and rich is missing.
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
