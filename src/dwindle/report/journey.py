"""The picture of the way: the score after every epoch and every stage.

The scale is logarithmic in the share of wrong answers, so that the fall after pruning and the last tenths of
a percent can both be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.report.plot import Plot
from dwindle.report.summary import RunSummary
from dwindle.report.wording import percent_text

__all__ = ["journey_plot"]

_LEVELS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
_SINGLE = 3.0
"""Width of a stage without epochs, in epochs."""


@dataclass(frozen=True)
class _Part:
    """A stage on the way: its values by seed, one for each of its places."""

    label: str
    width: float
    values: tuple[tuple[float | None, ...], ...]


def journey_plot(summary: RunSummary) -> str:
    """Return the HTML of the picture, or an empty string when there are fewer than three points."""
    parts = _parts(summary)
    if sum(len(part.values[0]) for part in parts) < 3:  # two points are in the table already
        return ""
    known = [value for part in parts for seed in part.values for value in seed if value is not None]
    scale = _Scale(known, summary.samples)
    plot = Plot(_in_words(summary, parts))
    whole = sum(part.width for part in parts)
    lines: list[list[tuple[float, float]]] = [[] for _ in summary.seeds]
    mean_line: list[tuple[float, float]] = []
    left = 0.0
    labels: list[tuple[tuple[float, float], str, str]] = []
    for index, part in enumerate(parts):
        plot.band(left / whole, (left + part.width) / whole, "band even" if index % 2 == 0 else "band odd")
        labels.append((((left + part.width / 2) / whole, 1.0), part.label, "stage"))
        places = len(part.values[0])
        for place in range(places):
            x = (left + part.width * (place + 0.5) / places) / whole
            values = [seed[place] for seed in part.values]
            for line, value in zip(lines, values, strict=True):
                if value is not None:
                    line.append((x, scale(value)))
            found = [value for value in values if value is not None]
            if len(found) == len(values):
                mean_line.append((x, scale(math.fsum(found) / len(found))))
        left += part.width
    for value, text in scale.levels():
        plot.level(value, text)
    if len(lines) > 1:
        for line in lines:
            plot.line(line, "seed")
    plot.line(mean_line, "mean")
    _mark_ends(plot, parts, whole, scale)
    for point, text, name in labels:
        plot.word(point, text, name)
    return plot.markup()


def _mark_ends(plot: Plot, parts: Sequence[_Part], whole: float, scale: _Scale) -> None:
    """Dots and words at the end of every stage."""
    left = 0.0
    previous: tuple[float, float, bool] | None = None
    for part in parts:
        places = len(part.values[0])
        x = (left + part.width * (places - 0.5) / places) / whole
        ends = [seed[-1] for seed in part.values]
        found = [value for value in ends if value is not None]
        if found:
            mean = math.fsum(found) / len(found)
            if len(found) > 1:
                for value in found:
                    plot.dot((x, scale(value)), "small", percent_text(value))
            plot.dot((x, scale(mean)), "large", f"{part.label}: {percent_text(mean)}")
            y = scale(mean)
            # Above the dot, but below it where the word before stands in the way.
            crowded = previous is not None and x - previous[0] < 0.12 and abs(y - previous[1]) < 0.2
            below = y > 0.85 or (crowded and previous is not None and not previous[2])
            plot.word((min(x, 0.955), y), percent_text(mean), "value below" if below else "value above")
            previous = (x, y, below)
        left += part.width


class _Scale:
    """Places a share of right answers between 0 and 1, logarithmic in the wrong ones."""

    def __init__(self, values: Sequence[float], samples: int):
        self.floor = 0.5 / max(samples, 1)
        errors = [max(1.0 - value, self.floor) for value in values]
        high, low = math.log10(min(max(errors) * 1.25, 1.0)), math.log10(min(errors) / 1.6)
        self.high, self.low = high, low if high - low > 0.3 else high - 0.3

    def __call__(self, value: float) -> float:
        return (self.high - math.log10(max(1.0 - value, self.floor))) / (self.high - self.low)

    def levels(self) -> list[tuple[float, str]]:
        """Rules to draw, none too close to another."""
        chosen: list[tuple[float, str]] = []
        for level in _LEVELS:
            if 1.0 - level < self.floor and level < 1.0:
                continue
            y = self(level)
            if -0.001 <= y <= 0.93 and all(abs(y - other) > 0.085 for other, _ in chosen):
                chosen.append((y, f"{level * 100:g} %"))
        return chosen


def _parts(summary: RunSummary) -> list[_Part]:
    found: list[_Part] = []
    for position, record in enumerate(summary.seeds[0].stages):
        if "evaluation" not in record["result"]:
            continue
        records = [run.stages[position] for run in summary.seeds]
        values = tuple(_values(one, summary.metric) for one in records)
        if all(all(value is None for value in seed) for seed in values):
            continue
        epochs = len(values[0])
        found.append(_Part(record["label"], _SINGLE if epochs == 1 else max(float(epochs), _SINGLE), values))
    return found


def _values(record: Mapping[str, Any], metric: str) -> tuple[float | None, ...]:
    """The score after each epoch of a stage; its end is the stage's own evaluation."""
    result = record["result"]
    end = result["evaluation"][metric]
    if record["kind"] == "original" and metric == "agreement":
        end = 1.0
    epochs = [entry["metric"] for entry in result.get("curve", [])]
    return (*epochs[:-1], end)


def _in_words(summary: RunSummary, parts: Sequence[_Part]) -> str:
    ends = []
    for part in parts:
        values = [seed[-1] for seed in part.values if seed[-1] is not None]
        if values:
            ends.append(f"{part.label} {percent_text(math.fsum(values) / len(values))}")
    return f"{summary.metric.capitalize()} after every stage: {', '.join(ends)}"
