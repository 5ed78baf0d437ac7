"""Predicts the latency of a cut model in a runtime from the times of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.realize.cost import CostModel
from dwindle.search.latency_prediction.calibration import Calibration, PredictionError
from dwindle.search.latency_prediction.price_list import PriceList
from dwindle.search.latency_prediction.segments import CLASSES, Segment
from dwindle.search.latency_prediction.widths import cell, interpolated, knots
from dwindle.search.space import Space, Variable

__all__ = ["LatencyPredictor", "SlowCut"]

#: Differences below this share of a time are not told apart.
NOISE = 0.01


@dataclass(frozen=True, slots=True)
class SlowCut:
    """A cut that makes the model slower than a smaller cut would.

    Attributes:
        name: The variable.
        count: How many indices stay.
        better: A larger count that is faster.
        seconds: What the model takes.
        better_seconds: What it takes with the larger count.
    """

    name: str
    count: int
    better: int
    seconds: float
    better_seconds: float


@dataclass(eq=False)
class LatencyPredictor:
    """Predicts latency from counts; made by :func:`latency_predictor`.

    Attributes:
        runtime: Label of the runtime.
        precision: ``"float32"`` or ``"int8"``.
        space: The variables that may shrink.
        segments: The layers of the file.
        prices: Times of layer shapes.
        calibration: How they add up, and how well.
        work: Multiply-accumulates of the model as a function of counts.
        float_seconds: Measured latency of the whole float model.
        measured: Counts and seconds of the whole models that it was calibrated on.
        translation: For a model that was cut since: its leaves by those of the model that was measured.
    """

    runtime: str
    precision: str
    space: Space
    segments: Sequence[Segment]
    prices: PriceList
    calibration: Calibration
    work: CostModel
    float_seconds: float
    measured: Sequence[tuple[Counts, float]] = ()
    translation: Mapping[Axis, Axis] | None = None
    _links: list[tuple[list[int], bool, list[int], bool]] = field(default_factory=list)
    _known: dict[tuple[int, tuple[float, ...]], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note which segments feed which."""
        if not self._links:
            self._links = links(self.segments)

    # predictions

    @property
    def error(self) -> PredictionError:
        """Relative errors for whole models that were measured, each left out of the fit that predicts it."""
        return self.calibration.error

    def seconds(self, counts: Counts) -> float:
        """Return the latency of one forward pass of the example inputs, in seconds.

        Args:
            counts: How many indices of each axis stay; axes that are not named keep all.
        """
        own = self._own(counts)
        return self.calibration.seconds(self._classes(own), self.work.macs(own))

    def share(self, counts: Counts) -> float:
        """Return the latency as a share of the whole float model's."""
        return self.seconds(counts) / self.float_seconds

    def layers(self, counts: Counts) -> dict[str, float]:
        """Return the seconds of each layer with what is fused into it, by the path of its module."""
        found: dict[str, float] = {}
        for segment, seconds in zip(self.segments, self._by_segment(self._own(counts)), strict=True):
            found[segment.layer] = found.get(segment.layer, 0.0) + seconds
        return found

    def table(self, counts: Counts | None = None) -> list[dict[str, Any]]:
        """Return one row for each layer: its path, its class, its operators and shape, seconds and share of all.

        Args:
            counts: None means the whole model.
        """
        own = self._own(counts or {})
        total = self.seconds(counts or {})
        rows = []
        for segment, seconds in zip(self.segments, self._by_segment(own), strict=True):
            values = [max(1, round(value)) for value in segment.values(own)]
            rows.append(
                {
                    "layer": segment.layer,
                    "class": segment.kind,
                    "shape": segment.description(values),
                    "seconds": seconds,
                    "share": seconds / total,
                }
            )
        return rows

    def _by_segment(self, own: Counts) -> list[float]:
        """Return the seconds of each segment: with those that belong to no layer, and changes of layout, they are all.

        Args:
            own: Counts of the leaves that the segments know.
        """
        calibration, classes = self.calibration, self._classes(own)
        layers = float(np.dot(calibration.scales, classes))
        all_layers = calibration.seconds(classes, self.work.macs(own)) - calibration.start
        factor = all_layers / layers if layers > 0 and calibration.trust < 1 else 1.0
        return [
            factor * calibration.scales[CLASSES.index(segment.kind)] * float(self._time(number, own)[0])
            for number, segment in enumerate(self.segments)
        ]

    def prepare(self, several: Iterable[Counts]) -> None:
        """Measure all layer shapes that predictions for these counts need, with a bar."""
        wanted: list[tuple[Segment, tuple[int, ...]]] = []
        for counts in several:
            own = self._own(counts)
            for segment in self.segments:
                interpolated(segment.values(own), _sizes(segment), _noting(segment, wanted))
        self.prices.measure(wanted)

    # widths

    def widths(self, variable: str | Variable) -> list[int]:
        """Return the counts that the hardware likes: those that no larger count is as fast as, all others kept whole.

        Args:
            variable: One of the space, or its name.

        Raises:
            ConfigError: There is no such variable.
        """
        chosen = self._variable(variable)
        candidates = [count for count in knots(chosen.size) if count >= chosen.least]
        times = {count: self._around(chosen, {chosen.axis: count}) for count in candidates}
        liked: list[int] = []
        fastest = float("inf")
        for count in sorted(candidates, reverse=True):
            if times[count] < fastest * (1 - NOISE) or count == chosen.size:
                liked.append(count)
                fastest = times[count]
        return liked[::-1]

    def settled(self, counts: Counts) -> Counts:
        """Return counts of which each is the largest nearby that takes no longer: what is cut saves time.

        Args:
            counts: None of the returned ones is below these.
        """
        counts = {**self.space.full(), **counts}
        for variable in self.space.variables:
            now = self._around(variable, counts)
            best = counts[variable.axis]
            for count in self._larger(variable, counts[variable.axis]):
                if self._around(variable, {**counts, variable.axis: count}) <= now * (1 + NOISE / 10):
                    best = count
            counts[variable.axis] = best
        return self.space.solved(counts)

    def slower(self, counts: Counts) -> list[SlowCut]:
        """Return the cuts that make the model slower than a larger count of the same variable would."""
        counts = {**self.space.full(), **counts}
        found = []
        for variable in self.space.variables:
            now = self._around(variable, counts)
            times = {
                count: self._around(variable, {**counts, variable.axis: count})
                for count in self._larger(variable, counts[variable.axis])
            }
            best = min(times, key=lambda count: times[count], default=None)
            if best is not None and times[best] < now * (1 - NOISE):
                seconds = self.seconds(counts), self.seconds({**counts, variable.axis: best})
                found.append(SlowCut(variable.name, counts[variable.axis], best, *seconds))
        return found

    def _larger(self, variable: Variable, count: int) -> list[int]:
        """Counts above one that may be as fast: measured widths of the next cells, and the whole."""
        if count >= variable.size:
            return []
        end = count + 2 * cell(count)
        near = [width for width in knots(variable.size) if count < width <= end]
        return [*near, variable.size] if variable.size > end else near

    def _around(self, variable: Variable, counts: Counts) -> float:
        """Seconds of the layers that depend on a variable."""
        own = self._own(counts)
        leaf = self._measured_leaf(variable.axis)
        total = 0.0
        for number, segment in enumerate(self.segments):
            if any(leaf in set(axis.leaves()) for axis in segment.variables):
                scale = self.calibration.scales[CLASSES.index(segment.kind)]
                total += scale * float(self._time(number, own).sum())
        return total

    def _variable(self, variable: str | Variable) -> Variable:
        if isinstance(variable, Variable):
            return variable
        if variable not in self.space.by_name:
            raise ConfigError(
                f"there is no variable {variable!r}{did_you_mean(variable, self.space.by_name)}"
            )
        return self.space.by_name[variable]

    # a model that was cut since

    def bound_to(self, analysis: Analysis, space: Space) -> LatencyPredictor:
        """Return the same predictor for counts of the analysis of the model as it is now, cut or not.

        Args:
            analysis: Of the model as it is now.
            space: Its variables.
        """
        by_place = {place: info.axis for info in analysis.axes for place in info.parameter_dims}
        translation = {}
        for leaf, places in self._places().items():
            found = next((by_place[place] for place in places if place in by_place), None)
            if found is not None:
                translation[leaf] = found
        return replace(self, space=space, translation=translation)

    def _places(self) -> Mapping[Axis, list[tuple[str, int]]]:
        """Parameters and dimensions of each leaf of the model that was measured."""
        if self.translation is None:
            return {variable.axis: variable.info.parameter_dims for variable in self.space.variables}
        infos = {variable.axis: variable.info.parameter_dims for variable in self.space.variables}
        return {leaf: infos[now] for leaf, now in self.translation.items() if now in infos}

    def _measured_leaf(self, leaf: Axis) -> Axis:
        if self.translation is None:
            return leaf
        return next((old for old, now in self.translation.items() if now is leaf), leaf)

    def _own(self, counts: Counts) -> Counts:
        """Counts of the leaves that the segments know."""
        if self.translation is None:
            return counts
        return {old: counts.get(now, now.size) for old, now in self.translation.items()}

    # composition

    def _time(self, number: int, counts: Counts) -> np.ndarray:
        """Times inside, to enter and to leave of a segment."""
        segment = self.segments[number]
        values = segment.values(counts)
        key = (number, values)
        if key not in self._known:
            self._known[key] = interpolated(values, _sizes(segment), self._measured(segment))
        return self._known[key]

    def _measured(self, segment: Segment) -> Callable[[tuple[int, ...]], np.ndarray]:
        def measured(values: tuple[int, ...]) -> np.ndarray:
            found = self.prices.time(segment, values)
            return np.array([found.inside, found.enter, found.leave])

        return measured

    def _classes(self, counts: Counts) -> np.ndarray:
        return composed(self.segments, self._links, lambda number: self._time(number, counts))


