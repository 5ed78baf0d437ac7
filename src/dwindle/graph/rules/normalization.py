"""Norms and softmax: per-channel parameters follow the channels; the normalised axes are combined."""

from __future__ import annotations

from dwindle.graph import axes as algebra
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.elementwise import broadcast
from dwindle.graph.rules.registry import Scope, normalize_dims, rule


def _outputs(node: Node, data: Value, scope: Scope) -> None:
    """The first result has the axes of the input, statistics behind it are frozen."""
    node.outputs[0].axes = list(data.axes)
    for output in node.outputs[1:]:
        output.axes = [scope.leaf(size, "statistics") for size in output.shape]


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "instance_norm",
)
def batch_norm(node: Node, scope: Scope) -> None:
    """Everything after the input is one number a channel (dimension 1)."""
    data, *others = list(node.inputs())
    channels = data.axes[1 if len(data.axes) > 1 else 0]
    for value in others:
        if len(value.axes) == 1:
            scope.unify(value.axes[0], channels)
    if node.argument("training") or node.argument("use_input_stats"):
        scope.mix([data.axes[0], *data.axes[2:]])  # standardised weights: the sum runs over their inputs
    _outputs(node, data, scope)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(node: Node, scope: Scope) -> None:
    """The last dimensions are normalised together."""
    data, *others = list(node.inputs())
    shape = node.args[1]
    count = len(shape)
    for value in others:
        for own, axis in zip(value.axes, data.axes[-count:], strict=True):
            scope.unify(own, axis)
    scope.observe_each(shape, data.axes[-count:])
    scope.mix(data.axes[-count:])
    _outputs(node, data, scope)


@rule("group_norm", "native_group_norm")
def group_norm(node: Node, scope: Scope) -> None:
    """Channels = groups x inner; inner and space are normalised together."""
    data, *others = list(node.inputs())
    groups = int(node.argument("num_groups") or node.argument("group"))
    group, inner = scope.leaf(groups), scope.leaf(data.shape[1] // groups)
    scope.unify(data.axes[1], algebra.product([group, inner]))
    for value in others:
        scope.unify(value.axes[0], data.axes[1])
    scope.observe(groups, [group])
    scope.mix([inner])
    _outputs(node, data, scope)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "logsumexp")
def softmax(node: Node, scope: Scope) -> None:
    """One dimension competes."""
    data = next(node.inputs())
    dims = normalize_dims(node.args[1], len(data.axes))
    scope.mix([data.axes[dim] for dim in dims])
    if node.name == "logsumexp":
        keep = bool(node.argument("keepdim"))
        node.output.axes = [
            algebra.UNIT if place in dims else axis
            for place, axis in enumerate(data.axes)
            if keep or place not in dims
        ]
        return
    node.output.axes = list(data.axes)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(node: Node, scope: Scope) -> None:
    """``v * g / norm(v)`` with the norm over all dimensions but one."""
    direction, magnitude = list(node.inputs())[:2]
    # the dimension that keeps its norm too: a row of zeros would be divided by zero
    scope.mix(direction.axes)
    node.outputs[0].axes = broadcast([direction, magnitude], len(direction.shape), scope)
    for output in node.outputs[1:]:
        output.axes = broadcast([magnitude], len(output.shape), scope)


@rule("local_response_norm")
def local_response_norm(node: Node, scope: Scope) -> None:
    """Neighbouring channels are combined: nothing may go."""
    data = next(node.inputs())
    scope.freeze([data.axes[1]], "neighbouring channels are combined")
    _outputs(node, data, scope)
