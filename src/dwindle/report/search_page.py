"""The picture of a search: the score of every trial, the best so far, and how sensitive each axis is.

Everything is drawn from the JSON data of a search (``SearchResult.to_json()``), so a page can be made on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dwindle.report.plot import Plot

__all__ = ["Scale", "number_text", "search_plot", "sensitivity_plot", "write_body", "write_search_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><p>{sentence}</p>{body}</main></body></html>
"""


def write_search_page(
    record: Mapping[str, Any], path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Write one self-contained HTML page about a search, atomically.

    Args:
        record: What ``SearchResult.to_json()`` gave.
        path: The HTML file.
        title: Heading; the algorithm's name when left out.
    """
    best, base = record["best"], record["baseline"]
    sentence = (
        f"{len(record['curve'])} trials: score {number_text(base['score'])} of the whole model, "
        f"{number_text(best['score'])} at {best['cost'] / base['cost']:.1%} of its {record['cost']} "
        f"(budget {record['budget']:.1%})."
    )
    body = f"<h2>Trials</h2>{search_plot(record)}"
    if record.get("sensitivity"):
        body += f"<h2>Sensitivity</h2>{sensitivity_plot(record['sensitivity'])}"
    write_body(path, title or record["algorithm"], sentence, body)


def write_body(path: str | os.PathLike[str], title: str, sentence: str, body: str) -> None:
    """Write a self-contained HTML page, atomically.

    Args:
        path: The HTML file.
        title: Heading.
        sentence: What stands below it.
        body: HTML.
    """
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    text = _PAGE.format(title=escape(title), style=style, sentence=escape(sentence), body=body)
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def search_plot(record: Mapping[str, Any]) -> str:
    """Return the HTML of the trials: a dot each, a line for the best so far; empty when nothing was scored.

    Args:
        record: What ``SearchResult.to_json()`` gave.
    """
    rows = [row for row in record["curve"] if row["score"] is not None]
    if not rows:
        return ""
    whole = record["baseline"]["score"]
    scale = Scale([*(row["score"] for row in rows), whole])
    width = max(row["trial"] for row in rows)
    plot = Plot(f"Score of {len(rows)} trials, the best {number_text(record['best']['score'])}")
    for value in scale.levels():
        plot.level(scale(value), number_text(value))
    line = [
        (_across(row["trial"], width), scale(row["best"]))
        for row in record["curve"]
        if row["best"] is not None
    ]
    plot.line(line, "mean")
    for row in rows:
        words = f"trial {row['trial']}: {number_text(row['score'])} at {row['cost']:.1%}"
        fits = "" if row["fits"] else " (above the budget)"
        plot.dot((_across(row["trial"], width), scale(row["score"])), "small", words + fits)
    if line:
        plot.dot(line[-1], "large", f"best: {number_text(record['best']['score'])}")
    return plot.markup()


def sensitivity_plot(curves: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """Return the HTML of sensitivity curves: ratio from left to right, score upwards, a line an axis.

    Args:
        curves: Ratios and scores by name; a score that is None is left out.
    """
    known = {
        name: [(float(x), float(y)) for x, y in points if x is not None and y is not None]
        for name, points in curves.items()
    }
    scores = [score for points in known.values() for _, score in points]
    if not scores:
        return ""
    scale = Scale(scores)
    plot = Plot(f"Score after cutting each of {len(known)} axes alone")
    for value in scale.levels():
        plot.level(scale(value), number_text(value))
    for name, points in known.items():
        plot.line([(ratio, scale(score)) for ratio, score in points], "seed")
        for ratio, score in points:
            plot.dot((ratio, scale(score)), "small", f"{name}: {number_text(score)} without {ratio:.0%}")
    return plot.markup()


def _across(trial: int, width: int) -> float:
    """Where a trial stands between left and right."""
    return (trial - 0.5) / width


def number_text(value: float) -> str:
    """``0.123456`` as ``0.1235``."""
    return f"{value:.4g}"


class Scale:
    """Places scores between the bottom and the top.

    Args:
        values: The scores.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.low, self.high = min(values), max(values)
        if self.high == self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def __call__(self, value: float) -> float:
        """Return where a score stands."""
        return 0.05 + 0.87 * (value - self.low) / (self.high - self.low)

    def levels(self) -> list[float]:
        """Five rules from the lowest to the highest."""
        return [self.low + (self.high - self.low) * step / 4 for step in range(5)]
