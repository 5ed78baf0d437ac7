"""The page of a sensitivity analysis: every score has its dot, at its place, the most sensitive target first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dwindle.report import curves_plot, write_sensitivity_page


def point(level: float, score: float | None, drop: float | None, error: str | None = None) -> dict:
    return {
        "level": level,
        "detail": [1],
        "score": score,
        "drop": drop,
        "macs": None,
        "seconds": 0.1,
        "error": error,
    }


PRUNING = [
    {"name": "stem <0>", "members": [], "size": 8, "points": [point(0.25, 0.8, 0.1), point(0.75, 0.4, 0.5)]},
    {
        "name": "wide",
        "members": [],
        "size": 8,
        "points": [point(0.5, 0.9, 0.0), point(0.9, None, None, "it <broke>")],
    },
]
BITS = [{"name": "stem.weight", "members": [], "size": 9, "points": [point(8, 0.9, 0.0), point(2, 0.5, 0.4)]}]
RECORD = {
    "score": "metric",
    "baseline": 0.9,
    "kinds": [
        {"kind": "pruning", "level": "", "targets": PRUNING},
        {"kind": "quantization", "level": "", "targets": BITS},
    ],
    "notes": ["pruning: a <note>"],
}


def dots(markup: str) -> list[tuple[float, float]]:
    found = re.findall(r'class="dot small" style="left:([\d.]+)%;top:([\d.]+)%"', markup)
    return [(float(left), float(top)) for left, top in found]


def test_points_stand_at_their_levels_and_scores() -> None:
    markup = curves_plot("pruning", PRUNING, 0.9)
    found = dict(dots(markup))
    assert set(found) == {25.0, 50.0, 75.0}  # what failed has none
    assert (found[75.0] - found[25.0]) / (found[75.0] - found[50.0]) == pytest.approx(0.4 / 0.5, rel=1e-3)
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', markup)
    assert [name for name, _ in lines] == ["seed", "mean"]  # the worst lies on top
    assert all(path.startswith("0.000,") for _, path in lines)  # from the unchanged model
    assert "stem &lt;0&gt;, 25%: 0.8" in markup
    assert [left for left, _ in dots(curves_plot("quantization", BITS, None))] == pytest.approx(
        [100 / 9, 700 / 9], abs=1e-3
    )
    assert [left for left, _ in dots(curves_plot("factorization", [PRUNING[0]], None))] == [75.0, 25.0]
    assert curves_plot("pruning", [{**PRUNING[1], "points": PRUNING[1]["points"][1:]}], None) == ""


def test_the_page_stands_alone(tmp_path: Path) -> None:
    write_sensitivity_page(RECORD, tmp_path / "page.html", title="A <model>", shown=1)
    text = (tmp_path / "page.html").read_text()
    assert "A &lt;model&gt;" in text
    assert "4 points" not in text
    assert "6 points" in text
    assert text.count('class="plot"') == 4  # one for each kind, and one for its most sensitive target
    assert text.index("stem &lt;0&gt;</code></th>") < text.index("wide</code></th>")
    assert "failed" in text
    assert "it &lt;broke&gt;" in text
    assert "a &lt;note&gt;" in text
    assert "<broke>" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
