"""What values a quantized model's quantizers see, as histograms beside the range that their levels stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.layer_errors import twins
from dwindle.quantization.levels import spread_over
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers.growing_histogram import GrowingHistogram
from dwindle.quantization.simulation import BUFFERS, SimulationMode, WeightSlot, simulation_of
from dwindle.training.inputs import input_batches
from dwindle.training.progress import tracked

FINE = 2048
"""Bins while values are counted; a picture has fewer."""


@dataclass(frozen=True)
class ValueHistogram:
    """The values of one activation quantizer or of one weight.

    Attributes:
        name: The quantizer's or the weight's name.
        kind: ``activation`` or ``weight``.
        bits: Bits of its levels.
        range: Smallest and largest value that its levels stand for; of a weight with several scales, the widest.
        seen: Smallest and largest finite value.
        clipped: Share of the values outside of their range.
        first: Left edge of the first bin.
        width: Width of a bin.
        counts: How many values lie in each bin.
    """

    name: str
    kind: Literal["activation", "weight"]
    bits: int
    range: tuple[float, float]
    seen: tuple[float, float]
    clipped: float
    first: float
    width: float
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ValueHistogram:
        """Return what :meth:`to_json` gave."""
        pairs = {name: tuple(values[name]) for name in ("range", "seen", "counts")}
        return cls(**{**values, **pairs})


def value_histograms(
    model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    bins: int = 64,
) -> list[ValueHistogram]:
    """Count the values that reach each quantizer of a quantized model.

    Args:
        model: The float model that was quantized.
        quantized: What :func:`dwindle.quantize` made of it.
        data: Batches, as :func:`dwindle.quantize` takes them.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Read at most so many batches.
        bins: Bins of each histogram, at most.

    Returns:
        The activations by their numbers, then the weights. Infinite values and NaN are counted nowhere.

    Raises:
        ConfigError: ``quantized`` was not made by dwindle or not of this model, or there are no batches.
    """
    simulation = simulation_of(quantized)
    mode = _Counting(simulation, tuple(getattr(quantized, name) for name in BUFFERS))
    _, changed = twins(model, quantized)
    for args, kwargs in tracked(input_batches(model, data, adapt, max_batches), "histograms: batches"):
        mode.counts.clear()  # calls are counted from the beginning of a forward
        run_with(changed, mode, args, kwargs)
    found = []
    for number, (name, form) in enumerate(zip(simulation.placement.names, simulation.forms, strict=True)):
        scale, zero_point = float(mode.scale[number]), int(mode.zero_point[number])
        histogram = mode.histograms.get(number)
        if histogram is not None and histogram.low <= histogram.high:
            ends = ((form.lowest - zero_point) * scale, (form.highest - zero_point) * scale)
            share = mode.clipped[number] / mode.seen[number]
            found.append(_histogram(name, "activation", form, ends, share, histogram, bins))
    for key, slot in simulation.slots.items():
        if key in mode.weights:
            found.append(_of_weight(mode.weights[key], slot, mode, bins))
    return found


class _Counting(SimulationMode):
    """Simulates, and counts what is rounded."""

    def __init__(self, simulation: Any, parameters: tuple[Tensor, ...]) -> None:
        super().__init__(simulation, parameters)
        self.histograms: dict[int, GrowingHistogram] = {}
        self.clipped: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.weights: dict[CallKey, Tensor] = {}

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Count the values before they are rounded."""
        self.histograms.setdefault(quantizer, GrowingHistogram(FINE)).add(value)
        form = self.simulation.forms[quantizer]
        levels = (value / self.scale[quantizer]).round() + self.zero_point[quantizer]
        outside = int(((levels < form.lowest) | (levels > form.highest)).sum())
        self.clipped[quantizer] = self.clipped.get(quantizer, 0) + outside
        self.seen[quantizer] = self.seen.get(quantizer, 0) + value.numel()
        return super().activation(value, quantizer)

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Keep the weight."""
        self.weights[key] = value.detach()
        return super().weight(value, key, slot)


def _of_weight(weight: Tensor, slot: WeightSlot, mode: _Counting, bins: int) -> ValueHistogram:
    place, part = slot.place, slice(slot.start, slot.start + slot.length)
    scale, zero_point = mode.weight_scale[part], mode.weight_zero_point[part]
    step, zero = (spread_over(own, weight, place.axis, place.block) for own in (scale, zero_point))
    levels = (weight / step).round() + zero
    clipped = float(((levels < place.form.lowest) | (levels > place.form.highest)).double().mean())
    low, high = (place.form.lowest - zero_point) * scale, (place.form.highest - zero_point) * scale
    histogram = GrowingHistogram(FINE)
    histogram.add(weight)
    ends = float(low.min()), float(high.max())
    return _histogram(place.name, "weight", place.form, ends, clipped, histogram, bins)


def _histogram(
    name: str,
    kind: Literal["activation", "weight"],
    form: NumberFormat,
    ends: tuple[float, float],
    clipped: float,
    histogram: GrowingHistogram,
    bins: int,
) -> ValueHistogram:
    first, width, counts = merged(histogram, bins)
    seen = (histogram.low, histogram.high)
    return ValueHistogram(name, kind, form.bits, ends, seen, clipped, first, width, counts)


def merged(histogram: GrowingHistogram, bins: int) -> tuple[float, float, tuple[int, ...]]:
    """Return a histogram cut to the bins that hold values, neighbours merged until there are at most ``bins``.

    Args:
        histogram: The fine histogram.
        bins: Bins that may be left.

    Returns:
        The left edge of the first bin, the width of each, and the counts.
    """
    used = np.flatnonzero(histogram.counts)
    width = 2 * histogram.reach / histogram.bins
    start, stop = int(used[0]), int(used[-1]) + 1
    together = math.ceil((stop - start) / bins)
    counts = np.pad(histogram.counts[start:stop], (0, -(stop - start) % together))
    sums = counts.reshape(-1, together).sum(1)
    return -histogram.reach + start * width, width * together, tuple(int(count) for count in sums)


__all__ = ["ValueHistogram", "value_histograms"]
