"""The picture of a sensitivity analysis: a curve for each target, the most sensitive first.

Everything is drawn from JSON data (``SensitivityResult.to_json()``), so a page can be made on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dwindle.report.plot import Plot
from dwindle.report.search_page import Scale, number_text, write_body

__all__ = ["curves_plot", "write_sensitivity_page"]

_TITLES = {
    "pruning": "Pruning: the share of an axis that goes",
    "quantization": "Quantization: bits of a layer's weight and input",
    "factorization": "Factorization: the share of the full rank that stays",
}
_MOST_BITS = 8


def write_sensitivity_page(
    record: Mapping[str, Any],
    path: str | os.PathLike[str],
    title: str = "Sensitivity",
    *,
    shown: int = 12,
) -> None:
    """Write one self-contained HTML page about a sensitivity analysis, atomically.

    Args:
        record: What ``SensitivityResult.to_json()`` gave.
        path: The HTML file.
        title: Heading.
        shown: So many of the most sensitive targets of each kind get a picture of their own.
    """
    count = sum(len(target["points"]) for kind in record["kinds"] for target in kind["targets"])
    what = (
        "signal to noise of the outputs in dB, against the unchanged model"
        if record["score"] == "sqnr"
        else f"the metric, which is {number_text(record['baseline'])} for the unchanged model"
    )
    body = "".join(_section(kind, record["baseline"], shown) for kind in record["kinds"])
    if record["notes"]:
        body += f"<section><h2>Notes</h2><ul class='notes'>{_items(record['notes'])}</ul></section>"
    sentence = f"{count} points, one target compressed alone in each. Upwards: {what}. To the right: compressed more."
    write_body(path, title, sentence, body)


def curves_plot(kind: str, targets: Sequence[Mapping[str, Any]], baseline: float | None) -> str:
    """Return the HTML of curves in one field; empty when nothing has a finite score.

    Args:
        kind: ``pruning``, ``quantization`` or ``factorization``.
        targets: Entries of the record, the most sensitive first; its line is the strongest.
        baseline: The unchanged model's score, at the left edge; None where it has none.
    """
    start = [] if baseline is None else [(0.0, baseline)]
    curves = [
        start
        + [
            (_across(kind, own["level"]), own["score"])
            for own in target["points"]
            if own["score"] is not None
        ]
        for target in targets
    ]
    scores = [score for curve in curves for _, score in curve]
    if not scores:
        return ""
    scale = Scale(scores)
    plot = Plot(f"Score over {kind}, {', '.join(target['name'] for target in targets[:3])}")
    for value in scale.levels():
        plot.level(scale(value), number_text(value))
    levels = {own["level"] for target in targets for own in target["points"]}
    for level in _ticks(kind, levels):
        plot.word((_across(kind, level), 0.0), _level_text(kind, level), "stage")
    for place, (target, curve) in reversed(list(enumerate(zip(targets, curves, strict=True)))):
        plot.line([(across, scale(score)) for across, score in curve], "seed" if place else "mean")
        for own in target["points"]:
            if own["score"] is not None:
                hint = f"{target['name']}, {_level_text(kind, own['level'])}: {number_text(own['score'])}"
                plot.dot((_across(kind, own["level"]), scale(own["score"])), "small", hint)
    return plot.markup()


def _section(record: Mapping[str, Any], baseline: float | None, shown: int) -> str:
    kind, targets = record["kind"], record["targets"]
    cards = "".join(
        f"<div><h3><code>{escape(target['name'])}</code></h3>{curves_plot(kind, [target], baseline)}</div>"
        for target in targets[:shown]
    )
    rows = "".join(_row(kind, target) for target in targets)
    return (
        f"<section><h2>{_TITLES[kind]}</h2>{curves_plot(kind, targets, baseline)}"
        f'<details><summary>One by one, the most sensitive first</summary><div class="cards">{cards}</div></details>'
        f"<details open><summary>Drops</summary>"
        f'<div class="scroll"><table class="figures plain"><tbody>{rows}</tbody></table></div></details></section>'
    )


def _row(kind: str, target: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<td title="{escape(own["error"] or "")}">{_level_text(kind, own["level"])}'
        f"<small>{_drop_text(own)}</small></td>"
        for own in target["points"]
    )
    return f'<tr><th scope="row"><code>{escape(target["name"])}</code></th>{cells}</tr>'


def _drop_text(point: Mapping[str, Any]) -> str:
    return "failed" if point["drop"] is None else number_text(point["drop"])


def _items(notes: Sequence[str]) -> str:
    return "".join(f"<li>{escape(note)}</li>" for note in notes)


def _across(kind: str, level: float) -> float:
    """Where a level stands between left (unchanged) and right."""
    if kind == "quantization":
        return (_MOST_BITS + 1 - level) / (_MOST_BITS + 1)
    return level if kind == "pruning" else 1 - level


def _ticks(kind: str, levels: set[float]) -> list[float]:
    return sorted(levels) if kind == "quantization" else [0.25, 0.5, 0.75]


def _level_text(kind: str, level: float) -> str:
    return f"{level:.0f} bits" if kind == "quantization" else f"{level:.0%}"
