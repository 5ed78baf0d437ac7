"""What the commands print: results to the output, everything else to the error output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["console", "messages", "print_json", "waiting", "working"]


def console() -> Console:
    """The console for results."""
    return Console(highlight=False)


def messages() -> Console:
    """The console for everything that is not a result."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Send what libraries print while they work to the error output, so that results stay pure."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that work goes on, when the error output is a terminal; also :func:`working`."""
    with working():
        if not sys.stderr.isatty():
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True, file=sys.stderr), transient=True) as bar:
            bar.add_task(text, total=None)
            yield
