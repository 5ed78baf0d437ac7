"""Products of vectors and tensors beside the matrix product: tensordot, outer, inner."""

from __future__ import annotations

from dwindle.graph.nodes import Node
from dwindle.graph.rules.registry import Scope, rule


@rule("tensordot")
def tensordot(node: Node, scope: Scope) -> None:
    """Pairs of dimensions are summed; the others follow one another."""
    first, second = list(node.inputs())[:2]
    left = [int(dim) % len(first.shape) for dim in node.args[2]]
    right = [int(dim) % len(second.shape) for dim in node.args[3]]
    for one, other in zip(left, right, strict=True):
        if first.axes[one].size == second.axes[other].size:
            scope.unify(first.axes[one], second.axes[other])
        else:
            scope.freeze([first.axes[one], second.axes[other]], "a broadcast sum")
    if first.kind != "parameter" and second.kind != "parameter":
        scope.mix([first.axes[dim] for dim in left], exact_on_zeros=True)
    node.output.axes = [
        *(axis for dim, axis in enumerate(first.axes) if dim not in left),
        *(axis for dim, axis in enumerate(second.axes) if dim not in right),
    ]


@rule("outer", "ger")
def outer(node: Node, scope: Scope) -> None:
    """Every element of one vector times every element of the other."""
    first, second = list(node.inputs())[:2]
    node.output.axes = [*first.axes, *second.axes]


@rule("inner", "vdot")
def inner(node: Node, scope: Scope) -> None:
    """The last dimensions are summed against each other."""
    first, second = list(node.inputs())[:2]
    if first.axes and second.axes:
        scope.unify(first.axes[-1], second.axes[-1])
        if first.kind != "parameter" and second.kind != "parameter":
            scope.mix([first.axes[-1]], exact_on_zeros=True)
    node.output.axes = [*first.axes[:-1], *second.axes[:-1]]
