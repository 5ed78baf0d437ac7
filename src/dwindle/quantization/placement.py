"""Where quantizers stand: from the recorded operations and a runtime's table to places and shared scales.

Two kinds of places exist. A quantizer on the *output* of an operation is seen by everyone who reads the
value: behind convolutions and int8 sums, where the runtime's kernel itself writes int8. A quantizer on an
*input* is seen by that one reader only: a residual stream in float stays float although a linear layer beside
reads it in int8.
"""

from __future__ import annotations

from dwindle.quantization.calls import CallKey, Position
from dwindle.quantization.gates import gating_calls
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.operators import Backend, ComputeRule
from dwindle.quantization.overrides import Overrides
from dwindle.quantization.places import Placement, WeightPlace
from dwindle.quantization.recording import Operation, Recording, Value

_FLOAT_INPUT = "its input is in float"
_UNREAD = "nothing behind it reads int8"


class Placer:
    """Solves one model's placement. Use :func:`place`."""

    def __init__(
        self, recording: Recording, backend: Backend, overrides: Overrides, default: NumberFormat
    ) -> None:
        self.recording, self.backend, self.overrides, self.default = recording, backend, overrides, default
        self.producers = recording.producers()
        self.consumers = recording.consumers()
        self.result = Placement()
        self.parents: list[int] = []  # union-find over quantizers that share one scale
        self.carried: dict[int, int] = {}  # value -> quantizer that every reader of it sees
        self.edges: dict[tuple[int, NumberFormat], int] = {}
        self.compute: dict[CallKey, tuple[ComputeRule, Position, Value]] = {}
        self._wanted: dict[int, bool] = {}
        self.gating = gating_calls(recording, backend, overrides)

    def solve(self) -> Placement:
        """Return the placement."""
        for operation in self.recording.operations:
            self._choose_compute(operation)
        for operation in self.recording.operations:
            self._forward(operation)
        for operation in self.recording.operations:
            if operation.key in self.compute:
                self._quantize_compute(operation)
        return self._compact()

    # -- which operations run in int8

    def _choose_compute(self, operation: Operation) -> None:
        rule = self.backend.compute.get(operation.key.operation)
        if rule is None:
            return
        if self.overrides.is_float(operation.key.module):
            return self._stays(operation, f"config_list leaves {operation.key.module} in float")
        activation = operation.at(rule.input, rule.keywords[0])
        weight = operation.at(rule.weight, rule.keywords[1])
        if activation is None or weight is None or not weight[1].floating:
            return self._stays(operation, "its operands are not tensors of floating numbers")
        if weight[1].active:
            return self._stays(
                operation, "its weight is computed from the inputs, so it cannot be stored in int8"
            )
        if not (activation[1].active and activation[1].floating):
            return self._stays(operation, "it does not depend on the inputs: runtimes compute it once")
        self.compute[operation.key] = (rule, *activation)

    def _stays(self, operation: Operation, reason: str) -> None:
        """Note why an operation, or what it gives, stays in float."""
        self.result.reasons[operation.key] = reason

    def _is_int8_reader(self, operation: Operation, position: Position) -> bool:
        chosen = self.compute.get(operation.key)
        return chosen is not None and chosen[1] == position and operation.key not in self.gating

    def _demanded(self, value: Value) -> bool:
        """True when a compute operation reads the value in int8, directly."""
        return any(self._is_int8_reader(*reader) for reader in self.consumers.get(value.index, ()))

    def _wanted_after(self, value: Value) -> bool:
        """True when an int8 value here would be of use to someone further on."""
        if value.index not in self._wanted:
            self._wanted[value.index] = False
            self._wanted[value.index] = any(
                self._is_int8_reader(reader, position)
                or self._may_be_integer(reader)
                or (self._passes_on(reader) and any(self._wanted_after(made) for made in reader.outputs))
                for reader, position in self.consumers.get(value.index, ())
            )
        return self._wanted[value.index]

    def _passes_on(self, operation: Operation) -> bool:
        return self._shares(operation) or operation.key.operation in self.backend.pools

    def _may_be_integer(self, operation: Operation) -> bool:
        table = self.backend
        name = operation.key.operation
        return name in table.elementwise or name in table.concatenations

    def _shares(self, operation: Operation) -> bool:
        name = operation.key.operation
        if name not in self.backend.shared or len(operation.active_inputs) != 1:
            return False
        if name == "pad":  # only zero is exactly representable
            fill = operation.numbers.get("value", operation.numbers.get(3))
            mode = operation.numbers.get("mode", operation.numbers.get(2, "constant"))
            return mode != "constant" or fill in (None, 0)
        return True

    # -- walking with the data

    def _forward(self, operation: Operation) -> None:
        name = operation.key.operation
        if operation.key in self.compute:
            if operation.key in self.gating:
                self._stays(
                    operation, "it computes a gate from averages: an error would multiply a whole channel"
                )
            elif self.compute[operation.key][0].quantize_output or self._gains_by_integers(operation):
                self._carry_behind(operation)
        elif operation.key in self.result.outputs:
            return  # a fused activation whose quantizer stands already
        elif name in self.backend.elementwise:
            self._elementwise(operation)
        elif name in self.backend.concatenations:
            self._concatenate(operation)
        elif name in self.backend.pools:
            self._pool(operation)
        elif self._shares(operation):
            self._share(operation)

    def _gains_by_integers(self, operation: Operation) -> bool:
        """Say whether a kernel that may give either float or int8 should give int8."""
        if not self.backend.fuses_sums or self._fuses_into_sum(operation.outputs[0]):
            return False
        value, _ = self._with_activation(operation)
        return any(
            self._is_int8_reader(reader, position)
            or (self._adds_or_gates(reader) and self._wanted_after(reader.outputs[0]))
            or (
                (self._passes_on(reader) or reader.key.operation in self.backend.concatenations)
                and any(self._wanted_after(made) for made in reader.outputs)
            )
            for reader, position in self.consumers.get(value.index, ())
        )

    def _adds_or_gates(self, operation: Operation) -> bool:
        """Say whether an operation is a sum, or a product with a gate."""
        name = operation.key.operation
        gates = any(self._is_gate(value) for _, value in operation.active_inputs)
        return name in self.backend.sums or (name in self.backend.elementwise and gates)

    def _fuses_into_sum(self, value: Value) -> bool:
        """Say whether the kernel that makes a value also does the sum that is the only one to read it."""
        producer = self.producers.get(value.index)
        readers = self.consumers.get(value.index, [])
        return (
            self.backend.fuses_sums
            and producer is not None
            and producer.key in self.compute
            and value.index not in self.carried
            and value.index not in self.recording.results
            and len(readers) == 1
            and readers[0][0].key.operation in self.backend.sums
        )

    def _with_activation(self, operation: Operation) -> tuple[Value, Operation]:
        """Return what comes behind an operation and the activation that fuses with it, and the last of both."""
        value = operation.outputs[0]
        readers = self.consumers.get(value.index, [])
        if len(readers) == 1 and value.index not in self.recording.results:
            reader = readers[0][0]
            plain = len(reader.active_inputs) == 1 and len(reader.inputs) == 1
            if reader.key.operation in self.backend.fused_activations and plain:
                return reader.outputs[0], reader
        return value, operation

    def _carry_behind(self, operation: Operation) -> None:
        """Put a quantizer on an operation's output, behind the activation that fuses with it."""
        value, last = self._with_activation(operation)
        if value.index in self.recording.results:
            return self._stays(last, "the model gives it back: results stay in full precision")
        form = self.overrides.output_form((last.key.module, operation.key.module), self.default)
        if form is None:
            return self._stays(last, "config_list leaves its output in float")
        quantizer = self._new(str(last.key), form)
        self.result.outputs[last.key] = quantizer
        self.carried[value.index] = quantizer

    def _elementwise(self, operation: Operation) -> None:
        operands = operation.active_inputs
        if len(operands) < 2 or len(operands) != len(operation.inputs):
            return self._stays(operation, "an operand is a constant: int8 kernels take two activations")
        if self.overrides.is_float_output(operation.key):
            return self._stays(operation, "config_list leaves its output in float")
        fusable = [value for _, value in operands if self._fuses_into_sum(value)]
        if not self._wanted_after(operation.outputs[0]):
            return self._stays(operation, _UNREAD)
        if len(fusable) == len(operands):  # one kernel takes what the others have given
            for value in fusable[:-1]:
                self._carry_behind(self.producers[value.index])
        carried = [value.index in self.carried for _, value in operands]
        if not any(carried):
            return self._stays(operation, "no operand comes in int8")
        fused = next((value for value in fusable if value.index not in self.carried), None)
        product = "mul" in operation.key.operation
        for (_, value), is_carried in zip(operands, carried, strict=True):
            gate = product and self._is_gate(value)
            if not (is_carried or self._demanded(value) or gate or value is fused):
                return self._stays(operation, f"its operand from {self._maker(value)} is in float")
        for position, value in operands:
            if value.index not in self.carried and value is not fused:
                self._edge(operation, position, value, self.default)
        self._carry_behind(operation)

    def _maker(self, value: Value) -> str:
        producer = self.producers.get(value.index)
        return "the model's input" if producer is None else str(producer.key)

    def _is_gate(self, value: Value) -> bool:
        producer = self.producers.get(value.index)
        return producer is not None and producer.key.operation in self.backend.gates

    def _concatenate(self, operation: Operation) -> None:
        operands = operation.active_inputs
        if not operands or len(operands) != len(operation.inputs):
            return self._stays(operation, "it joins constants")
        numbers = [self.carried.get(value.index) for _, value in operands]
        known = [number for number in numbers if number is not None]
        if len(known) != len(numbers):
            first = operands[numbers.index(None)][1]
            return self._stays(operation, f"its operand from {self._maker(first)} is in float")
        if len({self.result.forms[number] for number in known}) != 1:
            return self._stays(
                operation, "its operands have different levels, so they cannot share one scale"
            )
        if not self._wanted_after(operation.outputs[0]):
            return self._stays(operation, _UNREAD)
        for number in known[1:]:
            self._unite(known[0], number)
        self.carried[operation.outputs[0].index] = known[0]
        self.result.outputs[operation.key] = known[0]

    def _pool(self, operation: Operation) -> None:
        operands = operation.active_inputs
        if len(operands) != 1 or operands[0][1].index not in self.carried:
            self._stays(operation, _FLOAT_INPUT)
        elif not self._wanted_after(operation.outputs[0]):
            self._stays(operation, _UNREAD)
        else:
            self._carry_behind(operation)

    def _share(self, operation: Operation) -> None:
        quantizer = self.carried.get(operation.active_inputs[0][1].index)
        if quantizer is None or not any(self._wanted_after(value) for value in operation.outputs):
            return self._stays(operation, _FLOAT_INPUT if quantizer is None else _UNREAD)
        self.result.outputs[operation.key] = quantizer
        for value in operation.outputs:
            self.carried[value.index] = quantizer

    # -- inputs and weights of compute operations

    def _quantize_compute(self, operation: Operation) -> None:
        rule, position, value = self.compute[operation.key]
        module = operation.key.module
        wanted = self.overrides.input_form(module, self.default)
        if wanted is None:
            return self._stays(operation, f"config_list leaves {module} in float")
        carried = self.carried.get(value.index)
        if carried is None or self.result.forms[carried] != wanted:
            carried = self._edge(operation, position, value, wanted)
        if operation.key in self.gating:
            self.result.averages.add(carried)
        weight = operation.at(rule.weight, rule.keywords[1])
        bias = operation.at(rule.bias, rule.keywords[2])
        assert weight is not None
        form, axis, block = self.overrides.weight_form(module, weight[1], rule.weight_axis)
        if form is not None:
            constant = bias is not None and not bias[1].active
            self.result.weights[operation.key] = WeightPlace(
                position=weight[0],
                name=weight[1].name or f"{operation.key}",
                form=form,
                axis=axis,
                bias=bias[0] if bias is not None and constant else None,
                input_quantizer=carried,
                bias_name=bias[1].name if bias is not None and constant else None,
                block=block,
            )

    def _edge(self, operation: Operation, position: Position, value: Value, form: NumberFormat) -> int:
        """Quantize a value for one reader; readers of the same value and form share the quantizer."""
        hoisted = self._hoist(value, form)
        if hoisted is not None:
            return hoisted
        place = (value.index, form)
        if place not in self.edges:
            producer = self.producers.get(value.index)
            origin = str(producer.key) if producer is not None else f"input {value.index}"
            self.edges[place] = self._new(f"{origin} as input", form)
        self.result.inputs.setdefault(operation.key, {})[position] = self.edges[place]
        return self.edges[place]

    def _hoist(self, value: Value, form: NumberFormat) -> int | None:
        """Move a quantizer up through operations that only move values, when nobody else would notice.

        A ReLU keeps a scale too, but in front of it half of the levels would go to negative values.
        """
        producer = self.producers.get(value.index)
        if producer is None or value.index in self.carried or not self._shares(producer):
            return None
        if producer.key.operation in ("relu", "relu_"):
            return None
        if len(producer.outputs) != 1 or value.index in self.recording.results:
            return None
        readers = self.consumers[value.index]
        if form != self.default or not all(self._is_int8_reader(*reader) for reader in readers):
            return None
        if any(self.overrides.input_form(reader.key.module, self.default) != form for reader, _ in readers):
            return None
        position, source = producer.active_inputs[0]
        quantizer = self.carried.get(source.index)
        if quantizer is None or self.result.forms[quantizer] != form:
            quantizer = self._edge(producer, position, source, form)
        self.result.outputs[producer.key] = quantizer
        self.carried[value.index] = quantizer
        return quantizer

    # -- quantizers and their groups

    def _new(self, name: str, form: NumberFormat) -> int:
        self.result.names.append(name)
        self.result.forms.append(form)
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            number = self.parents[number]
        return number

    def _unite(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self.parents[max(first, second)] = min(first, second)

    def _compact(self) -> Placement:
        """Number the groups that are in use from zero and name them everywhere by their group."""
        old, used = self.result, Placement(reasons=self.result.reasons)
        numbers: dict[int, int] = {}

        def renumber(quantizer: int) -> int:
            root = self._root(quantizer)
            if root not in numbers:
                numbers[root] = len(numbers)
                used.names.append(old.names[root])
                used.forms.append(old.forms[root])
            return numbers[root]

        used.averages = {renumber(number) for number in old.averages}
        used.outputs = {key: renumber(number) for key, number in old.outputs.items()}
        used.inputs = {
            key: {position: renumber(number) for position, number in places.items()}
            for key, places in old.inputs.items()
        }
        for key, place in old.weights.items():
            place.input_quantizer = renumber(place.input_quantizer)
            used.weights[key] = place
        return used


def place(
    recording: Recording,
    backend: Backend,
    overrides: Overrides | None = None,
    default: NumberFormat | None = None,
) -> Placement:
    """Decide where quantizers stand.

    Args:
        recording: The operations of one forward.
        backend: What the runtime does in int8.
        overrides: What the user's ``config_list`` wants differently.
        default: Levels of activations; uint8 affine when not given.
    """
    form = default if default is not None else NumberFormat.parse("uint8")
    return Placer(recording, backend, overrides if overrides is not None else Overrides({}), form).solve()
