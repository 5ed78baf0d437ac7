"""What a sensitivity analysis found, and what follows from it."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.mixed_precision.result import MixedPrecision
from dwindle.search.sensitivities.choosing import (
    bits_for,
    counts_for,
    goal_of,
    prune_entries,
    rank_entries,
    rising_drops,
)
from dwindle.search.sensitivities.factorized import FactorizedLayers
from dwindle.search.sensitivities.points import SensitivityPoint, SensitivityTarget
from dwindle.search.sensitivities.pruned import PrunedAxes
from dwindle.search.sensitivities.rounded import RoundedLayers
from dwindle.search.sensitivities.subject import Subject
from dwindle.training.atomic_file import replaced_when_whole

__all__ = ["SensitivityResult"]

_COLUMNS = ("kind", "target", "level", "detail", "score", "drop", "macs", "seconds", "error", "members")
_LEVELS = {"pruning": "share that goes", "quantization": "bits", "factorization": "share of the full rank"}


class SensitivityResult:
    """Points for each kind, target and level.

    Attributes:
        points: All that were measured, in order.
        score: ``"metric"`` or ``"sqnr"`` (dB of the outputs).
        baseline: The unchanged model's score.
        notes: What the user should know: what cannot be compressed alone, and why.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        points: Sequence[SensitivityPoint],
        score: str,
        baseline: float,
        notes: Sequence[str],
    ) -> None:
        self._subjects = {subject.kind: subject for subject in subjects}
        self.points = list(points)
        self.score, self.baseline, self.notes = score, baseline, list(notes)
        self._measured: dict[str, dict[str, list[SensitivityPoint]]] = {kind: {} for kind in self._subjects}
        for point in points:
            self._measured[point.kind].setdefault(point.target, []).append(point)

    # looking

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were measured."""
        return tuple(self._subjects)

    def targets(self, kind: str) -> list[SensitivityTarget]:
        """Return the targets of a kind, the most sensitive first: that of the largest mean drop over its levels.

        Levels behind an early stop count with the drop at which it stopped.

        Raises:
            ConfigError: The kind was not measured.
        """
        subject = self._subject(kind)
        return sorted(subject.targets, key=lambda own: -self._mean_drop(subject, own.name))

    def curve(self, target: str, kind: str | None = None) -> list[tuple[float, float | None]]:
        """Return level and score of a target, the mildest level first; the score is None where it failed.

        Args:
            target: Its name.
            kind: Its kind; needed where several kinds have a target of this name.

        Raises:
            ConfigError: There is no such target, or there are several.
        """
        if kind is not None:
            self._subject(kind)
        found = [own for own in self.kinds if kind in (None, own) and target in self._measured[own]]
        if not found:
            names = {name for own in self.kinds if kind in (None, own) for name in self._measured[own]}
            raise ConfigError(f"no target {target!r} was measured{did_you_mean(target, sorted(names))}")
        if len(found) > 1:
            raise ConfigError(f"{target!r} was measured for {' and '.join(found)}: give kind")
        return [(point.level, point.score) for point in self._measured[found[0]][target]]

    def table(self) -> str:
        """Return all drops as a text table, the most sensitive target of each kind first."""
        unit = "noise as a share of the outputs' energy" if self.score == "sqnr" else "drop of the metric"
        lines = []
        for kind in self.kinds:
            targets = self.targets(kind)
            width = max(len(target.name) for target in targets)
            lines.append(f"{kind}: {_LEVELS[kind]}, {unit}")
            for target in targets:
                cells = [
                    f"{point.level:.4g}: {'failed' if point.error else f'{point.drop:.3g}'}"
                    for point in self._measured[kind][target.name]
                ]
                lines.append(
                    f"  {target.name:{width}}  " + "  ".join(f"{cell:<14}" for cell in cells).rstrip()
                )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data: what :func:`dwindle.report.write_sensitivity_page` draws.

        Targets stand in the order of :meth:`targets`. A score of None without an error is infinite: nothing changed.
        """
        kinds = []
        for kind in self.kinds:
            targets = [
                {
                    "name": target.name,
                    "members": list(target.members),
                    "size": target.size,
                    "points": [_plain(point) for point in self._measured[kind][target.name]],
                }
                for target in self.targets(kind)
            ]
            kinds.append({"kind": kind, "level": _LEVELS[kind], "targets": targets})
        baseline = self.baseline if math.isfinite(self.baseline) else None
        return {"score": self.score, "baseline": baseline, "kinds": kinds, "notes": self.notes}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a row for each point, in the order in which they were measured.

        Args:
            path: The file; an older one is replaced as a whole.
        """
        members = {
            (kind, own.name): own.members for kind in self.kinds for own in self._subjects[kind].targets
        }
        with replaced_when_whole(Path(path)) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for point in self.points:
                row = {**vars(point), "members": " ".join(members[point.kind, point.target])}
                row["detail"] = " ".join(map(str, point.detail))
                writer.writerow(["" if row[name] is None else row[name] for name in _COLUMNS])

    # choosing

    def ratios(
        self, drop: float | None = None, budget: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        """Return a config_list for a pruner with ``example_inputs``: a ``sparse_ratio`` for every axis that is cut.

        Args:
            drop: The largest ratio of each axis that costs so much alone, straight lines between measured ratios.
            budget: Instead: ``{"macs": 0.5}``, ``{"params": 0.5}`` or ``{"bytes": 0.5}``, the share that stays, at the
                drop that is the same for all axes. A pruner chooses by its own ranking which channels go.

        Returns:
            The entries; none where no axis may lose anything.

        Raises:
            ConfigError: Pruning was not measured, an argument does not fit, or the measured ratios do not reach the
                budget.
        """
        subject = self._subject("pruning")
        assert isinstance(subject, PrunedAxes)
        cost, share = goal_of(drop, budget, ("macs", "params", "bytes"))
        counts = counts_for(subject, self._measured["pruning"], drop, cost, share)
        return prune_entries(subject.problem.model, subject.problem.space, counts)

    def mixed_precision(
        self,
        drop: float | None = None,
        budget: Mapping[str, float] | None = None,
        activations: str | int | None = None,
    ) -> MixedPrecision:
        """Return the bits of every layer, what they compress, and the config_list that says them.

        Args:
            drop: The fewest bits at which each layer costs no more alone.
            budget: Instead: ``{"mean_bits": 4}`` (bits of a weight in the mean), ``{"size": 0.5}`` or
                ``{"bit_operations": 0.5}`` (the share of what everything in 8 bits costs). The choice of the least sum
                of drops, exactly.
            activations: As in :func:`dwindle.quantization.choose_bits`: ``"strict"``, ``"liberal"`` or a number; None
                is what was measured (``"strict"`` where inputs had the bits of the weights, 8 where they stayed float).

        Raises:
            ConfigError: Quantization was not measured, an argument does not fit, or the measured bits do not reach the
                budget.
        """
        subject = self._subject("quantization")
        assert isinstance(subject, RoundedLayers)
        cost, number = goal_of(drop, budget, ("mean_bits", "size", "bit_operations"))
        if activations is None:
            same = isinstance(subject.input_bits, str)
            activations = "strict" if same else (subject.input_bits or 8)
        return bits_for(subject, self._measured["quantization"], drop, cost, number, activations)

    def bits(
        self,
        drop: float | None = None,
        budget: Mapping[str, float] | None = None,
        activations: str | int | None = None,
    ) -> list[dict[str, Any]]:
        """Return the config_list of :meth:`mixed_precision`, for ``dw.quantize`` and for training."""
        return self.mixed_precision(drop, budget, activations).config_list

    def ranks(
        self, drop: float | None = None, budget: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        """Return a config_list for :func:`dwindle.factorize`: the rank of every layer that becomes a chain.

        Args:
            drop: The cheapest ranks at which each layer costs no more alone.
            budget: Instead: ``{"macs": 0.5}`` or ``{"params": 0.5}``, the share of the whole model that stays.

        Returns:
            The entries; none where every layer stays whole.

        Raises:
            ConfigError: Factorization was not measured, an argument does not fit, or the measured ranks do not reach
                the budget.
        """
        subject = self._subject("factorization")
        assert isinstance(subject, FactorizedLayers)
        cost, share = goal_of(drop, budget, ("macs", "params"))
        return rank_entries(subject, self._measured["factorization"], drop, cost, share)

    def _subject(self, kind: str) -> Subject:
        if kind not in self._subjects:
            hint = did_you_mean(kind, self.kinds)
            raise ConfigError(f"{kind!r} was not measured, only {', '.join(self.kinds)}{hint}")
        return self._subjects[kind]

    def _mean_drop(self, subject: Subject, target: str) -> float:
        drops = rising_drops(self._measured[subject.kind].get(target, []))
        levels = len(subject.levels(target))
        return (sum(drops) + drops[-1] * (levels - len(drops))) / levels if drops else 0.0


def _plain(point: SensitivityPoint) -> dict[str, Any]:
    return {name: value for name, value in point.to_json().items() if name not in ("kind", "target")}
