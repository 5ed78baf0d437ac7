"""The picture of a search: every trial has its dot, at its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dwindle.report import search_plot, sensitivity_plot, write_search_page

RECORD = {
    "algorithm": "Sensitivity",
    "cost": "macs",
    "budget": 0.5,
    "baseline": {"score": 0.9, "cost": 200.0},
    "best": {"score": 0.8, "cost": 96.0},
    "curve": [
        {"trial": 1, "score": 0.5, "cost": 0.45, "fits": True, "best": 0.5},
        {"trial": 2, "score": None, "cost": 0.4, "fits": False, "best": 0.5},
        {"trial": 3, "score": 0.85, "cost": 0.7, "fits": False, "best": 0.5},
        {"trial": 4, "score": 0.8, "cost": 0.48, "fits": True, "best": 0.8},
    ],
    "sensitivity": {"stem <weight>": [[0.0, 0.9], [0.5, 0.7], [0.9, None]]},
}


def dots(markup: str, name: str) -> list[tuple[float, float]]:
    found = re.findall(rf'class="dot {name}" style="left:([\d.]+)%;top:([\d.]+)%"', markup)
    return [(float(left), float(top)) for left, top in found]


def test_trials_stand_at_their_scores() -> None:
    markup = search_plot(RECORD)
    small = dots(markup, "small")
    assert [left for left, _ in small] == pytest.approx([12.5, 62.5, 87.5])  # the failed one has none
    low, above, best = (top for _, top in small)
    assert low == pytest.approx(95.0)  # the lowest score, near the bottom
    assert (low - best) / (low - above) == pytest.approx((0.8 - 0.5) / (0.85 - 0.5), rel=1e-3)
    assert dots(markup, "large") == [(87.5, best)]
    assert "above the budget" in markup


def test_curves_of_axes_leave_out_what_failed() -> None:
    markup = sensitivity_plot(RECORD["sensitivity"])
    assert [left for left, _ in dots(markup, "small")] == [0.0, 50.0]
    assert "stem &lt;weight&gt;" in markup
    assert sensitivity_plot({}) == ""
    assert search_plot({**RECORD, "curve": []}) == ""


def test_the_page_stands_alone(tmp_path: Path) -> None:
    write_search_page(RECORD, tmp_path / "search.html", title="A <search>")
    text = (tmp_path / "search.html").read_text()
    assert "A &lt;search&gt;" in text
    assert "48.0%" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "search.html"]


def test_a_real_search_is_drawn(tmp_path: Path) -> None:
    from dwindle.search import Problem, Sensitivity, run_search
    from search.models import images, nearness, tiny

    model = tiny()
    problem = Problem(model, images(2), nearness(model), {"macs": 0.5})
    record = run_search(problem, Sensitivity(steps=(0.3, 0.6, 0.9))).to_json()
    assert len(dots(search_plot(record), "small")) == len(record["curve"])
    assert len(record["sensitivity"]) == len(problem.space.variables)
    write_search_page(record, tmp_path / "search.html")
    assert (tmp_path / "search.html").read_text().count('class="plot"') == 2
