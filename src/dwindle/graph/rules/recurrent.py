"""LSTM, GRU and RNN: gates x hidden width, one width for all layers and directions of a module."""

from __future__ import annotations

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.rules.registry import Scope, freeze_everything, rule
from dwindle.graph.trace import Node, Value, values_in

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(node: Node, scope: Scope) -> None:
    """Weights (gates x hidden, in), (gates x hidden, hidden); results (..., directions x hidden)."""
    if not isinstance(node.args[2], list):
        freeze_everything(node, scope, f"{node.name} over a packed sequence")
        return
    data = node.args[0]
    states = list(values_in(node.args[1]))
    weights = list(values_in(node.args[2]))
    has_bias = bool(node.args[3])
    bidirectional = bool(node.args[7])
    gates = _GATES[node.name]
    per_cell = 4 if has_bias else 2
    hidden = scope.leaf(weights[0].shape[0] // gates)
    if weights[1].shape[1] != hidden.size or len(weights) % per_cell:
        freeze_everything(node, scope, f"{node.name} with a projection")
        return
    directions = 2 if bidirectional else 1
    out: Axis = algebra.concatenation([hidden] * directions) if directions > 1 else hidden
    flowing = data.axes[-1]
    cells = [weights[start : start + per_cell] for start in range(0, len(weights), per_cell)]
    for number, cell in enumerate(cells):
        _cell(cell, flowing, hidden, gates, scope)
        if number % directions == directions - 1:
            flowing = out
    for state in states:
        scope.unify(state.axes[-1], hidden)
        scope.freeze(state.axes[:1], "layers x directions")
    scope.freeze(data.axes[:-1], "batch and time of a recurrent layer")
    node.outputs[0].axes = [*data.axes[:-1], out]
    for output in node.outputs[1:]:
        output.axes = [*(scope.leaf(size, "recurrent state") for size in output.shape[:-1]), hidden]


def _cell(weights: list[Value], data: Axis, hidden: Axis, gates: int, scope: Scope) -> None:
    rows = algebra.product([scope.leaf(gates, "gates"), hidden])
    scope.unify(weights[0].axes[1], data)
    scope.unify(weights[1].axes[1], hidden)
    for value in weights:
        scope.unify(value.axes[0], rows)
