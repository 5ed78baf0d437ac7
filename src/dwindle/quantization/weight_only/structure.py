"""In which order linear layers are called, which of them read the same tensor, and whether its scale is free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.quantization.free_scales import FreeScales
from dwindle.quantization.recording import Operation, Value, record
from dwindle.training.inputs import Inputs


@dataclass
class Reading:
    """Layers that read one tensor, once each.

    Attributes:
        layers: Their names, in the order of their calls.
        calls: How often each is called in a forward.
    """

    layers: list[str]
    calls: int = 1


def readings(model: nn.Module, example: Inputs, names: Collection[str]) -> list[Reading]:
    """Return the layers by what they read, in the order of the first calls; layers that are never called are left out.

    Args:
        model: Run once, in evaluation mode.
        example: Its arguments.
        names: Names of the linear layers.
    """
    recording = record(model, *example)
    producers = recording.producers()
    seen: dict[str, list[int]] = {}
    for operation in recording.operations:
        name = operation.key.module
        if name in names and operation.key.operation in ("linear", "addmm"):
            value = _input(operation)
            if value is not None:
                seen.setdefault(name, []).append(_outside(value, name, producers).index)
    by_value: dict[int, Reading] = {}
    found: list[Reading] = []
    for name, values in seen.items():
        if len(values) > 1:
            found.append(Reading([name], len(values)))
        elif values[0] in by_value:
            by_value[values[0]].layers.append(name)
        else:
            by_value[values[0]] = Reading([name])
            found.append(by_value[values[0]])
    return found


def _input(operation: Operation) -> Value | None:
    """Return the tensor that is multiplied with the weight."""
    found = operation.at(0, "input") if operation.key.operation == "linear" else operation.at(1, "mat1")
    return None if found is None else found[1]


def _outside(value: Value, name: str, producers: dict[int, Operation]) -> Value:
    """Go back from a view that the layer itself made to what it was given."""
    while value.index in producers and producers[value.index].key.module == name:
        before = producers[value.index].active_inputs
        if len(before) != 1:
            break
        value = before[0][1]
    return value


def free_units(scales: FreeScales, reading: Reading) -> Tensor | None:
    """Return the unit of each channel that layers read, where each can be scaled and no other weight reads it.

    Args:
        scales: The free scales of the model.
        reading: The layers.

    Returns:
        int64 ``[columns]``; None where that cannot be.
    """
    names = [f"{layer}.weight" for layer in reading.layers]
    units = scales.channels.get(names[0])
    if reading.calls > 1 or units is None:
        return None
    if bool((units == 0).any()) or len(units.unique()) < len(units):
        return None
    if any(bool(torch.isin(own, units).any()) for name, own in scales.read.items() if name not in names):
        return None
    same = all(name in scales.channels and torch.equal(scales.channels[name], units) for name in names)
    return units if same else None
