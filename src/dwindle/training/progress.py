"""A progress bar on a terminal, silence everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["narrated", "tracked"]

Item = TypeVar("Item")


def tracked(
    items: Iterable[Item], description: str, *, total: int | None = None, shown: bool | None = None
) -> Iterator[Item]:
    """Yield the items, with a bar that vanishes at the end.

    Args:
        items: What is worked through.
        description: What is done with them, shown beside the bar.
        total: How many there are; None asks the items, and when they do not know, the bar only pulses.
        shown: Whether to draw it; None means only when the error output is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def narrated(description: str, *, shown: bool | None = None) -> Iterator[Callable[[str], None]]:
    """Give a function that shows how far work of unknown length has come, in one line that vanishes at the end.

    Args:
        description: What is done; stands before each text.
        shown: Whether to draw it; None means only when the error output is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(description) as line:
        yield lambda text: line.update(f"{description}: {text}")
