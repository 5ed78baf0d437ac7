"""Simulated annealing over ratios, every trial within the budget.

The search of AutoCompress (Liu et al., arXiv:1907.03141, section 3.3) as NNI's SimulatedAnnealing pruner has it:
ratios are perturbed by a step that shrinks with the temperature, scaled back to the budget, and accepted when the
score rises, or else with probability ``exp(-drop / temperature)``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from dwindle.config.errors import ConfigError
from dwindle.search.problem import Problem
from dwindle.search.running import Outcome, Proposal, Proposals, Search, best_of
from dwindle.search.trial import Trial

__all__ = ["SimulatedAnnealing", "acceptance", "first_ratios", "perturbed"]


def acceptance(drop: float, temperature: float) -> float:
    """Return the probability that a step is taken: 1 for a rise, ``exp(-drop / temperature)`` for a drop.

    Args:
        drop: By how much the score falls (negative: it rises), in the unit of the temperature.
        temperature: Above 0.
    """
    return 1.0 if drop <= 0 else math.exp(-drop / temperature)


def first_ratios(sizes: dict[str, int], largest: dict[str, float], chance: random.Random) -> dict[str, float]:
    """Return random ratios, the larger ones for the larger variables (NNI's sorted random sparsities).

    Args:
        sizes: Number of parameters that each variable decides over, by name.
        largest: Largest ratio of each.
        chance: The random generator.
    """
    drawn = sorted(chance.random() for _ in sizes)
    order = sorted(sizes, key=lambda name: sizes[name])
    return {name: ratio * largest[name] for name, ratio in zip(order, drawn, strict=True)}


def perturbed(
    ratios: dict[str, float], largest: dict[str, float], step: float, chance: random.Random
) -> dict[str, float]:
    """Move every ratio by a uniform random step up to ``step`` either way, within 0 and its largest."""
    return {
        name: min(max(ratio + chance.uniform(-step, step), 0.0), largest[name])
        for name, ratio in ratios.items()
    }


@dataclass(frozen=True)
class SimulatedAnnealing:
    """Searches ratios by simulated annealing; the names are NNI's.

    Attributes:
        start_temperature: In percent of the whole model's score: at temperature 1 a drop of one percent is
            accepted with probability 1/e.
        stop_temperature: The search ends when the temperature is at or below it.
        cool_down_rate: The temperature is multiplied by it after every trial.
        perturbation_magnitude: The largest step of a ratio at the start; it falls with the temperature.
        seed: Of the random generator.
    """

    start_temperature: float = 20.0
    stop_temperature: float = 0.5
    cool_down_rate: float = 0.9
    perturbation_magnitude: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.start_temperature > self.stop_temperature > 0:
            raise ConfigError(
                f"temperatures must fall to a positive number: start {self.start_temperature}, "
                f"stop {self.stop_temperature}"
            )
        if not 0 < self.cool_down_rate < 1:
            raise ConfigError(f"cool_down_rate {self.cool_down_rate} is not between 0 and 1")
        if self.perturbation_magnitude <= 0:
            raise ConfigError(f"perturbation_magnitude {self.perturbation_magnitude} must be above 0")

    def temperatures(self) -> list[float]:
        """Return the temperature of every step."""
        found, temperature = [], self.start_temperature
        while temperature > self.stop_temperature:
            found.append(temperature)
            temperature *= self.cool_down_rate
        return found

    def total(self, problem: Problem) -> int | None:
        """One trial a temperature, after the first."""
        return 1 + len(self.temperatures())

    def propose(self, search: Search) -> Proposals:
        """Walk through the ratios."""
        problem, space = search.problem, search.problem.space
        chance = random.Random(self.seed)
        largest = {variable.name: variable.largest_ratio for variable in space.variables}
        unit = abs(search.baseline.score) / 100 or 1.0
        trials: list[Trial] = []
        extents = {own.name: own.extent for own in space.variables}
        wanted = first_ratios(extents, largest, chance)
        counts = space.fit(wanted, problem.cost.predicted, problem.limit)
        trials += yield [Proposal(problem, counts)]
        current, ratios = trials[0], space.ratios(counts)
        for temperature in self.temperatures():
            step = self.perturbation_magnitude * temperature / self.start_temperature
            wanted = perturbed(ratios, largest, step, chance)
            counts = space.fit(wanted, problem.cost.predicted, problem.limit)
            (trial,) = yield [Proposal(problem, counts)]
            trials.append(trial)
            luck = chance.random()
            if trial.error is None and luck < acceptance((current.score - trial.score) / unit, temperature):
                current, ratios = trial, space.ratios(counts)
        return Outcome(best_of(trials, problem))
