"""NetAdapt: round after round, the one layer goes further down whose cut costs the least score (arXiv:1804.03230).

Each round must win a part of the cost. For every variable alone the largest count is chosen that wins it, the cut model
is fine-tuned for a short time and scored; the best of them goes on to the next round, until the budget is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.counts import Counts
from dwindle.search.problem import Problem
from dwindle.search.rounds import Round, advanced
from dwindle.search.running import Outcome, Proposal, Proposals, Search
from dwindle.search.space import CostOf, Space, Variable, check_reachable
from dwindle.search.trial import Trial

__all__ = ["NetAdapt", "chosen_count", "winner"]

_PICKS = ("score", "score_per_cost")


def chosen_count(space: Space, cost: CostOf, variable: Variable, goal: float) -> Counts | None:
    """Return the counts with the most indices of one variable whose cost is at most the goal (``ChooseNumFilters``).

    Args:
        space: The variables, all whole but this one.
        cost: Falls with falling counts.
        variable: The one that is cut.
        goal: In the unit of the cost.

    Returns:
        The counts, or None where the variable cannot win as much.
    """

    def at(count: int) -> Counts:
        return space.solved({**space.full(), variable.axis: count})

    low, high = variable.least, variable.size - 1
    if low > high or cost(at(low)) > goal:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if cost(at(middle)) <= goal:
            low = middle
        else:
            high = middle - 1
    return at(low)


def winner(trials: Sequence[Trial], before: Trial, pick: str) -> Trial | None:
    """Return the best candidate of a round; None when all failed.

    Args:
        trials: The candidates.
        before: The trial of the round before.
        pick: ``"score"``: the highest score (the paper); ``"score_per_cost"``: the least score lost for the cost
            won (the authors' code).
    """
    done = [trial for trial in trials if trial.error is None]
    if not done:
        return None
    if pick == "score":
        return max(done, key=lambda trial: (trial.score, -trial.cost))
    tiny = 1e-12
    return min(done, key=lambda own: (before.score - own.score + tiny) / max(before.cost - own.cost, tiny))


@dataclass(frozen=True)
class NetAdapt:
    """Adapts a model round by round; give the problem a short ``fine_tune``.

    Attributes:
        step: Share of the whole cost that the first round wins.
        decay: Factor of that share after every round.
        pick: ``"score"`` or ``"score_per_cost"``, see :func:`winner`.
    """

    step: float = 0.05
    decay: float = 0.98
    pick: str = "score"

    def __post_init__(self) -> None:
        if not 0 < self.step < 1 or not 0 < self.decay <= 1:
            raise ConfigError(
                f"step {self.step} must lie between 0 and 1, decay {self.decay} above 0 and up to 1"
            )
        if self.pick not in _PICKS:
            raise ConfigError(
                f"pick {self.pick!r} is not one of {', '.join(_PICKS)}{did_you_mean(self.pick, _PICKS)}"
            )

    def total(self, problem: Problem) -> int | None:
        """Rounds times variables, while every variable can win its part."""
        missing, rounds, step = 1 - problem.budget.share, 0, self.step
        while missing > 1e-9 and rounds < 1000:
            missing, step, rounds = missing - step, step * self.decay, rounds + 1
        return rounds * len(problem.space.variables)

    def propose(self, search: Search) -> Proposals:
        """Go down to the budget."""
        problem = search.problem
        cost, limit = problem.cost.predicted, problem.limit
        whole = cost(problem.space.full())
        check_reachable(cost(problem.space.smallest()), limit, whole)
        here, before, step = Round(problem), search.baseline, self.step * whole
        while here.problem.cost.predicted(here.problem.space.full()) > limit:
            proposals = _candidates(here.problem, step, limit)
            trials = yield proposals
            best = winner(trials, before, self.pick)
            if best is None:
                raise ConfigError(f"every candidate of a round failed; the first with: {trials[0].error}")
            here = _next(search, here, best, proposals[trials.index(best)].counts)
            before, step = best, step * self.decay
        return Outcome(before, here.problem.model if here.plans else None, here.proofs)


def _candidates(problem: Problem, step: float, limit: float) -> list[Proposal]:
    """One proposal for each variable that can win the step; a smaller step where none can.

    Raises:
        ConfigError: No variable can be cut any more.
    """
    space, cost = problem.space, problem.cost.predicted
    now = cost(space.full())
    for _ in range(40):
        goal = max(now - step, limit)
        found = [chosen_count(space, cost, variable, goal) for variable in space.variables]
        able = [Proposal(problem, counts) for counts in found if counts is not None]
        if able:
            return able
        step /= 2
    raise ConfigError(
        f"budget: no axis can be cut further at {now:.4g} of {problem.budget.cost}, above {limit:.4g}"
    )


def _next(search: Search, here: Round, best: Trial, counts: Counts) -> Round:
    return advanced(search, here, best, "netadapt", lambda: here.problem.trained(counts, verify=True))
