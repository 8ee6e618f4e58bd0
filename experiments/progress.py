"""How far an experiment is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A function to call when another part of ``total`` is done, with what there is to say."""
    console = Console(highlight=False)
    begin = time.perf_counter()
    done = 0

    def line(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {time.perf_counter() - begin:4.0f} s  {text}", flush=True)

    if not console.is_terminal:
        print(f"{what}: {total} parts", flush=True)
        yield line
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def shown(text: str) -> None:
            bar.console.print(text)
            bar.advance(task)

        yield shown
