"""Runs the rules over recordings of one model, all over the same parameter axes."""

from __future__ import annotations

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node
from dwindle.graph.rules import rule_for
from dwindle.graph.rules.registry import Scope, freeze_everything
from dwindle.graph.shuffles import PASSING
from dwindle.graph.trace import Trace


def propagate(traces: list[Trace]) -> tuple[dict[str, list[Axis]], Scope]:
    """Give every tensor of every trace its axes.

    Args:
        traces: Recordings of the same model (evaluation, training). Parameters share their axes between them.

    Returns:
        The axes of each parameter and buffer by name, and what the rules observed.
    """
    scope = Scope()
    parameter_axes: dict[str, list[Axis]] = {}
    for trace in traces:
        scope.plain += trace.plain
        for name, value in trace.parameters.items():
            if name not in parameter_axes:
                parameter_axes[name] = [algebra.leaf(size) for size in value.shape]
            value.axes = parameter_axes[name]
        for value in trace.inputs:
            value.axes = [algebra.leaf(size, "model input") for size in value.shape]
        live = trace.live_nodes()
        for node in live:
            apply_rule(node, scope)
        _apply_unread(trace, live, scope)
        scope.node = None
        for name, value in trace.assigned.items():
            if value.shape == trace.parameters[name].shape and value.axes:
                for own, axis in zip(parameter_axes[name], value.axes, strict=True):
                    scope.unify(own, axis)
        for value in trace.outputs:
            if not value.axes and value.shape:
                value.axes = [algebra.leaf(size) for size in value.shape]
            for axis in value.axes:
                algebra.freeze(axis, "model output")
    _freeze_diagonals(traces, parameter_axes)
    _drop_free_sizes(traces, parameter_axes, scope)
    return parameter_axes, scope


def _drop_free_sizes(traces: list[Trace], parameter_axes: dict[str, list[Axis]], scope: Scope) -> None:
    """A new axis of a result that nobody reads may have any size, whatever the code gives it."""
    read = {id(node) for trace in traces for node in trace.live_nodes()}
    held = {leaf for axes in parameter_axes.values() for axis in axes for leaf in axis.leaves()}

    def is_free(axis: Axis) -> bool:
        return all(leaf.frozen is None and leaf not in held for leaf in axis.leaves())

    scope.observations = [
        seen
        for seen in scope.observations
        if seen.node is None
        or id(seen.node) in read
        or isinstance(seen.expression, int)
        or not all(is_free(axis) for axis in seen.axes)
    ]


def _apply_unread(trace: Trace, live: list[Node], scope: Scope) -> None:
    """Calls whose results nobody reads: they still run, so their sizes must fit, but what they compute is no matter."""
    read = set(map(id, live))
    mixings, scales = len(scope.mixings), len(scope.scales)
    for node in trace.nodes:
        if id(node) in read:
            continue
        data = next(node.inputs(), None)
        if not _is_any_part(node) or data is None or not data.axes:
            apply_rule(node, scope)
            continue
        rest = [axis for place, axis in enumerate(data.axes) if place != _dim(node, len(data.axes))]
        sizes = list(node.output.shape)
        if node.name != "select":
            rest.insert(_dim(node, len(data.axes)), scope.leaf(sizes[_dim(node, len(data.axes))], "a part"))
        node.output.axes = rest
    del scope.mixings[mixings:], scope.scales[scales:]


def _is_any_part(node: Node) -> bool:
    """Whether a call takes a part that exists at any size: the first or the last index, or a clamped range."""
    return node.name == "slice" or (node.name == "select" and int(node.args[2]) in (0, -1))


def _dim(node: Node, rank: int) -> int:
    return int(node.argument("dim", 0)) % rank


def _freeze_diagonals(traces: list[Trace], parameter_axes: dict[str, list[Axis]]) -> None:
    """Two factors of one product may have been found equal only after the product was made."""
    every = {axis.find() for axes in parameter_axes.values() for axis in axes}
    every |= {
        axis.find()
        for trace in traces
        for node in trace.nodes
        for value in node.outputs
        for axis in value.axes
    }
    for axis in every:
        algebra.freeze_diagonals(axis)


def apply_rule(node: Node, scope: Scope) -> None:
    """Run the rule of one call; what cannot be followed is frozen."""
    scope.node = node
    for value in node.inputs():
        if not value.axes and value.shape:
            reason = "a constant tensor that no module owns" if value.kind == "constant" else "not recorded"
            value.axes = [algebra.leaf(size, reason, node.where) for size in value.shape]
        if node.name not in PASSING:
            for axis in value.axes:
                algebra.collapse(axis, node.where)
    rule = rule_for(node)
    if rule is None:
        scope.unknown.append(node)
        freeze_everything(node, scope, f"operator {node.name} has no axis rule")
        return
    try:
        rule(node, scope)
    except Exception as error:
        scope.unknown.append(node)
        freeze_everything(node, scope, f"the rule of {node.name} does not cover this call ({error})")
        return
    for output in node.outputs:
        if tuple(axis.size for axis in output.axes) != output.shape:
            scope.unknown.append(node)
            freeze_everything(node, scope, f"the rule of {node.name} does not cover this call")
            return
