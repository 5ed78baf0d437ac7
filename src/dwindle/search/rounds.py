"""Searches that train between their rounds: the model of a finished round becomes the model of the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dwindle.graph.stand_ins import copied
from dwindle.realize.plan import Plan
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.verify import Verification
from dwindle.search.problem import Problem
from dwindle.search.running import Search
from dwindle.search.trial import Trial

__all__ = ["Round", "advanced"]


@dataclass(frozen=True, eq=False, slots=True)
class Round:
    """Where a search in rounds stands.

    Attributes:
        problem: The model as it is now, with the budget of the coming round.
        plans: What was cut so far.
        proofs: What was proven of each cut.
    """

    problem: Problem
    plans: list[Plan] = field(default_factory=list)
    proofs: list[Verification] = field(default_factory=list)


def advanced(search: Search, here: Round, trial: Trial, name: str, make: Callable[[], ShrinkResult]) -> Round:
    """Return the round after the one that a trial has won.

    Its model is taken from the store when it is there, else made and kept.

    Args:
        search: What the algorithm works with.
        here: The finished round.
        trial: Its winner.
        name: Of the algorithm: results of different ones do not mix.
        make: Cuts a copy of the round's model as the trial says, with proof, and trains it.
    """
    base = f"{name}-{trial.key}"
    model = copied(search.problem.model)
    kept = search.store.load_round(base, model)
    if kept is not None:
        plans, proofs = kept
        return Round(here.problem.of_round(model, base), plans, proofs)
    result = make()
    plans = [*here.plans, result.plan]
    proofs = [*here.proofs, *([result.verification] if result.verification is not None else [])]
    search.store.save_round(base, result.model, plans, proofs)
    return Round(here.problem.of_round(result.model, base), plans, proofs)
