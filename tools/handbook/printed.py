"""Runs the examples of a page of the handbook and writes below each block what it printed.

    python tools/handbook/printed.py docs/first_minutes.md

A block of text that directly follows a block of Python is that block's output. The tests run all pages, and compare
such outputs with the page, numbers aside: those are of the machine that wrote the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```(?:\n\n```text\n(?P<text>.*?)^```)?", re.S | re.M)
#: What differs from machine to machine: numbers with their units, and which of two is faster.
_CHANGING = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?%?(?:\s?[kMG]?(?:B|s|ms|x)?\b)?|faster|slower")


@dataclass(frozen=True)
class Example:
    """A block of Python of a page.

    Attributes:
        code: The source, behind as many empty lines as stand above it in the page.
        output: The text below it, None where there is none.
        span: Where that text stands in the page.
    """

    code: str
    output: str | None
    span: tuple[int, int]


def examples(page: str) -> list[Example]:
    """Return the blocks of Python of a page, in order."""
    return [
        Example(
            "\n" * page.count("\n", 0, found.start("code")) + found["code"], found["text"], found.span("text")
        )
        for found in _BLOCK.finditer(page)
    ]


def run(page: str, source: str, namespace: dict[str, object]) -> Iterator[tuple[Example, str]]:
    """Run the blocks of a page one after the other in one namespace, and yield each with what it printed.

    Args:
        page: The text of the page.
        source: Its name, for tracebacks.
        namespace: Where the blocks run.
    """
    for example in examples(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.code, source, "exec"), namespace)
        yield example, printed.getvalue()


def comparable(text: str) -> list[str]:
    """Return the lines of an output without what differs from machine to machine."""
    lines = [" ".join(_CHANGING.sub("#", line).split()) for line in text.strip().splitlines()]
    return [re.sub(r"[━─-]{2,}", "-", line) for line in lines]


def written(page: str, source: str) -> str:
    """Return a page with the outputs of its blocks renewed."""
    outputs = [
        (example.span, printed)
        for example, printed in run(page, source, {"__name__": "page"})
        if example.output is not None
    ]
    for (start, end), printed in reversed(outputs):
        lines = (line.rstrip() for line in printed.strip("\n").splitlines())
        page = page[:start] + "\n".join(lines) + "\n" + page[end:]
    return page


def main() -> None:
    """Renew the outputs of the pages that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    for path in parser.parse_args().pages:
        path = path.resolve()
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            before = os.getcwd()
            os.chdir(folder)
            try:
                renewed = written(page, path.name)
            finally:
                os.chdir(before)
        path.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
