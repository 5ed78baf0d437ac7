"""The joint search: blocks, ratios of all axes, ranks, numbers and the order of methods at once, within a budget.

Every candidate is made to fit the budget before it is trained: what a trial draws is *how* the axes share what must go
(how much dearer than its importance each axis is held to be), and counts follow. So no trial is spent on a model that
is too slow, and the greedy answer is one point of the space, with which the search begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.graph.counts import Counts
from dwindle.search.auto.allocation import greedy_counts, importance_harm, scaled_counts
from dwindle.search.auto.candidate import Candidate
from dwindle.search.auto.fitting import Fitted, Fitter, Share
from dwindle.search.auto.measured_harm import HarmCurves, equal_drop_share
from dwindle.search.auto.predicting import PredictedCosts
from dwindle.search.auto.variant import Variant
from dwindle.search.space import Variable
from dwindle.search.studies.subject import Assessment, Direction, Report

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Choices", "JointSubject", "Wish"]

#: Axes may be held to be this much (a factor of e to its power) dearer or cheaper than their importance: twice.
_TILT = 0.7

#: Whether layers become chains of low rank; with a choice for each layer alone, nearly all trials would have many.
_RANKS = ("none", "some")

#: Shares that need measured harm.
_MEASURED = ("measured", "equal drop")

Assess = Callable[[Candidate, Report], float]


@dataclass(frozen=True)
class Choices:
    """What trials choose between.

    Attributes:
        blocks: Sets of blocks that may go, the empty one among them.
        importances: Importances by which the greedy share may go.
        float_layers: Sets of layers that may stay in float in an int8 model.
        numbers: ``"int8"``, ``"float32"`` or both.
        ranks: Layers that may become chains, with the full rank of each.
        starts: Shares of the training behind which rounding begins.
    """

    blocks: tuple[tuple[str, ...], ...] = ((),)
    importances: tuple[str, ...] = ("outputs",)
    float_layers: tuple[tuple[str, ...], ...] = ((),)
    numbers: tuple[str, ...] = ("int8",)
    ranks: Mapping[str, int] | None = None
    starts: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Wish:
    """What a trial draws: a candidate without counts, and how its axes share what must go.

    Attributes:
        base: The candidate.
        share: ``"greedy"`` by importance, ``"measured"`` (greedy by measured harm), ``"equal drop"`` or ``"uniform"``.
        tilts: By axis: how much dearer it is held to be, as a power of e; 0 where it is missing.
    """

    base: Candidate
    share: str
    tilts: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"base": self.base.to_json(), "share": self.share, "tilts": dict(self.tilts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Wish:
        """Rebuild a wish."""
        return cls(Candidate.from_json(data["base"]), str(data["share"]), dict(data["tilts"]))

    def how(
        self,
        widths: Callable[[Variant], Mapping[str, Sequence[int]] | None],
        curves: HarmCurves | None = None,
    ) -> Share:
        """Return how axes share what must go.

        Args:
            widths: Counts that the runtime likes.
            curves: What cutting each axis does, for the shares that are measured.

        Raises:
            ConfigError: The share is measured, and there are no curves.
        """
        measured = self.share in _MEASURED
        if measured and curves is None:
            raise ConfigError(f"share: {self.share!r} needs measured harm; give the subject curves")
        if self.share == "equal drop" and curves is not None:
            return equal_drop_share(curves)
        if self.share == "uniform":
            return lambda variant, costs: scaled_counts(
                variant.space,
                {v.name: math.exp(-self.tilts.get(v.name, 0.0)) for v in variant.space.variables},
                costs.over,
                widths(variant),
            )

        def share(variant: Variant, costs: PredictedCosts) -> Counts | None:
            plain = (
                curves.harm
                if measured and curves is not None
                else importance_harm(variant.scores(self.base.importance))
            )

            def harm(variable: Variable, count: int) -> float:
                return plain(variable, count) * math.exp(self.tilts.get(variable.name, 0.0))

            return greedy_counts(variant.space, harm, costs.over, widths(variant))

        return share


class JointSubject:
    """Searches the candidates of one model within one budget; see :mod:`dwindle.search.studies`.

    Args:
        fitter: Makes candidates fit.
        choices: What trials choose between.
        assess: ``assess(candidate, report)`` gives the score of a candidate that fits.
        identity: What must agree for stored trials to be valid.
        widths: Counts that the runtime likes, by variable.
        curves: What cutting each axis alone does; None: shares by importance and uniform ones only.
    """

    def __init__(
        self,
        fitter: Fitter,
        choices: Choices,
        assess: Assess,
        identity: Mapping[str, Any],
        widths: Callable[[Variant], Mapping[str, Sequence[int]] | None] = lambda variant: None,
        curves: HarmCurves | None = None,
    ) -> None:
        self.fitter, self.choices, self.curves = fitter, choices, curves
        self._assess, self._identity, self._widths = assess, dict(identity), widths

    @property
    def objectives(self) -> Mapping[str, Direction]:
        """The score."""
        return {"score": "maximize"}

    def identity(self) -> Mapping[str, Any]:
        """What the trials are about."""
        return self._identity

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Draw a wish."""
        own = self.choices
        blocks = (
            own.blocks[trial.suggest_int("blocks", 0, len(own.blocks) - 1)]
            if len(own.blocks) > 1
            else own.blocks[0]
        )
        numbers = (
            trial.suggest_categorical("numbers", list(own.numbers))
            if len(own.numbers) > 1
            else own.numbers[0]
        )
        share = trial.suggest_categorical(
            "share", ["greedy", "uniform", *(_MEASURED if self.curves is not None else ())]
        )
        importance = (
            trial.suggest_categorical("importance", list(own.importances))
            if len(own.importances) > 1
            else own.importances[0]
        )
        layers: tuple[str, ...] = own.float_layers[0]
        if len(own.float_layers) > 1:
            layers = own.float_layers[trial.suggest_int("float_layers", 0, len(own.float_layers) - 1)]
        start = (
            trial.suggest_categorical("quantize_at", list(own.starts))
            if len(own.starts) > 1
            else own.starts[0]
        )
        if numbers != "int8":
            layers = ()
        layers = _standing(layers, blocks)
        ranks: dict[str, int] = {}
        first = True
        if own.ranks and trial.suggest_categorical("ranks", list(_RANKS)) == "some":
            able = {*_standing(own.ranks, blocks)} - {*layers}
            for path, full in own.ranks.items():
                kept = trial.suggest_categorical(f"rank {path}", [1.0, 0.5, 0.25])
                if kept < 1 and path in able:
                    ranks[path] = max(1, int(full * kept))
            first = (
                trial.suggest_categorical("order", ["factorize first", "prune first"]) == "factorize first"
            )
        tilts = {}
        for variable in self._tilted():
            tilts[variable] = trial.suggest_float(f"tilt {variable}", -_TILT, _TILT)
        base = Candidate(
            blocks,
            ranks,
            first,
            {},
            importance,
            "int8" if numbers == "int8" else "float32",
            layers,
            float(start),
        )
        return Wish(base, share, tilts).to_json()

    def parameters_of(self, wish: Wish) -> dict[str, Any]:
        """Return the parameters by which :meth:`suggest` draws a wish, to begin a study with it."""
        own = self.choices
        found: dict[str, Any] = {"share": wish.share}
        if len(own.blocks) > 1:
            found["blocks"] = own.blocks.index(wish.base.blocks)
        if len(own.numbers) > 1:
            found["numbers"] = wish.base.numbers
        if len(own.importances) > 1:
            found["importance"] = wish.base.importance
        if len(own.float_layers) > 1:
            standing = [_standing(layers, wish.base.blocks) for layers in own.float_layers]
            layers = wish.base.float_layers
            found["float_layers"] = standing.index(layers) if layers in standing else 0
        if len(own.starts) > 1:
            found["quantize_at"] = wish.base.quantize_at
        if own.ranks:
            found["ranks"] = "none"
        found.update({f"tilt {name}": wish.tilts.get(name, 0.0) for name in self._tilted()})
        return found

    def fitted(self, wish: Wish) -> Fitted:
        """Return the candidate of a wish.

        Raises:
            DwindleError: The budget is out of its reach.
        """
        found = self.fitter.fit(wish.base, wish.how(self._widths, self.curves))
        if found is None:
            raise DwindleError("the budget is out of reach of this candidate")
        return found

    def assess(self, candidate: Mapping[str, Any], report: Report) -> Assessment:
        """Fit the counts of a wish to the budget, and score the candidate where it fits."""
        found = self.fitted(Wish.from_json(candidate))
        costs = self.fitter.bench.shares(found.costs)
        violations = {"budget": found.over - 1.0 if not found.fits else min(0.0, found.over - 1.0)}
        score = self._assess(found.candidate, report) if found.fits else 0.0
        return Assessment(
            {"score": score},
            costs=costs,
            violations=violations,
            attributes={"candidate": found.candidate.to_json(), "stages": found.candidate.stages()},
        )

    def _tilted(self) -> list[str]:
        """Names of the axes of the whole model; axes of variants that are named otherwise are not tilted."""
        variant = self.fitter.workpiece.variant()
        return [own.name for own in variant.space.variables] if variant.can_shrink else []


def _standing(layers: Iterable[str], blocks: Sequence[str]) -> tuple[str, ...]:
    """Return the layers that lie in none of the blocks that go."""
    return tuple(path for path in layers if not any(f"{path}.".startswith(f"{block}.") for block in blocks))
