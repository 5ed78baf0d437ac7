"""How much each parameter of a study mattered, from the finished trials alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = ["importances"]

_MOST_GROUPS = 4
_FEWEST_IN_GROUP = 5


def importances(parameters: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Return by parameter the share of the values' variance that it explains by itself.

    Trials are grouped by the parameter (numbers into up to four groups of equal size), and what groups differ by is
    compared with what chance would give: Kelley's epsilon squared, ``1 - (within / (n - k)) / (total / (n - 1))``, not
    below 0. What two parameters do together is not seen.

    Args:
        parameters: Of each trial; a parameter that a trial does not have counts as a value of its own.
        values: Of each trial.
    """
    total = _squares(values)
    names = dict.fromkeys(name for own in parameters for name in own)
    if len(values) < 2 * _FEWEST_IN_GROUP or total == 0.0:
        return {}
    found = {}
    for name in names:
        groups = [
            [values[place] for place in group] for group in _groups([own.get(name) for own in parameters])
        ]
        if 1 < len(groups) < len(values):
            within = sum(map(_squares, groups)) / (len(values) - len(groups))
            found[name] = max(0.0, 1.0 - within / (total / (len(values) - 1)))
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _groups(column: Sequence[Any]) -> list[list[int]]:
    """Places of trials that are alike in one parameter."""
    numbers = [
        place
        for place, own in enumerate(column)
        if isinstance(own, int | float) and not isinstance(own, bool)
    ]
    by_value: dict[Any, list[int]] = {}
    for place, own in enumerate(column):
        by_value.setdefault(own, []).append(place)
    if len(numbers) < len(column) or len(by_value) <= _MOST_GROUPS:
        few = {value: own for value, own in by_value.items() if not isinstance(value, int | float)}
        if len(numbers) < len(column) and len(by_value) > _MOST_GROUPS and numbers:
            return [*few.values(), *_equal(column, numbers)]
        return list(by_value.values())
    return _equal(column, numbers)


def _equal(column: Sequence[Any], places: Sequence[int]) -> list[list[int]]:
    """Groups of about the same size, by rising numbers."""
    count = max(1, min(_MOST_GROUPS, len(places) // _FEWEST_IN_GROUP))
    ordered = sorted(places, key=lambda place: (column[place], place))
    edges = [round(len(ordered) * step / count) for step in range(count + 1)]
    return [ordered[low:high] for low, high in itertools.pairwise(edges)]


def _squares(values: Sequence[float]) -> float:
    """Sum of squared distances from the mean."""
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)
