"""What a runtime would compute in int8, operation by operation, and why not the rest: no data needed, only a forward.

``dwindle inspect MODEL --quantization`` prints it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.config.targets import Target
from dwindle.graph.recording import where
from dwindle.quantization.calls import CallKey
from dwindle.quantization.folding import apply_folds, find_folds
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.operators import Backend, get_backend
from dwindle.quantization.overrides import Overrides, overrides_from_config
from dwindle.quantization.placement import place
from dwindle.quantization.places import Placement
from dwindle.quantization.recording import Operation, Recording, RecordingMode, record_with
from dwindle.quantization.simulation import is_quantized
from dwindle.training.inputs import forward_inputs

State = Literal["int8", "fused", "moves", "float", "folded"]

_PRODUCTS = frozenset(
    ("matmul", "bmm", "mm", "einsum", "scaled_dot_product_attention", "__matmul__", "baddbmm")
)


@dataclass(frozen=True)
class OperationFact:
    """One operation and how it will run.

    Attributes:
        call: Module path, operation and count, such as ``layer1.0/conv2d/0``.
        state: ``int8`` (an integer kernel), ``fused`` (vanishes into the kernel before it), ``moves`` (only moves int8
            values), ``folded`` (batch normalization, now in the weights) or ``float``.
        reason: Why.
        line: Source line of the call.
        weight: The quantized weight, in words, or None.
        reads: Numbers of the quantizers whose values it reads; equal numbers share one scale.
        writes: Number of the quantizer on its output, or None.
    """

    call: str
    state: State
    reason: str
    line: str
    weight: str | None = None
    reads: tuple[int, ...] = ()
    writes: int | None = None


@dataclass(frozen=True)
class QuantizerFact:
    """One activation quantizer.

    Attributes:
        name: Where it stands first.
        levels: Its levels, in words.
        places: Calls that write or read through it: all of them share the scale.
    """

    name: str
    levels: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class PlacementFacts:
    """What a runtime will do with a model.

    Attributes:
        backend: The runtime.
        operations: All operations, in the order of the forward.
        quantizers: The activation quantizers by number.
        unheeded: Weights that the config_list gives a number format, but that no integer kernel reads.
        quantized_parameters: How many numbers the quantized weights hold.
        parameters: How many numbers the model holds.
    """

    backend: str
    operations: list[OperationFact]
    quantizers: list[QuantizerFact]
    unheeded: list[str]
    quantized_parameters: int
    parameters: int
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def describe(self) -> str:
        """Return a text for people."""
        share = self.quantized_parameters / max(self.parameters, 1)
        counts = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        lines = [f"{self.backend}: {share:.1%} of the parameters quantized; operations: {counts}", ""]
        width = max([len(fact.call) for fact in self.operations] + [4])
        for fact in self.operations:
            lines.append(f"  {fact.call:{width}}  {fact.state:6}  {_line_of(fact)}")
        lines += ["", "quantizers of activations (one scale each)"]
        for number, own in enumerate(self.quantizers):
            places = ", ".join(own.places[:4]) + (
                f", and {len(own.places) - 4} more" if len(own.places) > 4 else ""
            )
            lines.append(f"  #{number:<3} {own.levels}: {places}")
        if self.unheeded:
            lines += ["", "in the config_list, but read by no integer kernel, so left in float"]
            lines += [f"  {name}" for name in self.unheeded]
        return "\n".join(lines)


def _line_of(fact: OperationFact) -> str:
    parts = [fact.reason]
    if fact.weight is not None:
        parts.append(f"weight {fact.weight}")
    if fact.reads:
        parts.append("reads " + " ".join(f"#{number}" for number in fact.reads))
    if fact.writes is not None:
        parts.append(f"writes #{fact.writes}")
    return "; ".join(parts) + (f" ({fact.line})" if fact.line and fact.state == "float" else "")


def explain_placement(
    model: nn.Module,
    example_inputs: Any,
    *,
    backend: str | Backend = "onnxruntime",
    config_list: list[dict[str, Any]] | None = None,
    activation: NumberFormat | None = None,
) -> PlacementFacts:
    """Say what would run in int8 if a model was quantized for a runtime, and why not the rest.

    Args:
        model: A float model; it is not changed.
        example_inputs: What one forward takes: a tensor, a tuple, or a mapping of keyword inputs.
        backend: The runtime, as :func:`dwindle.quantize` takes it.
        config_list: Settings for single targets, as there.
        activation: Levels of activations; uint8 affine when not given.

    Raises:
        ConfigError: An argument is not valid, or the model is quantized already.
    """
    if is_quantized(model):
        raise ConfigError("this model is quantized already; inspect the original instead")
    table = get_backend(backend)
    overrides = overrides_from_config(model, config_list)
    own = copy.deepcopy(model).eval()
    args, kwargs = forward_inputs(own, example_inputs, lambda batch: batch)
    first = record_with(_WithLines, own, args, kwargs)
    folds = find_folds(own, first[0])
    apply_folds(own, folds)
    recording, mode = record_with(_WithLines, own, args, kwargs, {fold.call for fold in folds})
    placement = place(recording, table, overrides, activation)
    facts = _Facts(recording, placement, table, mode.lines)
    folded = {fold.call for fold in folds}
    operations = [
        OperationFact(str(operation.key), "folded", "in the weights of the layer before", "")
        if operation.key in folded
        else facts.of(operation.key)
        for operation in first[0].operations
    ]
    sizes = {name: parameter.numel() for name, parameter in own.named_parameters()}
    weights = {slot.name for slot in placement.weights.values()}
    return PlacementFacts(
        table.name,
        operations,
        _quantizers(placement),
        unheeded_weights(overrides, placement),
        sum(size for name, size in sizes.items() if name in weights),
        sum(sizes.values()),
        dict(Counter(fact.state for fact in operations)),
    )


class _WithLines(RecordingMode):
    """Also notes the source line of each call."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: dict[CallKey, str] = {}

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note where the call stands."""
        self.lines[key] = where()
        return super().on_call(key, func, args, kwargs)


class _Facts:
    """Says of each operation how it runs."""

    def __init__(
        self, recording: Recording, placement: Placement, backend: Backend, lines: Mapping[CallKey, str]
    ) -> None:
        self.placement, self.backend, self.lines = placement, backend, lines
        self.operations = {operation.key: operation for operation in recording.operations}
        self.producers, self.consumers = recording.producers(), recording.consumers()

    def of(self, key: CallKey) -> OperationFact:
        """Return the fact of one call."""
        operation = self.operations.get(key)
        if operation is None:  # passed over: its input is constant
            return OperationFact(
                str(key), "float", "it does not depend on the inputs", self.lines.get(key, "")
            )
        state, reason = self._state(operation)
        found = self.placement.weights.get(key)
        weight = None
        if found is not None:
            weight = f"{found.name}, {format_text(found.form)}, {_granularity(found.axis, found.block)}"
        reads = dict.fromkeys(self._read(operation))
        return OperationFact(
            str(key),
            state,
            reason,
            self.lines.get(key, ""),
            weight,
            tuple(reads),
            self.placement.outputs.get(key),
        )

    def _read(self, operation: Operation) -> list[int]:
        """Numbers of the quantizers through which a call sees its activations."""
        places = self.placement.inputs.get(operation.key, {})
        found = []
        for position, value in operation.active_inputs:
            producer = self.producers.get(value.index)
            number = places.get(position)
            if number is None and producer is not None:
                number = self.placement.outputs.get(producer.key)
            if number is not None:
                found.append(number)
        return found

    def _state(self, operation: Operation) -> tuple[State, str]:
        name, table, key = operation.key.operation, self.backend, operation.key
        writes = key in self.placement.outputs
        if key in self.placement.weights:
            reason = f"int8 kernel of {table.name}"
            behind = self.placement.reasons.get(key)
            return "int8", f"{reason}; its output stays float: {behind}" if behind else reason
        if writes and name in table.fused_activations and self._is_behind_kernel(operation):
            return "fused", "into the kernel before it"
        if writes and name in table.shared:
            return "moves", "keeps the scale of its input"
        if writes and name in table.concatenations:
            return "int8", "its operands share one scale"
        if writes or self._is_before_fused(operation):
            return "int8", f"int8 kernel of {table.name}"
        reason = self.placement.reasons.get(key, self._unsupported(operation))
        readers = self._rounding_readers(operation)
        return "float", f"{reason}; rounded for {', '.join(readers)}" if readers else reason

    def _is_behind_kernel(self, operation: Operation) -> bool:
        producer = self.producers.get(operation.active_inputs[0][1].index)
        outside = operation.key in self.placement.inputs
        return not outside and producer is not None and producer.key not in self.placement.outputs

    def _is_before_fused(self, operation: Operation) -> bool:
        """Whether an elementwise operation or a pool is rounded behind the activation that fuses with it."""
        table, key = self.backend, operation.key
        known = key.operation in table.elementwise or key.operation in table.pools
        return known and key not in self.placement.reasons

    def _rounding_readers(self, operation: Operation) -> list[str]:
        """Return the calls that round what this one gives before they read it."""
        return [
            str(reader.key)
            for value in operation.outputs
            for reader, position in self.consumers.get(value.index, ())
            if position in self.placement.inputs.get(reader.key, {})
        ]

    def _unsupported(self, operation: Operation) -> str:
        name = operation.key.operation
        if not operation.active_inputs:
            return "it reads no floating activation"
        if name in _PRODUCTS:
            return f"products of two activations are left in float for {self.backend.name}"
        if name in self.backend.fused_activations:
            return "it fuses only behind an int8 kernel that it alone reads"
        if name in self.backend.shared:
            return "its input is in float"
        return f"{self.backend.name} has no int8 kernel for {name}"


def _quantizers(placement: Placement) -> list[QuantizerFact]:
    places: dict[int, list[str]] = {}
    for key, number in placement.outputs.items():
        places.setdefault(number, []).append(f"{key} (out)")
    for key, readers in placement.inputs.items():
        for number in readers.values():
            places.setdefault(number, []).append(f"{key} (in)")
    return [
        QuantizerFact(name, format_text(form), tuple(places.get(number, ())))
        for number, (name, form) in enumerate(zip(placement.names, placement.forms, strict=True))
    ]


def format_text(form: NumberFormat) -> str:
    """Return levels in words: ``8 bits, 0 to 255, affine``."""
    return f"{form.bits} bits, {form.lowest} to {form.highest}, {'symmetric' if form.symmetric else 'affine'}"


def _granularity(axis: int | None, block: int | None) -> str:
    if axis is None:
        return "per tensor"
    return "per channel" if block is None else f"per group of {block}"


def unheeded_weights(overrides: Overrides, placement: Placement) -> list[str]:
    """Return the weights for which a number format is wished and that no integer kernel reads.

    Args:
        overrides: What the config_list says.
        placement: What came of it.
    """
    modules = {key.module for key in placement.weights}
    names = {found.name for found in placement.weights.values()}
    return [
        str(Target(module, name))
        for module, targets in overrides.settings.items()
        for name, setting in targets.items()
        if Target(module, name).is_parameter and setting.form is not None
        if str(Target(module, name)) not in names and not (name == "weight" and module in modules)
    ]


__all__ = ["OperationFact", "PlacementFacts", "QuantizerFact", "explain_placement", "unheeded_weights"]
