r"""Shows a bar in a code span of a table as a bar.

A hook of MkDocs. Where the repository is browsed, a bar within a table must be written ``\|``, also in code; Python's
Markdown keeps the backslash there.
"""

from __future__ import annotations

import re

from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_CELL = re.compile(r"<t[dh][^>]*>.*?</t[dh]>", re.S)


def on_page_content(html: str, page: Page, config: object, files: Files) -> str:
    """Take the backslash away in front of bars in the cells of tables."""
    return _CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
