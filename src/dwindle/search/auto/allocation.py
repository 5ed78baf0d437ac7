"""How many indices of each axis stay within limits, so that as little as possible is lost: greedy, then exact to size.

The knapsack of pruning: taking indices of an axis harms the outputs by some amount and saves some cost. Axes shrink
step by step, each time the one that harms least for what it saves, at widths the runtime is fast at, until all limits
hold; indices that fit again are given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.search.space import Space, Variable

__all__ = ["Harm", "greedy_counts", "importance_harm", "scaled_counts", "uniform_counts"]

Harm = Callable[[Variable, int], float]
"""What it costs in quality to keep only so many indices of an axis, in one unit for all axes; 0 for all of them."""

Over = Callable[[Counts], Sequence[float]]
"""For counts: of each limit the predicted cost over what is allowed; all at most 1 is within the budget."""

#: Steps that an axis goes down in, where nothing says which widths the runtime likes.
_STEPS = 24

#: So many steps down are looked at, to see behind a plateau of the runtime.
_LOOK = 6

#: Ratios of the scaled allocation are tried in so many equal steps.
_SCALES = 40


def importance_harm(scores: Mapping[Axis, Tensor]) -> Harm:
    """Return the harm as the sum of the importances of what goes, the least important first.

    Args:
        scores: Importance of each index, in one unit for all axes.
    """
    sums = {axis: values.sort().values.clamp(min=0).cumsum(0).tolist() for axis, values in scores.items()}

    def harm(variable: Variable, count: int) -> float:
        gone = variable.size - count
        return float(sums[variable.axis][gone - 1]) if gone > 0 else 0.0

    return harm


def greedy_counts(
    space: Space, harm: Harm, over: Over, widths: Mapping[str, Sequence[int]] | None = None
) -> Counts | None:
    """Return counts within all limits; None where no more steps save anything and they are still above.

    The smallest model of a space need not be the fastest: runtimes may take longer over 3 channels than over 8.

    Args:
        space: The axes.
        harm: Of keeping few indices of one axis.
        over: Says by how much counts are above the limits.
        widths: Counts that the runtime likes, by the variable's name, in any order; None or missing: steps of about
            4 % of the size.
    """
    steps = {v.name: _steps(space, v, (widths or {}).get(v.name)) for v in space.variables}
    counts = space.full()
    ratios = list(over(counts))
    while max(ratios) > 1:
        best: tuple[float, float] | None = None
        chosen: tuple[Counts, list[float]] | None = None
        for variable in space.variables:
            lower = [width for width in steps[variable.name] if width < counts[variable.axis]]
            # a plateau of the runtime is passed in one go
            for width in lower[:_LOOK]:
                moved = space.solved({**counts, variable.axis: width})
                if moved[variable.axis] >= counts[variable.axis]:
                    continue
                now = list(over(moved))
                saved = sum(max(a, 1.0) - max(b, 1.0) for a, b in zip(ratios, now, strict=True))
                lost = sum(harm(v, moved[v.axis]) - harm(v, counts[v.axis]) for v in space.variables)
                rank = (max(lost, 0.0) / saved, lost) if saved > 1e-9 else None
                if rank is not None and (best is None or rank < best):
                    best, chosen = rank, (moved, now)
        if chosen is None:
            return None
        counts, ratios = chosen
    return _refilled(space, counts, harm, over, steps)


def scaled_counts(
    space: Space,
    ratios: Mapping[str, float],
    over: Over,
    widths: Mapping[str, Sequence[int]] | None = None,
) -> Counts | None:
    """Return counts of ratios in proportion to the given ones, the smallest within all limits; None where none are.

    Counts are tried as they come, and moved to the nearest widths that the runtime likes.

    Args:
        space: The axes.
        ratios: What each axis loses in proportion, by name; equal ones are uniform pruning.
        over: Says by how much counts are above the limits.
        widths: Counts that the runtime likes, by the variable's name.
    """
    able = {v.name: ratios.get(v.name, 0.0) for v in space.variables if ratios.get(v.name, 0.0) > 0}
    if not able:
        return None
    largest = max(able.values())
    # on until all are at the most they may lose: the axis that loses most does not hold up the others
    for step in range(1, math.ceil(_SCALES * largest / min(able.values())) + 1):
        scale = step / _SCALES / largest
        wanted = {v.name: min(ratios.get(v.name, 0.0) * scale, v.largest_ratio) for v in space.variables}
        plain = space.counts(wanted)
        liked = {v.axis: _nearest(plain[v.axis], (widths or {}).get(v.name), v) for v in space.variables}
        for counts in (space.solved(liked), plain):
            if max(over(counts)) <= 1:
                return counts
    return None


def uniform_counts(
    space: Space, over: Over, widths: Mapping[str, Sequence[int]] | None = None
) -> Counts | None:
    """Return counts of equal ratios within all limits: the largest that fit; None where none do."""
    return scaled_counts(space, {v.name: 1.0 for v in space.variables}, over, widths)


def _nearest(count: int, liked: Sequence[int] | None, variable: Variable) -> int:
    """Return the nearest width that the runtime likes; multiples of 8 where nothing is known."""
    able = [own for own in liked or range(8, variable.size + 1, 8) if variable.least <= own <= variable.size]
    return min(able, key=lambda own: (abs(own - count), own), default=count)


def _steps(space: Space, variable: Variable, liked: Sequence[int] | None) -> list[int]:
    """Return widths of a variable below its size, the widest first."""
    if liked:
        found = {min(max(width, variable.least), variable.size) for width in liked}
    else:
        step = max(1, variable.size // _STEPS, space.round_to)
        found = set(range(variable.size, variable.least, -step))
    return sorted(found | {variable.least}, reverse=True)


def _refilled(
    space: Space, counts: Counts, harm: Harm, over: Over, steps: Mapping[str, Sequence[int]]
) -> Counts:
    """Give steps back where they fit, the one whose absence harms most first."""
    while True:
        best: tuple[float, Counts] | None = None
        for variable in space.variables:
            higher = [width for width in steps[variable.name] if width > counts[variable.axis]]
            if not higher:
                continue
            moved = space.solved({**counts, variable.axis: higher[-1]})
            gain = sum(harm(v, counts[v.axis]) - harm(v, moved[v.axis]) for v in space.variables)
            if gain > 0 and (best is None or gain > best[0]) and max(over(moved)) <= 1:
                best = (gain, moved)
        if best is None:
            return counts
        counts = best[1]
