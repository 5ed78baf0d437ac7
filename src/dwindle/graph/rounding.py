"""From "sizes that are a multiple of 8" to the steps in which the count of each axis moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dwindle.graph.structures import LEAF, PRODUCT, Axis, factors

if TYPE_CHECKING:
    from dwindle.graph.analysis import Analysis


def count_steps(analysis: Analysis, multiple: int) -> dict[Axis, int]:
    """Return for each axis the number of which its count must be a multiple, so that sizes of weights are too.

    What a kernel sees is the size of a weight's dimension. Where an axis is one factor of it, the others count: heads
    of width 64 give a multiple of 8 for any number of heads. Heads that also stand alone somewhere (a table of biases
    by head) are rounded by their products only, since no kernel works on them alone.

    Args:
        analysis: The axes.
        multiple: Of what sizes shall be a multiple.
    """
    if multiple == 1:
        return {}
    found: dict[Axis, set[int]] = {}
    for name, axes in analysis.parameter_axes.items():
        if analysis.trace.parameters[name].is_floating and len(axes) >= 2:
            for axis in axes:
                _gather(axis.find(), 1, found)
    steps = {}
    for leaf, others in found.items():
        info = analysis.by_axis.get(leaf)
        if info is not None and info.kind == "heads":
            others = others - {1} or others
        steps[leaf] = math.lcm(*(multiple // math.gcd(multiple, other) for other in others))
    return steps


def _gather(axis: Axis, others: int, found: dict[Axis, set[int]]) -> None:
    """Note for each leaf by what its size is multiplied where it stands."""
    if axis.kind == LEAF:
        found.setdefault(axis, set()).add(others)
        return
    parts = factors(axis) if axis.kind == PRODUCT else axis.parts
    for part in parts:
        beside = axis.size // part.size if axis.kind == PRODUCT else 1
        _gather(part.find(), others * beside, found)