def composed(
    segments: Sequence[Segment],
    joints: Sequence[tuple[list[int], bool, list[int], bool]],
    time_of: Callable[[int], np.ndarray],
) -> np.ndarray:
    """Return the seconds of each class of :data:`CLASSES`, and of changes of layout between layers at last.

    A result is brought out of the layout of its kernel, and an input into one, only where the neighbour wants another.
    """
    times = [time_of(number) for number in range(len(segments))]
    sums = np.zeros(len(CLASSES) + 1)
    for segment, own, (makers, from_input, readers, to_output) in zip(segments, times, joints, strict=True):
        sums[CLASSES.index(segment.kind)] += own[0]
        if own[1] > 0:
            plain = [times[maker][2] <= 0 for maker in makers] + [True] * from_input
            sums[-1] += own[1] * (sum(plain) / len(plain) if plain else 1.0)
        if own[2] > 0:
            plain = [times[reader][1] <= 0 for reader in readers] + [True] * to_output
            sums[-1] += own[2] * (any(plain) if plain else 1.0)
    return sums


def links(segments: Sequence[Segment]) -> list[tuple[list[int], bool, list[int], bool]]:
    """Return for each segment who makes its inputs, whether the file's inputs are among them, who reads its results,
    and whether they are results of the file.
    """
    home = {name: number for number, segment in enumerate(segments) for name in segment.outputs}
    makers = [sorted({home[name] for name in own.reads if name in home}) for own in segments]
    readers = [
        [reader for reader, own in enumerate(makers) if number in own] for number in range(len(segments))
    ]
    return [
        (
            makers[number],
            any(name in own.template.inputs for name in own.reads),
            readers[number],
            any(name in own.template.outputs for name in own.outputs),
        )
        for number, own in enumerate(segments)
    ]


def _sizes(segment: Segment) -> list[int]:
    return [axis.size for axis in segment.variables]


def _noting(
    segment: Segment, wanted: list[tuple[Segment, tuple[int, ...]]]
) -> Callable[[tuple[int, ...]], np.ndarray]:
    def noted(values: tuple[int, ...]) -> np.ndarray:
        wanted.append((segment, values))
        return np.zeros(3)

    return noted
