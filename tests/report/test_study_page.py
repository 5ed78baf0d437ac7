"""The page of a study: what is drawn, and that the line of the front is the front."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dwindle.report import front_plot, history_plot, write_study_page


def trial(number: int, score: float | None, size: float, *, excess: float = -1.0) -> dict[str, Any]:
    done = score is not None
    return {
        "number": number,
        "state": "complete" if done else "failed",
        "parameters": {"ratio": size / 10},
        "candidate": None,
        "values": {"score": score} if done else {},
        "costs": {"size": size} if done else {},
        "violations": {"size": excess} if done else {},
        "attributes": {},
        "seconds": 0.0,
        "error": None if done else "RuntimeError: <no>",
        "feasible": done and excess <= 0,
    }


RECORD = {
    "name": "A <study>",
    "storage": None,
    "sampler": "tpe",
    "objectives": {"score": "maximize"},
    "wanted": 6,
    "trials": [
        trial(0, 0.5, 4.0),
        trial(1, 0.9, 9.0, excess=1.0),
        trial(2, 0.7, 6.0),
        trial(3, None, 1.0),
        trial(4, 0.4, 5.0),
        trial(5, 0.3, 2.0),
    ],
    "front": [2],
    "importances": {"ratio": 0.75},
}


def dots(markup: str, name: str) -> list[str]:
    return re.findall(rf'class="dot {name}"[^>]*title="trial (\d+)', markup)


def test_the_front_against_a_cost() -> None:
    markup = front_plot(RECORD, "score", "size")
    # 5 (0.3 at 2), 0 (0.5 at 4) and 2 (0.7 at 6); 4 is beaten by 0, and 1 is above the limit.
    assert dots(markup, "large") == ["0", "2", "5"]
    assert dots(markup, "small") == ["1", "4"]
    (line,) = re.findall(r'polyline class="mean" points="([^"]*)"', markup)
    across = [float(point.split(",")[0]) for point in line.split()]
    assert across == sorted(across)
    assert len(across) == 3
    assert front_plot(RECORD, "score", "nothing") == ""


def test_the_best_so_far_never_falls_and_heeds_limits() -> None:
    markup = history_plot(RECORD)
    (line,) = re.findall(r'polyline class="mean" points="([^"]*)"', markup)
    heights = [100 - float(point.split(",")[1]) for point in line.split()]
    assert heights == sorted(heights)
    assert len(set(heights)) == 2  # 0.5, then 0.7; never 0.9
    assert history_plot({**RECORD, "trials": [trial(0, None, 1.0)]}) == ""


def test_the_page(tmp_path: Path) -> None:
    path = tmp_path / "study.html"
    write_study_page(RECORD, path)
    text = path.read_text()
    assert "<h1>A &lt;study&gt;</h1>" in text
    assert "6 of 6 trials, 1 failed, 1 above a limit; drawn by tpe to make score high." in text
    assert "score against size" in text
    assert "75%" in text
    assert text.index(">2</th>") < text.index(">0</th>") < text.index(">4</th>")  # the best first
    assert not list(tmp_path.glob(".*"))
