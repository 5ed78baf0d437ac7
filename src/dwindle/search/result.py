"""What a search found: its trials, its choice, its curve, and the small model with its proof."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.realize.shrink import ShrinkResult
from dwindle.realize.verify import Verification
from dwindle.search.problem import Problem
from dwindle.search.trial import Trial, sensitivity_curves

__all__ = ["SearchResult"]


class SearchResult:
    """The end of a search.

    Attributes:
        problem: What was searched.
        algorithm: Name of the algorithm.
        baseline: The trial of the whole model.
        trials: Every trial that the algorithm asked for, in order.
        best: The one it chose.
        in_rounds: Whether the model was trained between the rounds of the search.
    """

    def __init__(
        self,
        problem: Problem,
        algorithm: str,
        baseline: Trial,
        trials: Sequence[Trial],
        best: Trial,
        model: nn.Module | None = None,
        proofs: Sequence[Verification] = (),
    ) -> None:
        self.problem = problem
        self.algorithm = algorithm
        self.baseline = baseline
        self.trials = list(trials)
        self.best = best
        self.in_rounds = model is not None
        self._model = model
        self._proofs = list(proofs)

    @property
    def model(self) -> nn.Module:
        """The small model, proven; the searched model itself is as it was.

        Of searches in rounds it has the weights of their last round. Else it is made at the first use: the original
        cut to the chosen counts, with the original's weights.
        """
        if self._model is None:
            result = self.realize()
            self._model = result.model
            self._proofs = [result.verification] if result.verification is not None else []
        return self._model

    @property
    def proofs(self) -> list[Verification]:
        """The proofs of the cuts that made :attr:`model`."""
        assert self.model is not None
        return list(self._proofs)

    def realize(
        self, *, in_place: bool = False, verify: bool = True, optimizer: torch.optim.Optimizer | None = None
    ) -> ShrinkResult:
        """Cut the model to the chosen counts.

        Args:
            in_place: Cut the searched model itself instead of a copy.
            verify: Prove that the small model equals the masked one.
            optimizer: A live optimizer that goes on with the small model; only with ``in_place``.

        Raises:
            ConfigError: The search went in rounds, with training between: its small model is :attr:`model`.
            RealizeError: The small model was not proven equal; the model is left as it was.
        """
        if self.in_rounds:
            raise ConfigError("this search trained between its rounds: its small model is result.model")
        if optimizer is not None and not in_place:
            raise ConfigError("optimizer goes on with the model that is cut: give in_place=True")
        counts = self.problem.space.from_names(self.best.counts)
        model = self.problem.model if in_place else None
        return self.problem.build(counts, model=model, verify=verify, optimizer=optimizer)

    def curve(self) -> list[dict[str, Any]]:
        """Return a row a trial: ``trial``, ``score``, ``cost`` (a share of the whole), ``fits`` and ``best`` so far.

        ``score`` is None where a trial failed, ``best`` until one fits.
        """
        rows: list[dict[str, Any]] = []
        best: float | None = None
        for number, trial in enumerate(self.trials, 1):
            fits = self.problem.meets(trial)
            if fits and (best is None or trial.score > best):
                best = trial.score
            rows.append(
                {
                    "trial": number,
                    "score": trial.score if trial.error is None else None,
                    "cost": trial.cost / self.baseline.cost,
                    "fits": fits,
                    "best": best,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data (without models)."""
        return {
            "algorithm": self.algorithm,
            "cost": self.problem.budget.cost,
            "budget": self.problem.budget.share,
            "baseline": self.baseline.to_json(),
            "best": self.best.to_json(),
            "curve": self.curve(),
            "sensitivity": self._sensitivity(),
        }

    def _sensitivity(self) -> dict[str, list[list[float | None]]]:
        """Curves of the variables that were cut alone at several ratios; None stands for a failed trial."""
        curves = sensitivity_curves(self.trials, self.baseline)
        return {
            name: [[ratio, score if math.isfinite(score) else None] for ratio, score in points]
            for name, points in curves.items()
            if len(points) > 2
        }

    def summary(self) -> str:
        """Return a readable account."""
        share = self.best.cost / self.baseline.cost
        lines = [
            f"{self.algorithm}: {len(self.trials)} trials, score {self.baseline.score:.4g} -> {self.best.score:.4g} "
            f"at {share:.1%} of {self.problem.budget.cost} (budget {self.problem.budget.share:.1%})"
        ]
        sizes = {variable.name: variable.size for variable in self.problem.space.variables}
        lines += [
            f"  {name}: {sizes.get(name, count)} -> {count}" for name, count in self.best.counts.items()
        ]
        return "\n".join(lines)
