"""What ``dw.auto`` found: the small model, what it costs, how good it is, and every candidate that was tried."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dwindle.export import export
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.limits import COSTS, Limit
from dwindle.search.studies.result import StudyResult

__all__ = ["AutoResult"]


@dataclass
class AutoResult:
    """The end of :func:`dwindle.auto`.

    Attributes:
        model: The small model; of an int8 candidate it simulates int8 and is exported as such.
        candidate: What was done to the original.
        limits: The budget.
        allowed: The limits in the units of their costs.
        original_costs: What the original costs, by name.
        costs: What the model costs, measured at the end beside the original.
        original_score: Of the original on the validation data; higher is better.
        score: Of the model, in the same way.
        scores: Of its exported file, by runtime.
        max_drop: What the score may fall by.
        tolerance: How far above its limit a measured latency may lie, as a share.
        study: The trials of the joint search; None where there were none.
        seconds: Wall time of each part.
        notes: What the user should know.
        trial_share: Share of the full training that each trial had.
        example: Positional and keyword inputs, for the export.
    """

    model: nn.Module
    candidate: Candidate
    limits: tuple[Limit, ...]
    allowed: Mapping[str, float]
    original_costs: Mapping[str, float]
    costs: Mapping[str, float]
    original_score: float
    score: float
    scores: Mapping[str, float]
    max_drop: float
    tolerance: float
    study: StudyResult | None
    seconds: Mapping[str, float]
    notes: Sequence[str] = ()
    trial_share: float = 0.0
    example: tuple[tuple[Any, ...], Mapping[str, Any]] = field(default=((), {}), repr=False)

    @property
    def drop(self) -> float:
        """What the score fell by: in the runtime where that is worst."""
        return self.original_score - min([self.score, *self.scores.values()])

    @property
    def within_budget(self) -> bool:
        """Whether every limit is met (times up to the tolerance)."""
        return all(
            self.costs[name] <= most * (1 + (self.tolerance if name.startswith("latency") else 0))
            for name, most in self.allowed.items()
        )

    @property
    def within_drop(self) -> bool:
        """Whether the score fell by no more than was allowed."""
        return self.drop <= self.max_drop

    @property
    def met(self) -> bool:
        """Whether the budget and the drop are met."""
        return self.within_budget and self.within_drop

    def export(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Write the model for a runtime, see :func:`dwindle.export`."""
        args, kwargs = self.example
        return export(self.model, Path(path), args, dict(kwargs) or None, **options)

    def stages(self) -> list[dict[str, Any]]:
        """Return the stages of a recipe that shrink the original in the same way."""
        return self.candidate.stages()

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data, without the model."""
        return {
            "candidate": self.candidate.to_json(),
            "limits": [vars(limit) for limit in self.limits],
            "allowed": dict(self.allowed),
            "original_costs": dict(self.original_costs),
            "costs": dict(self.costs),
            "original_score": self.original_score,
            "score": self.score,
            "scores": dict(self.scores),
            "drop": self.drop,
            "max_drop": self.max_drop,
            "within_budget": self.within_budget,
            "within_drop": self.within_drop,
            "study": None if self.study is None else self.study.to_json(),
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Return a readable account."""
        verdict = "meets the budget" if self.within_budget else "is ABOVE the budget"
        lines = [
            f"{self.candidate.summary()}: {verdict}, score {self.original_score:.4f} -> {self.score:.4f} "
            f"({'within' if self.within_drop else 'MORE than'} the {self.max_drop:g} that may be lost)"
        ]
        for limit in self.limits:
            before, now = self.original_costs[limit.cost], self.costs[limit.cost]
            unit = COSTS[limit.cost.partition(":")[0]].split()[0]
            lines.append(
                f"  {limit.cost}: {before:.4g} -> {now:.4g} {unit} ({now / before:.3f} of the original, "
                f"{self.allowed[limit.cost]:.4g} allowed)"
            )
        lines += [f"  in {name}: score {score:.4f}" for name, score in self.scores.items()]
        if self.study is not None:
            lines.append(f"  {len(self.study.trials)} trials, {sum(self.seconds.values()):.0f} s in all")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
