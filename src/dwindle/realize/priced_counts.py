"""How many indices of each axis stay when what goes should be worth little and cost much.

One ranking of all indices by importance per unit of the target's cost: the greedy answer to a knapsack. What an index
costs depends on how many the other axes still have, so indices go in stages and the prices are taken anew before each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dwindle.graph.analysis import AxisInfo
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts, CountSolver, Multiple
from dwindle.realize.choose import TARGET_TOLERANCE
from dwindle.realize.cost import CostModel

#: In so many stages of equal factors the cost falls to its goal.
_STAGES = 25

#: The goal of the ranking is moved so often, because constraints and rounding move the counts.
_TRIES = 12


def counts_by_price(
    infos: Sequence[AxisInfo],
    scores: Mapping[Axis, Tensor],
    solver: CountSolver,
    cost: CostModel,
    name: str,
    share: float,
    multiple: Multiple,
    least: Mapping[Axis, int],
) -> Counts | None:
    """Return solved counts whose cost is ``share`` of the full one; None when no stage comes within the tolerance.

    Args:
        infos: The axes that may shrink.
        scores: Importance of their indices, in one unit for all axes.
        solver: Constraints between counts.
        cost: Of the model.
        name: ``macs``, ``params`` or ``bytes``.
        share: Of the full cost that stays.
        multiple: Counts become a multiple of it.
        least: Counts that no axis falls below.
    """
    goal = share * cost.cost(name, {})
    aim, best, gap = goal, None, float("inf")
    for _ in range(_TRIES):
        counts = solver.solve(_ranked(infos, scores, cost, name, aim, least), multiple)
        reached = cost.cost(name, counts)
        if abs(reached - goal) < gap:
            best, gap = counts, abs(reached - goal)
        if gap <= TARGET_TOLERANCE / 4 * goal:
            break
        aim *= goal / reached
    return best if gap <= TARGET_TOLERANCE * goal else None


def _ranked(
    infos: Sequence[AxisInfo],
    scores: Mapping[Axis, Tensor],
    cost: CostModel,
    name: str,
    goal: float,
    least: Mapping[Axis, int],
) -> Counts:
    """Take indices away, the least important for its price first, until the cost is at the goal."""
    rising = {info.axis: scores[info.axis].sort().values for info in infos}
    counts = {info.axis: info.size for info in infos}
    full = cost.cost(name, counts)
    for stage in range(1, _STAGES + 1):
        aim = full * (goal / full) ** (stage / _STAGES)
        while (excess := cost.cost(name, counts) - aim) > 0:
            able = [info for info in infos if counts[info.axis] > least[info.axis]]
            if not able:
                return counts
            _remove(
                able, counts, rising, cost.prices(name, counts, [info.axis for info in able]), excess, least
            )
    return counts


def _remove(
    able: Sequence[AxisInfo],
    counts: Counts,
    rising: Mapping[Axis, Tensor],
    prices: Mapping[Axis, float],
    excess: float,
    least: Mapping[Axis, int],
) -> None:
    """Take away what the prices say is enough for the excess, at least one index; changes ``counts``."""
    values, costs, owners = [], [], []
    for number, info in enumerate(able):
        gone, last = info.size - counts[info.axis], info.size - least[info.axis]
        own = rising[info.axis][gone:last]
        price = max(prices[info.axis], torch.finfo(torch.float64).tiny)
        values.append(own / price)
        costs.append(torch.full_like(own, price))
        owners.append(torch.full((len(own),), number))
    order = torch.cat(values).argsort(stable=True)
    saved = torch.cat(costs)[order].cumsum(0)
    enough = int((saved < excess).sum()) + 1
    removed = torch.bincount(torch.cat(owners)[order[:enough]], minlength=len(able)).tolist()
    for info, number in zip(able, removed, strict=True):
        counts[info.axis] -= number
