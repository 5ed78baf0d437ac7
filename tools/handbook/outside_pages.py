"""Gives the handbook pages for what its pages link to outside of ``docs/``: samples, recipes, benchmarks.

A hook of MkDocs (``hooks:`` in ``mkdocs.yml``). A link such as ``../samples/detection`` works where the repository is
browsed, and would be a dead end in the built site. Each such file or folder becomes a page of the site: a Markdown
file as it is, a folder as its README or a list of its files, any other file of text as a listing. The links are
rewritten to these pages while the site is built; the files themselves stay as they are. A link to something that
does not exist is left alone, so that the strict build names it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[2]
_DOCS = "docs"
#: Where the pages made here stand in the site.
_SHELF = "repository"
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".toml": "toml",
    ".json": "json",
    ".txt": "text",
    ".sh": "bash",
}

#: The path in the repository of each page of the site that was made here.
_origins: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for everything outside of ``docs/`` that a page links to, and for what those pages link to."""
    _origins.clear()
    waiting = [
        (f"{_DOCS}/{file.src_uri}", file.content_string) for file in files if file.is_documentation_page()
    ]
    while waiting:
        place, text = waiting.pop()
        for target in _outside_targets(place, text):
            address = _address(target)
            if address in _origins:
                continue
            written_in, content = _content(target)
            _origins[address] = written_in
            files.append(
                File.generated(config, address, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            )
            waiting.append((written_in, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave ``docs/`` (or come back to it from outside) to the pages of the site."""
    address = page.file.src_uri
    place = _origins.get(address, f"{_DOCS}/{address}")
    outside = address in _origins

    def rewrite(match: re.Match[str]) -> str:
        target = _target(place, match[1])
        if target is None:
            return match[0]
        if not target.startswith(f"{_DOCS}/"):
            goal = _address(target)
        elif outside:
            goal = target.removeprefix(f"{_DOCS}/")
        else:
            return match[0]
        return f"]({posixpath.relpath(goal, posixpath.dirname(address) or '.')}{match[2] or ''})"

    return _LINK.sub(rewrite, markdown)


def _target(place: str, link: str) -> str | None:
    """Return the path in the repository that ``link`` means on the page at ``place``; None when nothing is there."""
    if ":" in link or link.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return path if not path.startswith("..") and (_ROOT / path).exists() else None


def _outside_targets(place: str, text: str) -> Iterator[str]:
    """Yield the paths outside of ``docs/`` that the page at ``place`` links to."""
    for match in _LINK.finditer(text):
        target = _target(place, match[1])
        if target is not None and not target.startswith(f"{_DOCS}/"):
            yield target


def _address(target: str) -> str:
    """Return where in the site the page of a path of the repository stands."""
    return f"{_SHELF}/{target.removesuffix('.md')}.md"


def _content(target: str) -> tuple[str, str]:
    """Return the path that links of the page are relative to, and its Markdown."""
    path = _ROOT / target
    if path.is_dir():
        readme = path / "README.md"
        if readme.exists():
            return f"{target}/README.md", readme.read_text(encoding="utf-8")
        entries = [
            entry
            for entry in sorted(path.iterdir())
            if entry.suffix in _LANGUAGES or (entry.is_dir() and not entry.name.startswith(("_", ".")))
        ]
        rows = [f"- [`{entry.name}`]({entry.name})" for entry in entries]
        return f"{target}/index", "\n".join([f"# {target}", "", *rows, ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return target, text
    language = _LANGUAGES.get(path.suffix, "text")
    return f"{target}.listing", f"# {target}\n\n````{language}\n{text}\n````\n"
