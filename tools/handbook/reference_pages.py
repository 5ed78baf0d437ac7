"""Completes the reference, and fails the strict build when a public name is missing in it.

A hook of MkDocs. The pages under ``docs/reference/`` name one package each (``::: dwindle.pruning``), and what they
show follows from the docstrings and ``__all__``, read from the sources. Two things need help: a function whose file
has its name (``dwindle.realize.prune``) is hidden by that file, and gets a block of its own; the roles of
reStructuredText in docstrings (``:class:`Pruner```) become plain code.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_SOURCES = Path(__file__).resolve().parents[2] / "src"
_BLOCK = re.compile(r"^::: (\S+)$", re.M)
_SHOWN = "\n    options: {show_root_heading: true, show_root_full_path: false, heading_level: 2}"
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):<code>(~?)([\w.]+)</code>")
_log = logging.getLogger("mkdocs.plugins.reference_pages")


def public_names(package: str) -> list[str]:
    """Return the names in ``__all__`` of a package, read from its source without importing it.

    Args:
        package: The dotted name, such as ``dwindle.pruning``.
    """
    source = _SOURCES.joinpath(*package.split("."), "__init__.py")
    if not source.exists():  # a single file, or an object of one
        return []
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in statement.targets
        ):
            return list(ast.literal_eval(statement.value))
    return []


def on_page_markdown(markdown: str, page: Page, config: object, files: Files) -> str:
    """Add a block for each public name that a file of the same name hides."""
    if not page.file.src_uri.startswith("reference/"):
        return markdown

    def completed(match: re.Match[str]) -> str:
        places = ((name, _place(match[1], name)) for name in public_names(match[1]))
        hidden = [f"::: {place}.{name}{_SHOWN}" for name, place in places if place.endswith(f".{name}")]
        return "\n\n".join([match[0], *hidden])

    return _BLOCK.sub(completed, markdown)


def on_page_content(html: str, page: Page, config: object, files: Files) -> str:
    """Compare the anchors of a page of the reference with the packages it names; make roles plain code."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    anchors = set(re.findall(r'id="([^"]+)"', html))
    for package in _BLOCK.findall(page.markdown or ""):
        for name in public_names(package):
            if not {f"{package}.{name}", f"{_place(package, name)}.{name}"} & anchors:
                _log.warning("%s: %s.%s is public and not shown", page.file.src_uri, package, name)
    return _ROLE.sub(lambda match: f"<code>{match[2].split('.')[-1] if match[1] else match[2]}</code>", html)


def _place(package: str, name: str) -> str:
    """Return the module from which the names of a package come; the package itself for what it defines."""
    source = _SOURCES.joinpath(*package.split("."), "__init__.py")
    if source.exists():
        for statement in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(statement, ast.ImportFrom) or statement.module in (None, package):
                continue
            if name in (alias.asname or alias.name for alias in statement.names):
                return _place(str(statement.module), name)
    return package
