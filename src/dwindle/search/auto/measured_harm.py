"""What cutting each axis does to the outputs, measured, as the harm by which axes share what must go.

:func:`dwindle.sensitivity` cuts every axis alone, a few ratios each; here its curves become a harm that adds up over
axes, for the model itself and for variants of it without some blocks, or a share in which every axis loses as much as
costs the same drop alone (Li et al., arXiv:1608.08710, section 3.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from dwindle.graph.counts import Counts
from dwindle.search.auto.fitting import Share
from dwindle.search.auto.predicting import PredictedCosts
from dwindle.search.auto.variant import Variant
from dwindle.search.sensitivities import SensitivityResult
from dwindle.search.sensitivities.choosing import rising_drops
from dwindle.search.sensitivities.points import SensitivityPoint
from dwindle.search.sensitivity import ratio_at_drop
from dwindle.search.space import Space, Variable
from dwindle.search.trial import Point

__all__ = ["HarmCurves", "equal_drop_share"]

#: From this share of noise on, what is left of the outputs no longer falls as a product.
_NOISE = 0.95

#: So many drops are tried.
_STEPS = 200


@dataclass(frozen=True)
class HarmCurves:
    """Drops of axes that were cut alone.

    Attributes:
        curves: Ratios, from 0 on, and the drop at each, by a parameter and dimension that lie on the axis: those of an
            axis are the same in a model without some blocks.
    """

    curves: Mapping[tuple[str, int], tuple[Point, ...]]

    @classmethod
    def of(cls, space: Space, result: SensitivityResult) -> HarmCurves:
        """Return the curves of an analysis without a metric.

        Args:
            space: The axes of the model that was analysed.
            result: Has measured pruning.
        """
        points: dict[str, list[SensitivityPoint]] = {}
        for point in result.points:
            if point.kind == "pruning" and math.isfinite(point.drop):
                points.setdefault(point.target, []).append(point)
        found: dict[tuple[str, int], tuple[Point, ...]] = {}
        for variable in space.variables:
            own = points.get(variable.name, [])
            if own:
                drops = rising_drops(own)
                curve = ((0.0, 0.0), *zip([point.level for point in own], drops, strict=True))
                found.update(dict.fromkeys(variable.info.parameter_dims, curve))
        return cls(found)

    def of_variable(self, variable: Variable) -> tuple[Point, ...] | None:
        """Return the curve of an axis; None where it was not cut alone."""
        return next(
            (self.curves[place] for place in variable.info.parameter_dims if place in self.curves), None
        )

    def harm(self, variable: Variable, count: int) -> float:
        """Return what keeping ``count`` indices of an axis costs: minus the logarithm of what is left of the outputs.

        The share of noise in the outputs is bounded, so sums of it would have it that whoever has ruined an axis may
        ruin it more for nothing; shares of what is left multiply. Between measured ratios it is interpolated on
        straight lines, behind the last the last line goes on. An axis without a curve harms nothing: it moves with one
        that has.
        """
        curve = self.of_variable(variable)
        if curve is None or len(curve) < 2:
            return 0.0
        ratio = 1 - count / variable.size
        (before, low), (behind, high) = curve[0], curve[1]
        for start, end in itertools.pairwise(curve):
            (before, low), (behind, high) = start, end
            if ratio <= behind:
                break
        first, last = _lost(low), _lost(high)
        return max(0.0, first + (last - first) * (ratio - before) / (behind - before))


def equal_drop_share(curves: HarmCurves) -> Share:
    """Return the share in which every axis loses as much as costs the same drop alone.

    Args:
        curves: Measured drops. Axes without a curve stay whole, but for what constraints take.
    """

    def share(variant: Variant, costs: PredictedCosts) -> Counts | None:
        space = variant.space
        known = {
            v: [(ratio, -drop) for ratio, drop in own]
            for v in space.variables
            if (own := curves.of_variable(v))
        }
        if not known:
            return None
        high = max(-curve[-1][1] for curve in known.values())

        def counts(drop: float) -> Counts:
            return space.counts(
                {v.name: ratio_at_drop(own, drop, v.largest_ratio) for v, own in known.items()}
            )

        # times do not fall steadily with counts, so that halving would miss what fits
        for step in range(1, _STEPS + 1):
            found = counts(high * (step / _STEPS) ** 2)
            if max(costs.over(found)) <= 1:
                return found
        return None

    return share


def _lost(noise: float) -> float:
    """Return minus the logarithm of what a share of noise leaves, on a straight line where nearly nothing is left."""
    if noise < _NOISE:
        return -math.log1p(-noise)
    return -math.log1p(-_NOISE) + (noise - _NOISE) / (1 - _NOISE)
