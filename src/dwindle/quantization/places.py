"""Where quantizers stand, as plain data: what the placement decides and everything else goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dwindle.quantization.calls import CallKey, Position
from dwindle.quantization.numbers import NumberFormat


@dataclass
class WeightPlace:
    """A weight that is quantized where a call reads it.

    Attributes:
        position: Where the weight stands among the call's arguments.
        name: What to call it: the parameter's path, or the call's.
        form: Its levels.
        axis: Dimension with one scale per index, or None for one scale.
        bias: Where the bias stands, if the call has one.
        input_quantizer: The quantizer of the call's activation.
        bias_name: The bias parameter's path, if it is one.
        block: How many neighbours along the other dimension share a scale; None for all of them.
    """

    position: Position
    name: str
    form: NumberFormat
    axis: int | None
    bias: Position | None
    input_quantizer: int
    bias_name: str | None = None
    block: int | None = None


@dataclass
class Placement:
    """All quantizers of a model.

    Attributes:
        names: Name of each activation quantizer, by its number.
        forms: Levels of each activation quantizer, by its number.
        outputs: Which quantizer stands on the output of a call.
        inputs: Which quantizer stands on which argument of a call.
        weights: The quantized weight of a call.
        reasons: Why a call stays in float, where something else was possible.
        averages: Quantizers of what a gate is computed from: of few values, so that new data may well exceed the range.
    """

    names: list[str] = field(default_factory=list)
    forms: list[NumberFormat] = field(default_factory=list)
    outputs: dict[CallKey, int] = field(default_factory=dict)
    inputs: dict[CallKey, dict[Position, int]] = field(default_factory=dict)
    weights: dict[CallKey, WeightPlace] = field(default_factory=dict)
    reasons: dict[CallKey, str] = field(default_factory=dict)
    averages: set[int] = field(default_factory=set)


def summarize(placement: Placement) -> Mapping[str, int]:
    """Return how many quantizers of each kind there are, for logs and histories."""
    return {
        "activations": len(placement.names),
        "weights": len(placement.weights),
        "places": len(placement.outputs) + sum(len(places) for places in placement.inputs.values()),
    }
