"""The subject of a study that an experiment of NNI asks for: a search space, and targets in place of a sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from dwindle.compat.nni.experiment.configs import CompressionConfig
from dwindle.compat.nni.experiment.executing import Materials, Step, compressed, figures_of
from dwindle.compat.nni.experiment.search_space import draw
from dwindle.config.errors import ConfigError
from dwindle.search.journal import checksum
from dwindle.search.studies import Assessment, Direction, Report

__all__ = ["CompressionSubject", "check_targets"]

Reading = Callable[[Mapping[str, Any]], tuple[Step | None, Step | None]]

_CEILINGS = ("params", "flops", "latency")


class CompressionSubject:
    """Candidates of an experiment.

    Args:
        materials: Model, evaluator, and the rest.
        space: NNI's search space.
        reading: Turns drawn values into a pruner and a quantizer.
        targets: Ceilings on costs, a floor on the metric.
        way: Whether the metric is better high or low.
        seed: Each trial begins with the random generators seeded by it.
    """

    def __init__(
        self,
        materials: Materials,
        space: Mapping[str, Any],
        reading: Reading,
        targets: CompressionConfig,
        way: Direction = "maximize",
        seed: int = 0,
    ) -> None:
        check_targets(targets, materials)
        self.materials, self.space, self.reading = materials, space, reading
        self.targets, self.way, self.seed = targets, way, seed
        self._whole: dict[str, float] | None = None

    @property
    def objectives(self) -> Mapping[str, Direction]:
        """The metric; or the multiply-accumulates, where the metric is all that has a target."""
        return {"metric": self.way} if self._wants_metric else {"flops": "minimize"}

    @property
    def _wants_metric(self) -> bool:
        ceilings = [getattr(self.targets, name) for name in _CEILINGS]
        return self.targets.metric is None or any(own is not None for own in ceilings)

    def identity(self) -> Mapping[str, Any]:
        """The model, the space and the targets."""
        names = (*_CEILINGS, "metric", "runtime")
        targets = {name: own for name, own in asdict(_plain(self.targets)).items() if name in names}
        state = self.materials.model.state_dict()
        return {"model": checksum(state), "space": self.space, "targets": targets, "seed": self.seed}

    def suggest(self, trial: Any) -> Mapping[str, Any]:
        """Draw from the space."""
        found: dict[str, Any] = draw(trial, self.space)
        return found

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        """Compress, evaluate and measure beside the original."""
        model = self.build(candidate)
        both = figures_of(self.materials, {"compressed": model, "original": self.materials.model})
        own, now = both["compressed"], both["original"]
        if self._whole is None:
            self._whole = now
        shares = {name: value / now[name] if now[name] else 1.0 for name, value in own.items()}
        violations = {}
        for name in _CEILINGS:
            limit = getattr(self.targets, name)
            if limit is not None:
                violations[name] = shares[name] - (limit / now[name] if isinstance(limit, int) else limit)
        if self.targets.metric is not None:
            gap = self.targets.metric - shares["metric"]
            violations["metric"] = gap if self.way == "maximize" else 1.0 / self.targets.metric - 1.0 - gap
        values = {name: own[name] for name in self.objectives}
        return Assessment(values, own, violations, {"original": now, "shares": shares})

    def build(self, candidate: Mapping[str, Any]) -> torch.nn.Module:
        """Make the compressed model of a candidate, in evaluation mode."""
        return compressed(self.materials, *self.reading(candidate), seed=self.seed)


def check_targets(targets: CompressionConfig, materials: Materials) -> None:
    """Refuse targets that mean nothing, or that cannot be measured.

    Raises:
        ConfigError: The message names the target.
    """
    for name in _CEILINGS:
        limit = getattr(targets, name)
        if limit is None:
            continue
        if isinstance(limit, float) and not 0.0 < limit <= 1.0:
            raise ConfigError(
                f"{name} = {limit}: a share of the original is above 0 and up to 1; numbers are whole (int)"
            )
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
            raise ConfigError(f"{name} = {limit!r}: give a share (float) or a number (int)")
        if name == "latency" and isinstance(limit, int) and limit != 1:
            raise ConfigError("latency is a share of the original's, above 0 and up to 1")
        if materials.dummy_input is None:
            raise ConfigError(f"{name}: nothing can be counted without dummy_input")
    if targets.metric is not None and not 0.0 < targets.metric <= 1.0:
        raise ConfigError(
            f"metric = {targets.metric}: the share of the original's metric is above 0 and up to 1"
        )


def _plain(targets: CompressionConfig) -> CompressionConfig:
    """The targets alone: lists of classes are no plain data."""
    kept = {name: getattr(targets, name) for name in (*_CEILINGS, "metric", "runtime")}
    return CompressionConfig(**kept)
