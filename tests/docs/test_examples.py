"""The Python examples of the README and the docs are run, each page from top to bottom in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert "__builtins__" in namespace or not blocks


def test_a_pruner_of_your_own_takes_at_most_forty_lines() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/custom_pruner.md").read_text(), flags=re.S | re.M
    )
    assert len(blocks) == 2
    assert all("Pruner):" in block and len(block.splitlines()) <= 40 for block in blocks)
