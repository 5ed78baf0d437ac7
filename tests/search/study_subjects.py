"""Subjects of studies for tests: plain arithmetic, so that what a search must find is known."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.search.studies import Assessment, Direction, Report


class Hill:
    """A hill with its top at x = 1, n = 5, under a limit on n; candidates of one kind have a further parameter.

    Args:
        pause: Seconds of each of three steps.
        log: A file that gets a line at the beginning and the end of each assessment.
        limit: Largest n that meets the constraint.
    """

    def __init__(self, pause: float = 0.0, log: str | None = None, limit: int = 6) -> None:
        self.pause, self.log, self.limit = pause, log, limit

    @property
    def objectives(self) -> Mapping[str, Direction]:
        return {"score": "maximize"}

    def identity(self) -> Mapping[str, Any]:
        return {"hill": 1, "limit": self.limit}

    def suggest(self, trial: Any) -> Mapping[str, Any]:
        candidate = {
            "x": trial.suggest_float("x", -3.0, 3.0),
            "n": trial.suggest_int("n", 1, 8),
            "kind": trial.suggest_categorical("kind", ["plain", "bonus"]),
        }
        if candidate["kind"] == "bonus":
            candidate["bonus"] = trial.suggest_float("bonus", 0.0, 1.0)
        return candidate

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        key = f"{candidate['x']:.17g}/{candidate['n']}/{candidate.get('bonus', 0.0):.17g}"
        self.write(f"begin {key}")
        score = -((candidate["x"] - 1) ** 2) - 0.3 * abs(candidate["n"] - 5) + candidate.get("bonus", 0.0)
        for step in range(3):
            time.sleep(self.pause)
            report(step, score - (2 - step))
        self.write(f"end {key}")
        return Assessment(
            {"score": score},
            costs={"bytes": 100.0 * candidate["n"]},
            violations={"n": candidate["n"] - self.limit},
            attributes={"twice": [candidate["n"], candidate["n"]]},
        )

    def write(self, text: str) -> None:
        if self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as stream:
                stream.write(f"{os.getpid()} {text}\n")


class Front(Hill):
    """Score against cost: the front is x = 1 for every n."""

    @property
    def objectives(self) -> Mapping[str, Direction]:
        return {"score": "maximize", "bytes": "minimize"}

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        score = -((candidate["x"] - 1) ** 2) + candidate["n"]
        return Assessment(
            {"score": score, "bytes": 100.0 * candidate["n"]}, violations={"n": candidate["n"] - self.limit}
        )


class Fragile(Hill):
    """Fails on half of all candidates."""

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        if candidate["x"] < 0:
            raise RuntimeError("x is below 0")
        return super().assess(candidate, report)


def hill(pause: float = 0.0, log: str | None = None, limit: int = 6) -> Hill:
    return Hill(pause, log, limit)


def deadly(log: str) -> Hill:
    """A subject whose assessment ends its process at once."""

    class Deadly(Hill):
        def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
            os._exit(9)

    return Deadly(log=log)
