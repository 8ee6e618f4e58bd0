"""What planning is at, on a terminal; nothing in logs and files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# what shows the stage of the planning that runs
_SHOWS: list[Callable[[str], None]] = []


@contextmanager
def progress_shown() -> Iterator[None]:
    """Shows on standard error what `stage` is told, until it ends; only if that is a terminal."""
    if _SHOWS or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("actckpt: {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("planning", total=None)
        _SHOWS.append(lambda text: display.update(task, description=text))
        try:
            yield
        finally:
            _SHOWS.clear()


def stage(text: str) -> None:
    """What is being done now."""
    for show in _SHOWS:
        show(text)


def is_shown() -> bool:
    """Whether somebody is shown what is being done."""
    return bool(_SHOWS)
