"""Sizes of an exported file as functions of the counts of axes, found by comparing exports of differently cut models.

No operator is known here. A number in a file that is 64 in one export and 40 in another, where exactly one axis of the
model went from 64 to 40, is the count of that axis. Exports are cut so that different axes differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dwindle.config.errors import ConfigError
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import PRODUCT, Axis
from dwindle.graph.counts import Counts, count_of

__all__ = ["Size", "SizeMatcher", "every_axis"]


@dataclass(frozen=True, slots=True)
class Size:
    """A number of a file.

    Attributes:
        full: Its value in the whole model.
        axis: The axis that it follows; None for a number that never changes.
        scale: How many there are for each index of the axis.
    """

    full: int
    axis: Axis | None = None
    scale: Fraction = Fraction(1)

    def at(self, counts: Mapping[Axis, float]) -> int:
        """Return its value under counts."""
        return self.full if self.axis is None else round(self.scale * Fraction(value_of(self.axis, counts)))


def value_of(axis: Axis, counts: Mapping[Axis, float]) -> float:
    """Return the size of an axis, where inner axes may have counts of their own too."""
    axis = axis.find()
    if axis in counts:
        return counts[axis]
    if not axis.parts:
        return axis.size
    parts = [value_of(part, counts) for part in axis.parts]
    if axis.kind == PRODUCT:
        result: float = 1
        for part in parts:
            result *= part
        return result
    return parts[0] if axis.kind == "parallel" else sum(parts)


def every_axis(analysis: Analysis) -> list[Axis]:
    """Return each axis that a tensor of the model has, once."""
    found: dict[Axis, None] = {}
    for axes in analysis.parameter_axes.values():
        found.update((axis.find(), None) for axis in axes)
    for node in analysis.trace.nodes:
        for value in (*node.inputs(), *node.outputs):
            found.update((axis.find(), None) for axis in value.axes)
    return list(found)


class SizeMatcher:
    """Finds the axis behind a number, from its values in several exports.

    Args:
        axes: The axes that there are.
        exports: Counts of each export, the whole model first.
        checks: Further counts, which tell axes apart that are always equal from those that are not.
    """

    def __init__(self, axes: Iterable[Axis], exports: Sequence[Counts], checks: Sequence[Counts]) -> None:
        self.by_values: dict[tuple[int, ...], Axis] = {}
        self.by_ratio: dict[tuple[Fraction, ...], Axis] = {}
        self.ambiguous: list[tuple[Axis, Axis]] = []
        self.changing = {
            leaf.find()
            for counts in exports
            for leaf in counts
            if len({count_of(leaf, own) for own in exports}) > 1
        }
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        for axis in axes:
            values = tuple(count_of(axis, counts) for counts in exports)
            further = tuple(count_of(axis, counts) for counts in checks)
            if len(set(values)) == 1:
                if len(set(values + further)) > 1:
                    self.ambiguous.append((axis, axis))
                continue
            if known.setdefault(values, further) != further:
                self.ambiguous.append((axis, self.by_values[values]))
            self.by_values.setdefault(values, axis)
            self.by_ratio.setdefault(tuple(Fraction(value, values[0]) for value in values), axis)

    def size(self, values: Sequence[int], what: str) -> Size:
        """Return the size that has these values in the exports.

        Args:
            values: One an export.
            what: Where the number stands, for messages.

        Raises:
            ConfigError: No axis explains them.
        """
        full = int(values[0])
        if len(set(values)) == 1:
            return Size(full)
        axis = self.by_values.get(tuple(map(int, values)))
        if axis is not None:
            return Size(full, axis)
        axis = self.by_ratio.get(tuple(Fraction(int(value), full) for value in values)) if full else None
        if axis is None:
            raise ConfigError(f"{what} is {list(values)} in differently cut models, which no axis explains")
        return Size(full, axis, Fraction(full, axis.size))
