"""The Python examples of the README and the docs are run, each page from top to bottom in one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "tools" / "handbook"))

import printed as printed_by  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": page.stem}
    text = page.read_text()
    for example, printed in printed_by.run(text, str(page), namespace):
        if example.output is not None:  # a block of text right below is what the block prints, numbers aside
            assert sorted(printed_by.comparable(printed)) == sorted(printed_by.comparable(example.output))
    assert "__builtins__" in namespace or "```python" not in text


def test_a_changed_output_is_noticed() -> None:
    page = "```python\nprint('layers 3.5 ms')\n```\n\n```text\nlayers 12 ms\n```\n"
    ((example, printed),) = printed_by.run(page, "page", {})
    assert printed_by.comparable(printed) == printed_by.comparable(example.output or "")
    assert printed_by.comparable("layer 3.5 ms") != printed_by.comparable(example.output or "")


def test_a_pruner_of_your_own_takes_at_most_forty_lines() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/custom_pruner.md").read_text(), flags=re.S | re.M
    )
    assert len(blocks) == 2
    assert all("Pruner):" in block and len(block.splitlines()) <= 40 for block in blocks)
