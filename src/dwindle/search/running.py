"""The way of every search: an algorithm proposes counts, trials answer, until it has decided.

An algorithm is a generator: it yields lists of proposals (the trials of one list do not depend on each other, so they
may run anywhere at the same time) and is sent the finished trials in the same order. It keeps no files. A search that
was killed is resumed by running the algorithm again from its seed: trials that are in the store answer at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.counts import Counts
from dwindle.realize.verify import Verification
from dwindle.search.problem import Problem
from dwindle.search.result import SearchResult
from dwindle.search.storage import TrialStore
from dwindle.search.trial import Trial, key_of
from dwindle.training.progress import tracked

__all__ = ["Algorithm", "Outcome", "Proposal", "Search", "run_search"]

#: How far above the budget a measured latency may lie: measurements scatter.
LATENCY_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False, slots=True)
class Proposal:
    """What an algorithm wants to know: the score of some counts of some model.

    Attributes:
        problem: Whose model is cut.
        counts: How many indices of each axis stay.
    """

    problem: Problem
    counts: Counts


@dataclass(eq=False, slots=True)
class Outcome:
    """What an algorithm decided.

    Attributes:
        trial: The chosen trial.
        model: Its model, where that is the result of several rounds; None where it is a cut of the original.
        proofs: The proofs of those rounds.
    """

    trial: Trial
    model: nn.Module | None = None
    proofs: list[Verification] = field(default_factory=list)


@dataclass(frozen=True, eq=False, slots=True)
class Search:
    """What an algorithm works with.

    Attributes:
        problem: The model and its budget.
        baseline: The trial of the whole model.
        store: For the models of finished rounds.
    """

    problem: Problem
    baseline: Trial
    store: TrialStore


Proposals = Generator[list[Proposal], list[Trial], Outcome]


class Algorithm(Protocol):
    """A way to search; its settings are the fields of a frozen dataclass."""

    def total(self, problem: Problem) -> int | None:
        """Return how many trials it will ask for, where that is known."""

    def propose(self, search: Search) -> Proposals:
        """Yield proposals, receive their trials, and return the decision."""


def run_search(
    problem: Problem,
    algorithm: Algorithm,
    *,
    storage: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> SearchResult:
    """Search the best small model within the budget of a problem.

    Args:
        problem: The model, how it is scored, and what it may cost.
        algorithm: How to search.
        storage: A folder that keeps every trial as soon as it is finished. When it holds trials of this problem
            already, none of them is run again: a killed search goes on, and searches share what they found.
        progress: Show a progress bar; None means only when the error output is a terminal.

    Raises:
        ConfigError: The budget cannot be reached, the whole model has no finite score, or the storage belongs to
            another search.
    """
    store = TrialStore(storage, problem.identity())
    problem.prepare(store)
    run = _Run(problem, algorithm, store)
    name = type(algorithm).__name__
    total = algorithm.total(problem)
    trials = list(tracked(run.trials(), name, total=total and total + 1, shown=progress))
    return SearchResult(
        problem, name, trials[0], trials[1:], run.decided.trial, run.decided.model, run.decided.proofs
    )


class _Run:
    """One run of an algorithm."""

    def __init__(self, problem: Problem, algorithm: Algorithm, store: TrialStore) -> None:
        self.problem, self.algorithm, self.store = problem, algorithm, store
        self.decided: Outcome

    def trials(self) -> Iterator[Trial]:
        """Yield the trial of the whole model, then the algorithm's, each as it is finished."""
        baseline = self._answer(Proposal(self.problem, self.problem.space.full()))
        if baseline.error is not None:
            raise ConfigError(f"evaluate: the whole model has no score: {baseline.error}")
        yield baseline
        proposals = self.algorithm.propose(Search(self.problem, baseline, self.store))
        try:
            batch = next(proposals)
            while True:
                answers = []
                for proposal in batch:
                    answers.append(self._answer(proposal))
                    yield answers[-1]
                batch = proposals.send(answers)
        except StopIteration as end:
            self.decided = end.value

    def _answer(self, proposal: Proposal) -> Trial:
        problem = proposal.problem
        key = key_of(problem.space.named(proposal.counts), problem.base)
        trial = self.store.trials.get(key)
        if trial is None:
            trial = problem.assess(proposal.counts)
            self.store.add(trial)
        problem.cost.observe(proposal.counts, trial.cost)
        return trial


def best_of(trials: list[Trial], problem: Problem) -> Trial:
    """Return the trial with the highest score within the budget (of equal scores the cheapest, then the first).

    Where no measured latency was within the budget, the nearest is returned, with a warning.

    Raises:
        DwindleError: No trial succeeded, or none is within a budget that is counted.
    """
    done = [trial for trial in trials if trial.error is None]
    if not done:
        raise DwindleError(
            f"none of {len(trials)} trials succeeded; the first failed with: {trials[0].error}"
        )
    fitting = [
        trial for trial in done if problem.meets(trial, LATENCY_TOLERANCE if problem.is_measured else 0.0)
    ]
    if not fitting:
        nearest = min(done, key=lambda trial: trial.cost)
        text = (
            f"none of {len(trials)} trials is within the budget of {problem.limit:.4g} ({problem.budget.cost}); "
            f"the cheapest is at {nearest.cost:.4g}"
        )
        if not problem.is_measured:
            raise DwindleError(text)
        warnings.warn(text, stacklevel=2)
        return nearest
    return max(fitting, key=lambda trial: (trial.score, -trial.cost))
