"""The operations of a model's forward and the values that flow between them, as one run showed them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from dwindle.quantization.calls import (
    CallKey,
    CallMode,
    ModulePath,
    Position,
    run_with,
    tensors_in,
    tensors_with_positions,
)


@dataclass
class Value:
    """A tensor that was seen.

    Attributes:
        index: Its number.
        floating: True for floating dtypes.
        active: True when it depends on the model's inputs; False for parameters and what is made of them.
        name: Name of the parameter or buffer, where it is one.
        rank: Number of dimensions.
    """

    index: int
    floating: bool
    active: bool
    name: str | None
    rank: int


@dataclass
class Operation:
    """One call: what went in where, and what came out."""

    key: CallKey
    inputs: list[tuple[Position, Value]]
    outputs: list[Value]
    numbers: dict[int | str, Any] = field(default_factory=dict)

    @property
    def active_inputs(self) -> list[tuple[Position, Value]]:
        """Inputs that depend on the model's inputs and are floating."""
        return [(position, value) for position, value in self.inputs if value.active and value.floating]

    def at(self, index: int, keyword: str) -> tuple[Position, Value] | None:
        """Return the tensor argument given by position or by keyword, or None."""
        for position, value in self.inputs:
            if position in ((index,), (keyword,)):
                return position, value
        return None


@dataclass
class Recording:
    """All operations of one forward, in order.

    Attributes:
        operations: The calls that take and give tensors.
        results: Values that the model gives back.
    """

    operations: list[Operation]
    results: set[int]

    def producers(self) -> dict[int, Operation]:
        """Return which operation made each value."""
        return {value.index: operation for operation in self.operations for value in operation.outputs}

    def consumers(self) -> dict[int, list[tuple[Operation, Position]]]:
        """Return which operations take each value, and where."""
        found: dict[int, list[tuple[Operation, Position]]] = {}
        for operation in self.operations:
            for position, value in operation.inputs:
                found.setdefault(value.index, []).append((operation, position))
        return found


class RecordingMode(CallMode):
    """Writes down every call that takes and gives tensors."""

    def __init__(
        self,
        path: ModulePath,
        names: dict[int, str],
        inputs: Sequence[Tensor],
        passed_over: Container[CallKey],
    ) -> None:
        super().__init__(path)
        self.names = names
        self.passed_over = passed_over
        self.operations: list[Operation] = []
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # identities stay unique only while the tensors live
        self.made = 0
        for tensor in inputs:
            self._new(tensor, active=True)

    def _new(self, tensor: Tensor, active: bool) -> Value:
        value = Value(self.made, tensor.is_floating_point(), active, self.names.get(id(tensor)), tensor.dim())
        self.made += 1
        self.values[id(tensor)] = value
        self.alive.append(tensor)
        return value

    def value_of(self, tensor: Tensor) -> Value:
        """Return the value that a tensor object holds now."""
        value = self.values.get(id(tensor))
        return value if value is not None else self._new(tensor, active=False)

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call and write it down."""
        if key in self.passed_over:
            return args[0]
        inputs = [(p, self.value_of(tensor)) for p, tensor in tensors_with_positions(args, kwargs)]
        given = {id(tensor) for _, tensor in tensors_with_positions(args, kwargs)}
        output = func(*args, **kwargs)
        results = list(tensors_in(output))
        in_place = (
            key.operation.endswith("_")
            or bool(kwargs.get("inplace", False))
            or _positional_inplace(key, args)
        )
        if not results or (not in_place and all(id(tensor) in given for tensor in results)):
            return output
        active = any(value.active for _, value in inputs)
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        numbers = {
            place: value for place, value in places if isinstance(value, int | float | str | type(None))
        }
        outputs = [self._new(tensor, active) for tensor in results]
        self.operations.append(Operation(key, inputs, outputs, numbers))
        return output


def _positional_inplace(key: CallKey, args: tuple[Any, ...]) -> bool:
    """Functions such as ``F.relu(x, True)`` take ``inplace`` as their last positional argument."""
    return key.operation in ("relu", "relu6", "hardtanh", "hardswish", "silu") and args[-1] is True


Mode = TypeVar("Mode", bound=RecordingMode)


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], passed_over: Container[CallKey] = ()
) -> Recording:
    """Run a model once and write down its operations.

    Args:
        model: Run in evaluation mode, without gradients; left as it was.
        args: Positional inputs.
        kwargs: Keyword inputs.
        passed_over: Calls that give back their first argument instead of running (folded normalizations).
    """
    return record_with(RecordingMode, model, args, kwargs, passed_over)[0]


def record_with(
    kind: type[Mode],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    passed_over: Container[CallKey] = (),
) -> tuple[Recording, Mode]:
    """Do as :func:`record` with a subclass of the mode, and return the mode as well."""
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    mode = kind(ModulePath(), names, list(tensors_in([list(args), kwargs])), passed_over)
    results = run_with(model, mode, args, kwargs)
    return Recording(mode.operations, {mode.value_of(tensor).index for tensor in tensors_in(results)}), mode


def rectified_calls(recording: Recording) -> frozenset[CallKey]:
    """Return the calls whose output goes into a ReLU and nowhere else."""
    consumers = recording.consumers()
    found = []
    for operation in recording.operations:
        value = operation.outputs[0]
        readers = [reader.key.operation for reader, _ in consumers.get(value.index, ())]
        if (
            len(operation.outputs) == 1
            and value.index not in recording.results
            and readers in (["relu"], ["relu_"])
        ):
            found.append(operation.key)
    return frozenset(found)
