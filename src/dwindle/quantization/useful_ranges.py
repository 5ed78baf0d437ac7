"""Which part of a value matters to the activation function that reads it.

A hard swish is zero below -3, and a hard sigmoid does not change outside of -3 to 3. Levels spent there are lost, so a
quantizer whose value only such a function reads covers no more than the part that counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dwindle.quantization.places import Placement
from dwindle.quantization.recording import Recording


class Range(NamedTuple):
    """The values that make a difference."""

    low: float
    high: float


USEFUL = {
    "hardswish": Range(-3.0, math.inf),
    "hardsigmoid": Range(-3.0, 3.0),
    "relu6": Range(0.0, 6.0),
    "relu": Range(0.0, math.inf),
}
"""Functions that do not change outside of a range, by the name they are called by."""


def useful_ranges(recording: Recording, placement: Placement) -> dict[int, Range]:
    """Return the range that matters of each quantizer whose values nothing but such functions read.

    Args:
        recording: The operations of the model.
        placement: Where its quantizers stand.
    """
    consumers = recording.consumers()
    found: dict[int, Range | None] = {}
    for operation in recording.operations:
        number = placement.outputs.get(operation.key)
        for value in operation.outputs if number is not None else ():
            readers = {reader.key.operation for reader, _ in consumers.get(value.index, ())}
            name = next(iter(readers), "")
            alone = len(readers) == 1 and value.index not in recording.results
            own = USEFUL.get(name) if alone else None
            assert number is not None
            found[number] = own if found.get(number, own) == own else None
    read_elsewhere = {number for places in placement.inputs.values() for number in places.values()}
    return {number: own for number, own in found.items() if own is not None and number not in read_elsewhere}
