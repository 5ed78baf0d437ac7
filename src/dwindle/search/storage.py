"""Where trials are kept: a folder with one append-only file of JSON lines, and the models of finished rounds.

Every line is written in one piece and flushed to the disk before the search goes on. A process that is killed in the
middle of a line leaves a torn end, which is cut off when the file is opened again; everything before it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dwindle.config import history
from dwindle.config.errors import ConfigError, FileFormatError
from dwindle.realize.plan import Plan
from dwindle.realize.surgery import apply_plan
from dwindle.realize.verify import Verification
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
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "trials.jsonl"
        entries = list(_read(self._file))
        if not entries:
            self._append({"format": FORMAT, "identity": dict(identity)})
            return
        _check_identity(self._file, entries[0], json.loads(json.dumps(dict(identity))))
        for entry in entries[1:]:
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
        self._append({"trial": trial.to_json()})

    def add_figure(self, name: str, value: float) -> None:
        """Keep a measured number (a latency that prices were fitted to)."""
        self.figures[name] = value
        self._append({"figure": name, "value": value})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

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


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file, after cutting off a torn last line."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FileFormatError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(entry, dict):
            raise FileFormatError(f"{path}, line {number} is no entry of a trial file")
        yield entry


def _check_identity(path: Path, head: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if head.get("format") != FORMAT:
        raise FileFormatError(f"{path} is no trial file of dwindle (format {head.get('format')!r})")
    kept = head["identity"]
    different = sorted(key for key in {*kept, *identity} if kept.get(key) != identity.get(key))
    if different:
        raise ConfigError(
            f"{path} holds the trials of another search: {', '.join(different)} differ; "
            "give another folder, or remove this one"
        )
