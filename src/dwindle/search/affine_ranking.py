"""LeGR: one global ranking of all channels, after an affine transformation of each layer's scores that is learned.

Chin et al., "Towards Efficient Model Compression via Learned Global Ranking", arXiv:1904.12368: channel ``i`` of layer
``l`` ranks by ``alpha_l * |w_i|^2 + kappa_l``; the least of all go until the budget is met; ``alpha`` and ``kappa`` are
found by regularized evolution (the oldest dies), each candidate scored after a short fine-tuning.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dwindle.config.errors import ConfigError
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.pruning.axis_importance import WeightImportance
from dwindle.search.problem import Problem
from dwindle.search.running import Outcome, Proposal, Proposals, Search, best_of
from dwindle.search.space import CostOf, Space, Variable, check_reachable
from dwindle.search.trial import Trial

__all__ = ["LeGR", "affine_scores", "global_counts", "mutated"]

#: ``(alpha, kappa)`` of every variable, by name.
Affine = dict[str, tuple[float, float]]


def affine_scores(norms: Mapping[str, torch.Tensor], affine: Affine) -> dict[str, torch.Tensor]:
    """Return ``alpha * norm + kappa`` for every channel of every variable (equation 1 of the paper).

    Args:
        norms: Squared L2 norms of the channels, ``[size]`` each.
        affine: ``alpha`` (at least 0, so that the order within a variable stays) and ``kappa``.
    """
    return {name: affine[name][0] * values + affine[name][1] for name, values in norms.items()}


def global_counts(space: Space, scores: Mapping[str, torch.Tensor], cost: CostOf, budget: float) -> Counts:
    """Remove the channels with the lowest scores of all until the budget is met, and no fewer than each one's least.

    What the last channel leaves over is given back to the removed channels with the highest scores that fit.

    Args:
        space: The variables.
        scores: ``[size]`` by name, ranked across all variables.
        cost: Falls with falling counts.
        budget: In the unit of the cost.

    Raises:
        ConfigError: The budget cannot be reached.
    """
    check_reachable(cost(space.smallest()), budget, cost(space.full()))
    every = torch.cat([scores[variable.name] for variable in space.variables]).sort().values

    def at(gone: int) -> Counts:
        threshold = every[gone - 1] if gone else -math.inf
        return space.solved(
            {v.axis: max(v.least, int((scores[v.name] > threshold).sum())) for v in space.variables}
        )

    low, high = 0, every.numel()  # the whole model is above the budget, everything removed is within it
    if cost(at(0)) <= budget:
        return space.full()
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(at(middle)) <= budget else (middle, high)
    ranked = {name: values.sort(descending=True).values.tolist() for name, values in scores.items()}

    def first(variable: Variable, counts: Counts) -> float:
        """The next channel to come back is the removed one with the highest score."""
        kept = counts[variable.axis]
        return -ranked[variable.name][kept] if kept < variable.size else math.inf

    return space.filled(at(high), cost, budget, first)


def mutated(
    parent: Affine, deviations: Mapping[str, float], share: float, step: float, chance: random.Random
) -> Affine:
    """Change a share of the variables: ``alpha`` by a log-normal factor, ``kappa`` by a normal shift.

    Args:
        parent: What is changed.
        deviations: Standard deviation of the shift of each variable: that of its norms.
        share: Share of the variables that change, at least one.
        step: Standard deviation of the logarithm of the factor.
        chance: The random generator.
    """
    names = sorted(parent)
    changed = chance.sample(names, max(1, round(share * len(names))))
    child = dict(parent)
    for name in changed:
        alpha, kappa = parent[name]
        child[name] = (alpha * math.exp(chance.gauss(0, step)), kappa + chance.gauss(0, deviations[name]))
    return child


@dataclass(frozen=True)
class LeGR:
    """Learns a global ranking by regularized evolution; defaults are the paper's.

    Norms are taken over all weights that share an axis, each weight's divided by their mean (which ``alpha`` absorbs).

    Attributes:
        generations: Candidates in all.
        population: Candidates alive at a time; the first ones are random, one of them is the plain ranking.
        samples: Candidates of a tournament, the best of which is the next parent.
        mutation_share: Share of the variables that a mutation changes.
        sigma: Standard deviation of the logarithm of ``alpha``'s factor at the start.
        seed: Of the random generator.
    """

    generations: int = 400
    population: int = 64
    samples: int = 16
    mutation_share: float = 0.1
    sigma: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= self.population <= self.generations:
            raise ConfigError(
                f"samples {self.samples}, population {self.population} and generations {self.generations} must be "
                "rising numbers of at least 1"
            )
        if not 0 < self.mutation_share <= 1 or self.sigma <= 0:
            raise ConfigError("mutation_share must lie above 0 and up to 1, sigma above 0")

    def total(self, problem: Problem) -> int | None:
        """One trial a candidate."""
        return self.generations

    def propose(self, search: Search) -> Proposals:
        """Let candidates evolve."""
        problem = search.problem
        chance = random.Random(self.seed)
        norms = squared_norms(problem)
        deviations = {name: float(values.std(correction=0)) for name, values in norms.items()}
        plain: Affine = {name: (1.0, 0.0) for name in norms}
        alive: deque[tuple[Affine, Trial]] = deque(maxlen=self.population)
        trials: list[Trial] = []
        for number in range(self.generations):
            step = self.sigma * (1 - number / (1.25 * self.generations))
            if number == 0:
                candidate = plain
            elif number < self.population:
                candidate = mutated(plain, deviations, 1.0, self.sigma, chance)
            else:
                rivals = chance.sample(list(alive), self.samples)
                parent = max(rivals, key=lambda own: own[1].score)[0]
                candidate = mutated(parent, deviations, self.mutation_share, step, chance)
            scores = affine_scores(norms, candidate)
            counts = global_counts(problem.space, scores, problem.cost.predicted, problem.limit)
            (trial,) = yield [Proposal(problem, counts)]
            trials.append(trial)
            alive.append((candidate, trial))
        return Outcome(best_of(trials, problem))


def squared_norms(problem: Problem) -> dict[str, torch.Tensor]:
    """Return the squared L2 norm of every channel of every variable, in float64 (see :class:`LeGR`)."""
    found: dict[Axis, torch.Tensor] = problem.scores_by(WeightImportance(_squares))
    return {variable.name: found[variable.axis] for variable in problem.space.variables}


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    others = [other for other in range(weight.dim()) if other != dim]
    return weight.double().square().sum(others)
