"""Products of sorted tokens with one matrix an expert."""

from __future__ import annotations

from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.registry import Scope, freeze_everything, rule

#: Rows must start at multiples of 16 bytes: eight numbers of half precision.
ALIGNMENT = 8


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_product(node: Node, scope: Scope) -> None:
    """Tokens (S, in), sorted by group, times weights (groups, in, out); or (groups, S, in) times (in, S)."""
    first, second, *others = list(node.inputs())
    left, right = first.axes, second.axes
    scope.unify(left[-1], right[-2])
    if first.kind != "parameter" and second.kind != "parameter":
        scope.mix([left[-1]], exact_on_zeros=True)
    scope.freeze([left[-2], *left[:-2], *right[:-2]], "tokens are assigned to experts by number")
    bias = node.argument("bias")
    for value in others:
        if value is not bias:
            scope.freeze(value.axes, "borders between groups")
    rows, columns = left[-2], right[-1]
    if len(left) == 2 and len(right) == 2:
        # both are ragged in what is summed: one product a group
        scope.freeze([left[-1]], "tokens are assigned to experts by number")
        axes: list[Axis] = [scope.leaf(node.output.shape[0], "groups"), rows, columns]
    elif len(left) == 3 and len(right) == 2:
        scope.freeze([columns], "tokens are assigned to experts by number")
        axes = [rows, columns]
    elif len(left) == 2:
        axes = [rows, columns]
    else:
        scope.unify(left[0], right[0])
        axes = [left[0], rows, columns]
    if isinstance(bias, Value):
        scope.unify(bias.axes[-1], columns)
    for axis in (left[-1], columns):
        scope.align(axis, ALIGNMENT)
    if len(axes) != len(node.output.shape):
        freeze_everything(node, scope, f"{node.name} could not be followed")
        return
    node.output.axes = axes
