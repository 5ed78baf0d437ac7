"""Ratios guided by sensitivity: every variable is cut alone, and all get the ratio that costs them the same score.

The analysis is that of Li et al. (arXiv:1608.08710, section 3.2): the score after each variable alone is cut to each
ratio. The ratios of the budget follow from it: one tolerated drop for all, found by bisection, so that sensitive
variables are cut little and the others much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dwindle.config.errors import ConfigError
from dwindle.graph.counts import Counts
from dwindle.search.problem import Problem
from dwindle.search.running import Outcome, Proposal, Proposals, Search, best_of
from dwindle.search.trial import Point

__all__ = ["Sensitivity", "ratio_at_drop"]


def ratio_at_drop(curve: Sequence[Point], drop: float, top: float) -> float:
    """Return the largest ratio whose drop of the score is tolerated.

    Between measured ratios the drop is interpolated on straight lines; it never falls as the ratio grows (of a
    curve that recovers, the larger drop before counts).

    Args:
        curve: Ratios in rising order, with the score at each; the first is the uncut model at ratio 0.
        drop: What the score may fall by.
        top: The largest ratio that is allowed.
    """
    start = curve[0][1]
    last_ratio, last_drop = 0.0, 0.0
    for ratio, score in curve[1:]:
        here = max(start - score, last_drop)
        if here > drop:
            reach = last_ratio + (ratio - last_ratio) * (drop - last_drop) / (here - last_drop)
            return min(max(reach, 0.0), top)
        last_ratio, last_drop = ratio, here
    return min(last_ratio, top)


@dataclass(frozen=True)
class Sensitivity:
    """Measures sensitivity, then fits ratios of equal drop to the budget.

    Attributes:
        steps: Ratios that each variable is cut to, as shares of its largest.
        stop_drop: A variable is not cut further once the score has fallen by more than this (early stop); None
            measures every step.
    """

    steps: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    stop_drop: float | None = None

    def __post_init__(self) -> None:
        if (
            not self.steps
            or list(self.steps) != sorted(set(self.steps))
            or not 0 < self.steps[0] <= self.steps[-1] <= 1
        ):
            raise ConfigError(f"steps must be rising shares above 0 and up to 1, got {self.steps}")
        if self.stop_drop is not None and self.stop_drop < 0:
            raise ConfigError(f"stop_drop {self.stop_drop} is negative")

    def total(self, problem: Problem) -> int | None:
        """One trial a variable and step, and the last one."""
        return len(problem.space.variables) * len(self.steps) + 1

    def propose(self, search: Search) -> Proposals:
        """Cut every variable alone, step by step, then all by the same drop."""
        problem, space = search.problem, search.problem.space
        curves: dict[str, list[Point]] = {v.name: [(0.0, search.baseline.score)] for v in space.variables}
        for step in self.steps:
            going = [
                variable
                for variable in space.variables
                if self.stop_drop is None
                or search.baseline.score - curves[variable.name][-1][1] <= self.stop_drop
            ]
            proposals = [Proposal(problem, space.counts({v.name: step * v.largest_ratio})) for v in going]
            trials = yield proposals
            for variable, trial in zip(going, trials, strict=True):
                ratio = trial.ratios[variable.name]
                if ratio > curves[variable.name][-1][0]:
                    curves[variable.name].append((ratio, trial.score))
        counts = fitted(problem, curves)
        trials = yield [Proposal(problem, counts)]
        return Outcome(best_of(trials, problem))


def fitted(problem: Problem, curves: Mapping[str, Sequence[Point]]) -> Counts:
    """Return counts of equal drop that meet the budget.

    Args:
        problem: The model and its budget.
        curves: Ratios and scores of every variable.
    """
    space = problem.space
    tops = {variable.name: variable.largest_ratio for variable in space.variables}
    drops = [max(curve[0][1] - score, 0.0) for curve in curves.values() for _, score in curve]
    low, high = 0.0, max((drop for drop in drops if drop < float("inf")), default=0.0)

    def ratios(drop: float) -> dict[str, float]:
        return {name: ratio_at_drop(curve, drop, tops[name]) for name, curve in curves.items()}

    for _ in range(40):
        middle = (low + high) / 2
        if problem.cost.predicted(space.counts(ratios(middle))) <= problem.limit:
            high = middle
        else:
            low = middle
    return space.fit(ratios(high), problem.cost.predicted, problem.limit)
