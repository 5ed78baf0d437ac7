"""Operators under other names, and composite ones that torch does not mark as element-wise."""

from __future__ import annotations

from dwindle.graph import axes as algebra
from dwindle.graph.nodes import Node
from dwindle.graph.rules.elementwise import elementwise
from dwindle.graph.rules.registry import Scope, rule

rule(
    "multiply", "divide", "subtract", "true_divide", "floor_divide", "negative", "absolute", "positive",
    "clip", "fix", "greater", "greater_equal", "less", "less_equal", "not_equal", "arcsin", "arccos", "arctan",
    "arctan2", "arcsinh", "arccosh", "arctanh", "ldexp", "isreal", "nan_to_num", "special_expit", "special_erf",
    "special_log1p", "special_expm1", "__and__", "__or__", "__xor__", "__iand__", "__ior__", "__ixor__",
    "__lshift__", "__rshift__", "bitwise_not", "logical_not", "fmod", "_conj", "conj_physical",
    "exponential", "geometric", "log_normal", "cauchy", "random", "addcmul", "addcdiv", "lerp",
)(elementwise)  # fmt: skip


@rule("reshape_as")
def reshape_as(node: Node, scope: Scope) -> None:
    """Row-major regrouping to the sizes of another tensor, whose axes it then has."""
    data, other = list(node.inputs())[:2]
    node.output.axes = algebra.reshape(data.axes, node.output.shape, scope.where)
    if len(data.shape) >= 1:
        scope.same_counts += [
            [own, axis] for own, axis in zip(node.output.axes, other.axes, strict=True) if axis.size > 1
        ]


@rule("meshgrid")
def meshgrid(node: Node, scope: Scope) -> None:
    """One axis of each vector; every result has all of them."""
    axes = [value.axes[0] if value.axes else scope.leaf(1) for value in node.inputs()]
    if node.argument("indexing") == "xy" and len(axes) > 1:
        axes[0], axes[1] = axes[1], axes[0]
    for output in node.outputs:
        output.axes = list(axes)


@rule("_is_all_true", "_is_any_true")
def verdict(node: Node, scope: Scope) -> None:
    """One answer about all numbers of a mask."""
    for value in node.inputs():
        scope.freeze(value.axes, f"{node.name} reads it")
    for output in node.outputs:
        output.axes = []


@rule("_has_compatible_shallow_copy_type", "is_same_size", "is_floating_point", "is_complex")
def question(node: Node, scope: Scope) -> None:
    """Asks about the type of a tensor and reads none of its numbers."""
    for output in node.outputs:
        output.axes = [scope.leaf(size, "an answer") for size in output.shape]
