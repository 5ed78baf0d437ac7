"""One trial: which counts were tried, and what came of it. Plain data, so that it can be stored and sent."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dwindle.search.space import NamedCounts

__all__ = ["Point", "Trial", "key_of", "sensitivity_curves"]

#: One point of a curve: ratio and score.
Point = tuple[float, float]


def key_of(counts: Mapping[str, int], base: str = "") -> str:
    """Return the name of a trial: the same counts of the same base are the same trial, in every process.

    Args:
        counts: How many indices of each variable stay.
        base: What the counts are cut from: empty for the original model, else the name of an earlier result.
    """
    text = json.dumps([base, sorted(counts.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        key: See :func:`key_of`.
        counts: How many indices of each variable stay.
        ratios: The share of each variable that goes.
        score: What ``evaluate`` gave (higher is better); ``-inf`` where it failed.
        cost: Of the small model, in the unit of the budget.
        seconds: Wall time.
        base: What the counts were cut from.
        error: Why it failed; None when it did not.
    """

    key: str
    counts: NamedCounts
    ratios: dict[str, float]
    score: float
    cost: float
    seconds: float = 0.0
    base: str = ""
    error: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        data = asdict(self)
        data["score"] = self.score if math.isfinite(self.score) else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Rebuild a trial from :meth:`to_json` data."""
        score = data["score"]
        return cls(**{**data, "score": -math.inf if score is None else float(score)})


def sensitivity_curves(trials: Sequence[Trial], baseline: Trial) -> dict[str, list[Point]]:
    """Return the curve of every variable (ratio and score, from ratio 0) from trials that cut one variable alone.

    Args:
        trials: Any trials; those that cut several variables are left out.
        baseline: The trial of the whole model.
    """
    curves: dict[str, list[Point]] = {}
    for trial in trials:
        cut = [name for name, ratio in trial.ratios.items() if ratio > 0]
        if len(cut) == 1 and trial.base == baseline.base:
            curves.setdefault(cut[0], [(0.0, baseline.score)]).append((trial.ratios[cut[0]], trial.score))
    return {name: sorted(set(points)) for name, points in curves.items()}
