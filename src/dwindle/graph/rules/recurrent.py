"""LSTM, GRU and RNN: gates x hidden width, one width for all layers and directions of a module."""

from __future__ import annotations

from dataclasses import dataclass

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value, values_in
from dwindle.graph.rules.registry import Scope, freeze_everything, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True, slots=True)
class RecurrentCall:
    """The arguments of one call of a recurrent layer or cell, whether its sequences are packed or not.

    Attributes:
        data: Input: (batch, time, width) in either order, or (positions, width) when packed.
        packed: Whether the sequences are packed.
        states: Initial states.
        cells: The weights of each layer and direction: input, hidden, their biases, projection.
        directions: 1 or 2.
    """

    data: Value
    packed: bool
    states: list[Value]
    cells: list[list[Value]]
    directions: int

    @classmethod
    def of(cls, node: Node) -> RecurrentCall:
        """Read the arguments of a node."""
        if node.name.endswith("_cell"):
            weights = [value for argument in node.args[2:] for value in values_in(argument)]
            return cls(node.args[0], False, list(values_in(node.args[1])), [weights], 1)
        packed = "batch_sizes" in {argument.name for argument in node.target._schema.arguments}
        shift = 1 if packed else 0
        states = list(values_in(node.args[1 + shift]))
        weights = list(values_in(node.args[2 + shift]))
        # a projection shows in the first state, which then is narrower than the second one
        projected = len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]
        length = 2 + (2 if node.args[3 + shift] else 0) + int(projected)
        cells = [weights[start : start + length] for start in range(0, len(weights), length)]
        return cls(node.args[0], packed, states, cells, 2 if node.args[7 + shift] else 1)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(node: Node, scope: Scope) -> None:
    """Weights (gates x hidden, in), (gates x hidden, out); results (..., directions x out).

    What leaves a cell is its hidden state, or a projection of it (out, hidden).
    """
    call = RecurrentCall.of(node)
    gates = _GATES[node.name]
    hidden = scope.leaf(call.cells[0][0].shape[0] // gates)
    projected = len(call.cells[0]) in (3, 5)
    leaving = scope.leaf(call.cells[0][-1].shape[0]) if projected else hidden
    if call.cells[0][1].shape[1] != leaving.size:
        freeze_everything(node, scope, f"{node.name} with weights of an unknown kind")
        return
    out = algebra.concatenation([leaving] * call.directions)
    flowing = call.data.axes[-1]
    for number, weights in enumerate(call.cells):
        _cell(weights[:-1] if projected else weights, flowing, hidden, leaving, gates, scope)
        if projected:
            scope.unify(weights[-1].axes[0], leaving)
            scope.unify(weights[-1].axes[1], hidden)
        if number % call.directions == call.directions - 1:
            flowing = out
    widths = [leaving, hidden]
    for state, width in zip(call.states, widths, strict=False):
        scope.unify(state.axes[-1], width)
        scope.freeze(state.axes[:1], "layers x directions")
    scope.freeze(call.data.axes[:-1], "batch and time of a recurrent layer")
    node.outputs[0].axes = [*call.data.axes[:-1], out]
    for output, width in zip(node.outputs[1:], widths, strict=False):
        output.axes = [*(scope.leaf(size, "recurrent state") for size in output.shape[:-1]), width]


def _cell(weights: list[Value], data: Axis, hidden: Axis, leaving: Axis, gates: int, scope: Scope) -> None:
    rows = algebra.product([scope.leaf(gates, "gates"), hidden])
    scope.unify(weights[0].axes[1], data)
    scope.unify(weights[1].axes[1], leaving)
    for value in weights:
        scope.unify(value.axes[0], rows)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(node: Node, scope: Scope) -> None:
    """One step of one layer: (batch, width) and states (batch, hidden)."""
    call = RecurrentCall.of(node)
    gates = _GATES[node.name.removesuffix("_cell")]
    hidden = scope.leaf(call.cells[0][0].shape[0] // gates)
    _cell(call.cells[0], call.data.axes[-1], hidden, hidden, gates, scope)
    for state in call.states:
        scope.unify(state.axes[-1], hidden)
    for output in node.outputs:
        output.axes = [*call.data.axes[:-1], hidden]


@rule("_pack_padded_sequence")
def pack(node: Node, scope: Scope) -> None:
    """(batch, time, ...) to (positions, ...) and the batch size of each step."""
    data, lengths = list(node.inputs())[:2]
    scope.freeze([*data.axes[:2], *lengths.axes], "packed")
    node.outputs[0].axes = [scope.leaf(node.outputs[0].shape[0], "packed"), *data.axes[2:]]
    node.outputs[1].axes = [scope.leaf(node.outputs[1].shape[0], "packed")]


@rule("_pad_packed_sequence")
def unpack(node: Node, scope: Scope) -> None:
    """The inverse, and the lengths."""
    data, sizes = list(node.inputs())[:2]
    scope.freeze([data.axes[0], *sizes.axes], "packed")
    frozen = [scope.leaf(size, "packed") for size in node.outputs[0].shape[:2]]
    node.outputs[0].axes = [*frozen, *data.axes[1:]]
    node.outputs[1].axes = [scope.leaf(size, "packed") for size in node.outputs[1].shape]
