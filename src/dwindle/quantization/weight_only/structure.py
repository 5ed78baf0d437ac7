"""In which order linear layers are called, which of them read the same tensor, and what made that tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from dwindle.quantization.recording import Operation, Recording, Value, record
from dwindle.training.inputs import Inputs

_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
_NORMS = ("layer_norm", "rms_norm")


@dataclass
class Reading:
    """Layers that read one tensor, once each.

    Attributes:
        layers: Their names, in the order of their calls.
        calls: How often each is called in a forward.
        scalable: Names of parameters; dividing each along its first dimension by the same numbers, one for each
            channel, divides the tensor that these layers read, and nothing else. Empty when there is no such place.
    """

    layers: list[str]
    calls: int = 1
    scalable: list[str] = field(default_factory=list)


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
    graph = _Graph(model, recording)
    for index, reading in by_value.items():
        reading.scalable = graph.scalable(index, set(reading.layers))
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


class _Graph:
    """Finds parameters whose scale is the scale of a value."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.producers, self.consumers = recording.producers(), recording.consumers()
        self.results = recording.results
        self.own = {name for name, _ in model.named_parameters()}
        self.uses = Counter(value.name for operation in recording.operations for _, value in operation.inputs)
        holders: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        self.shared = {name for name, own in model.named_parameters() if holders[id(own)] > 1}

    def scalable(self, index: int, readers: set[str]) -> list[str]:
        """Return the parameters behind a value that only these modules read; see :class:`Reading`."""
        if index in self.results or any(
            operation.key.module not in readers for operation, _ in self.consumers.get(index, [])
        ):
            return []
        return self._behind(index)

    def _behind(self, index: int) -> list[str]:
        operation = self.producers.get(index)
        if operation is None or len(operation.outputs) != 1:
            return []
        kind = operation.key.operation
        if kind in _PRODUCTS:
            return next((found for found in self._factors(operation) if found), [])
        if kind in _NORMS or kind == "linear":
            # layer_norm(input, shape, weight, bias); rms_norm(input, shape, weight); linear(input, weight, bias)
            first = 1 if kind == "linear" else 2
            given = [operation.at(first, "weight"), operation.at(first + 1, "bias")]
            names = [entry[1].name for entry in given if entry is not None]
            wanted = given[0] is not None and all(name is not None for name in names)
            return self._free([name for name in names if name is not None]) if wanted else []
        return []

    def _factors(self, operation: Operation) -> Iterator[list[str]]:
        """Yield what is behind each factor of a product: the scale of one is the scale of the product."""
        largest = max(value.rank for _, value in operation.inputs)
        for _, value in operation.inputs:
            if value.name is not None and value.rank == 1:
                yield self._free([value.name])
            elif value.active and value.rank == largest and len(self.consumers[value.index]) == 1:
                yield self._behind(value.index)

    def _free(self, names: list[str]) -> list[str]:
        """Return the names, or nothing when one of them has another use."""
        if any(self.uses[name] != 1 or name in self.shared or name not in self.own for name in names):
            return []
        return names
