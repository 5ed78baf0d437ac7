"""Which indices of each axis stay: scores from all coupled parameters, and the ratio or target they must meet."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import AxisInfo
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts, CountSolver, Multiple, multiple_of
from dwindle.pruning.axis_importance import AxisImportance
from dwindle.pruning.shared_axes import SharedAxis
from dwindle.realize.cost import CostModel

#: How near a target a prune must come.
TARGET_TOLERANCE = 0.02


def scores_by_axis(
    axes: Sequence[SharedAxis], tensors: Mapping[str, torch.Tensor], importance: AxisImportance
) -> dict[Axis, torch.Tensor]:
    """Return the importance of each index of each axis, float64 on the CPU.

    Args:
        axes: The axes.
        tensors: Parameter values by name; parameters that are missing have no say.
        importance: Has measured what it needs.
    """
    return {cast(Axis, axis.key): importance.of_axis(axis, tensors) for axis in axes}


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern names a module or parameter: itself, or a module around it."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def ratio_of(info: AxisInfo, ratio: float, by_name: Mapping[str, float]) -> float:
    """Return the ratio for one axis: the first pattern that matches one of its parameters, else the general one."""
    for pattern, own in by_name.items():
        if any(is_named(name, pattern) for name, _ in info.parameter_dims):
            return own
    return ratio


def local_counts(
    infos: list[AxisInfo], ratio: float, by_name: Mapping[str, float], minimum: int = 1
) -> Counts:
    """Every axis keeps the same share of its indices (halves are rounded up), and no fewer than ``minimum``."""
    return {
        info.axis: max(min(minimum, info.size), int(info.size * (1 - ratio_of(info, ratio, by_name)) + 0.5))
        for info in infos
    }


def global_counts(
    infos: list[AxisInfo],
    ratio: float,
    scores: Mapping[Axis, torch.Tensor],
    largest_ratio: float,
    minimum: int = 1,
) -> Counts:
    """One threshold for all axes: the least important share of all indices goes, wherever it lies."""
    if not infos:
        return {}
    every = torch.cat([scores[info.axis] for info in infos])
    count = min(int(every.numel() * ratio), every.numel() - 1)
    threshold = every.sort().values[count]
    counts = {}
    for info in infos:
        kept = int((scores[info.axis] >= threshold).sum())
        counts[info.axis] = max(kept, fewest(info, largest_ratio, minimum))
    return counts


def fewest(info: AxisInfo, largest_ratio: float, minimum: int) -> int:
    """Return how many indices of an axis stay at least."""
    return max(min(minimum, info.size), int(info.size * (1 - largest_ratio) + 0.5))


def counts_for_target(
    counts_at: Callable[[float], Counts],
    solver: CountSolver,
    cost: CostModel,
    name: str,
    share: float,
    multiple: Multiple,
) -> Counts:
    """Return solved counts whose cost is ``share`` of the full one, within the tolerance.

    The ratio is found by bisection; what the rounding of single axes leaves over is closed by moving axes from
    the larger to the smaller of the two neighbouring solutions, one by one.

    Raises:
        ConfigError: The target cannot be reached, with the range that can.
    """
    full = cost.cost(name, {})
    goal = share * full
    lowest = solver.solve(counts_at(1.0), multiple)
    if cost.cost(name, lowest) > goal * (1 + TARGET_TOLERANCE):
        reachable = cost.cost(name, lowest) / full
        raise ConfigError(
            f"target: {name} = {share:g} cannot be reached; the axes that may shrink allow no less than {reachable:.3f}"
        )
    low, high = 0.0, 1.0
    small = lowest
    for _ in range(30):
        middle = (low + high) / 2
        counts = solver.solve(counts_at(middle), multiple)
        if cost.cost(name, counts) > goal:
            low = middle
        else:
            high, small = middle, counts
        if abs(cost.cost(name, counts) - goal) <= 0.002 * goal:
            return counts
    best = _by_free_axes(small, solver, cost, name, goal, multiple)
    if abs(cost.cost(name, best) - goal) > TARGET_TOLERANCE * goal:
        best = _axis_by_axis(best, solver, cost, name, goal, multiple)
    return best


def _by_free_axes(
    small: Counts, solver: CountSolver, cost: CostModel, name: str, goal: float, multiple: Multiple
) -> Counts:
    """Widen the axes that no constraint binds, all by the same share, as far as the goal allows.

    Bound axes move in steps (a whole head of every layer); the free ones can close what a step leaves over.
    """
    bound = {leaf for constraint in solver.constraints for leaf in constraint.leaves}
    free = [leaf for leaf in small if leaf not in bound]
    low, high = 0.0, 1.0
    best = dict(small)
    for _ in range(24 if free else 0):
        share = (low + high) / 2
        trial = dict(small)
        for leaf in free:
            wider = small[leaf] + int((leaf.size - small[leaf]) * share + 0.5)
            over = wider % multiple_of(multiple, leaf)
            trial[leaf] = wider if wider == leaf.size else max(small[leaf], wider - over)
        if cost.cost(name, trial) <= goal:
            low, best = share, trial
        else:
            high = share
    return best


def _axis_by_axis(
    counts: Counts, solver: CountSolver, cost: CostModel, name: str, goal: float, multiple: Multiple
) -> Counts:
    """Give indices back to one axis after another, as long as the cost stays below the goal."""
    best = dict(counts)
    for leaf in sorted(best, key=lambda axis: -axis.size):
        low, high = best[leaf], leaf.size
        while low < high:
            middle = (low + high + 1) // 2
            trial = solver.solve({**best, leaf: middle}, multiple)
            if cost.cost(name, trial) <= goal * (1 + TARGET_TOLERANCE / 2):
                low = middle
            else:
                high = middle - 1
        best = solver.solve({**best, leaf: low}, multiple)
        if abs(cost.cost(name, best) - goal) <= TARGET_TOLERANCE / 2 * goal:
            break
    return best


def best_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a boolean mask of the ``count`` highest scores (the earlier index wins a tie)."""
    order = torch.argsort(scores, descending=True, stable=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


def check_name(value: str, choices: list[str], argument: str) -> str:
    """Return ``value`` when it is one of ``choices``.

    Raises:
        ConfigError: Naming the argument and the nearest choice.
    """
    if value not in choices:
        raise ConfigError(
            f"{argument}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    return value
