"""How many indices of each axis stay within limits, so that as little as possible is lost: greedy, then exact to size.

The knapsack of pruning: taking indices of an axis harms the outputs by some amount and saves some cost. Axes shrink
step by step, each time the one that harms least for what it saves, at widths the runtime is fast at, until all limits
hold; indices that fit again are given back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.search.space import Space, Variable

__all__ = ["Harm", "greedy_counts", "importance_harm", "uniform_counts"]

Harm = Callable[[Variable, int], float]
"""What it costs in quality to keep only so many indices of an axis, in one unit for all axes; 0 for all of them."""

Over = Callable[[Counts], Sequence[float]]
"""For counts: of each limit the predicted cost over what is allowed; all at most 1 is within the budget."""

#: Steps that an axis goes down in, where nothing says which widths the runtime likes.
_STEPS = 24


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
    """Return counts within all limits; None where the smallest model of the space is not within them.

    Args:
        space: The axes.
        harm: Of keeping few indices of one axis.
        over: Says by how much counts are above the limits.
        widths: Counts that the runtime likes, by the variable's name, in any order; None or missing: steps of about
            4 % of the size.
    """
    if max(over(space.smallest())) > 1:
        return None
    steps = {v.name: _steps(space, v, (widths or {}).get(v.name)) for v in space.variables}
    counts = space.full()
    ratios = list(over(counts))
    while max(ratios) > 1:
        best: tuple[float, float] | None = None
        chosen: tuple[Counts, list[float]] | None = None
        for variable in space.variables:
            lower = [width for width in steps[variable.name] if width < counts[variable.axis]]
            # a plateau of the runtime is passed in one go: up to three steps down are looked at
            for width in lower[:3]:
                moved = space.solved({**counts, variable.axis: width})
                if moved[variable.axis] >= counts[variable.axis]:
                    continue
                now = list(over(moved))
                saved = sum(max(a, 1.0) - max(b, 1.0) for a, b in zip(ratios, now, strict=True))
                lost = sum(harm(v, moved[v.axis]) - harm(v, counts[v.axis]) for v in space.variables)
                rank = (max(lost, 0.0) / saved, lost) if saved > 1e-9 else (float("inf"), lost)
                if best is None or rank < best:
                    best, chosen = rank, (moved, now)
        if chosen is None:
            return space.smallest()
        counts, ratios = chosen
    return _refilled(space, counts, harm, over, steps)


def uniform_counts(space: Space, over: Over) -> Counts | None:
    """Return counts of equal ratios within all limits: the largest that fit; None where none do."""
    if max(over(space.smallest())) > 1:
        return None
    low, high = 0.0, 1.0
    best = space.smallest()
    for _ in range(16):
        ratio = (low + high) / 2
        counts = space.counts({v.name: min(ratio, v.largest_ratio) for v in space.variables})
        if max(over(counts)) <= 1:
            high, best = ratio, counts
        else:
            low = ratio
    return best


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
