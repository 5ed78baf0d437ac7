"""Distances and similarities: two tensors compared along an axis they share."""

from __future__ import annotations

from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.elementwise import broadcast
from dwindle.graph.rules.registry import Scope, drop, rule


@rule("cosine_similarity", "pairwise_distance")
def similarity(node: Node, scope: Scope) -> None:
    """Two tensors of one (broadcast) shape; the compared dimension vanishes."""
    first, second = list(node.inputs())[:2]
    rank = max(len(first.shape), len(second.shape))
    axes = broadcast([first, second], rank, scope)
    dim = int(node.argument("dim", -1) if node.name == "cosine_similarity" else -1) % rank
    scope.mix([axes[dim]])
    node.output.axes = drop(axes, [dim], keepdim=bool(node.argument("keepdim", False)))


@rule("cdist", "_cdist_forward")
def pairs(node: Node, scope: Scope) -> None:
    """(..., P, width) and (..., R, width): the distance of every row to every row."""
    first, second = list(node.inputs())[:2]
    scope.unify(first.axes[-1], second.axes[-1])
    scope.mix([first.axes[-1]])
    batch = [
        Value(value.kind, value.name, value.shape[:-2], value.dtype, list(value.axes[:-2]))
        for value in (first, second)
    ]
    rank = len(node.output.shape) - 2
    node.output.axes = [*broadcast(batch, rank, scope), first.axes[-2], second.axes[-2]]
