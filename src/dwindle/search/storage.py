"""Where trials are kept: a folder with one append-only file of JSON lines, and the models of finished rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dwindle.config import history
from dwindle.realize.plan import Plan
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import Verification
from dwindle.search.journal import Journal
from dwindle.search.trial import Trial
from dwindle.training.checkpoint import load_state, save_state

__all__ = ["TrialStore"]

FORMAT = "dwindle-trials-1"


class TrialStore:
    """Trials of one model, by key.

    Args:
        folder: Where they are kept; made when it is not there. None keeps them in memory only.
        identity: What must agree for earlier trials to be valid: the model's checksum, its space, its importance.

    Raises:
        ConfigError: The folder holds trials of something else; the message says what differs.
        FileFormatError: The file is damaged before its end.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.trials: dict[str, Trial] = {}
        self.figures: dict[str, float] = {}
        path = None if self.folder is None else self.folder / "trials.jsonl"
        self._journal = Journal(path, FORMAT, identity, "trial")
        for entry in self._journal.earlier:
            if "trial" in entry:
                trial = Trial.from_json(entry["trial"])
                self.trials[trial.key] = trial
            else:
                self.figures[entry["figure"]] = float(entry["value"])

    def __len__(self) -> int:
        return len(self.trials)

    def add(self, trial: Trial) -> None:
        """Keep a finished trial."""
        self.trials[trial.key] = trial
        self._journal.append({"trial": trial.to_json()})

    def add_figure(self, name: str, value: float) -> None:
        """Keep a measured number (a latency that prices were fitted to)."""
        self.figures[name] = value
        self._journal.append({"figure": name, "value": value})

    # models between rounds

    def save_round(
        self, name: str, model: nn.Module, plans: Sequence[Plan], proofs: Sequence[Verification]
    ) -> None:
        """Keep the model of a finished round: what was cut, what was proven, and its weights."""
        if self.folder is not None:
            state = {
                "plans": [plan.to_json() for plan in plans],
                "proofs": [proof.to_json() for proof in proofs],
                "weights": dict(model.state_dict()),
            }
            save_state(state, self.folder / f"{name}.state")

    def load_round(self, name: str, original: nn.Module) -> tuple[list[Plan], list[Verification]] | None:
        """Turn a copy of the original model into that of a finished round, in place.

        Args:
            name: As it was saved.
            original: A copy of the model that the search began with; it is cut and gets the kept weights.

        Returns:
            What was cut and proven, or None when nothing is kept under this name (the model is untouched).
        """
        if self.folder is None or not (self.folder / f"{name}.state").exists():
            return None
        state = load_state(self.folder / f"{name}.state")
        plans = [Plan.from_json(plan) for plan in state["plans"]]
        for plan in plans:
            apply_plan(original, plan)
            history.record(original, {"kind": "shrink", "plan": plan.to_json()})
        original.load_state_dict(state["weights"])
        return plans, [Verification(**proof) for proof in state["proofs"]]
