"""Element-wise operators: broadcasting unifies the axes of all tensors, from the last dimension backwards."""

from __future__ import annotations

from dwindle.graph.axes import UNIT, Axis
from dwindle.graph.expressions import Expression, variables
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.registry import Scope, rule

_ALSO_POINTWISE = (
    "<pointwise>",
    "alias",
    "bernoulli",
    "bernoulli_",
    "celu",
    "clone",
    "contiguous",
    "copy",
    "copy_",
    "detach",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "empty_like",
    "fill",
    "fill_",
    "full_like",
    "hardswish",
    "isfinite",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "masked_fill",
    "mish",
    "native_dropout",
    "new_empty_like",
    "ones_like",
    "rand_like",
    "randn_like",
    "relu6",
    "resolve_conj",
    "resolve_neg",
    "rrelu",
    "rrelu_with_noise",
    "selu",
    "square",
    "to",
    "_to_copy",
    "where",
    "zero_",
    "zeros_like",
    "broadcast_tensors",
    "uniform_",
    "normal_",
    "isclose",
    "log_sigmoid",
    "hardshrink",
    "float_power",
    "requires_grad_",
    "conj",
    "real",
    "imag",
    "polar",
    "complex",
)


def broadcast(values: list[Value], rank: int, scope: Scope) -> list[Axis]:
    """Unify the axes of ``values`` as broadcasting does and return the axes of the result."""
    result: list[Axis] = [UNIT] * rank
    for value in values:
        shift = rank - len(value.axes)
        for dim, axis in enumerate(value.axes):
            place = dim + shift
            if place < 0 or axis.size == 1:
                continue
            if result[place] is UNIT:
                result[place] = axis
            else:
                scope.unify(result[place], axis)
    return result


@rule(*_ALSO_POINTWISE)
def elementwise(node: Node, scope: Scope) -> None:
    """Results have the broadcast axes of all arguments."""
    values = [value for value in node.inputs() if value.shape or value.axes == []]
    for output in node.outputs:
        output.axes = broadcast(values, len(output.shape), scope)
        for dim, size in enumerate(output.shape):
            if output.axes[dim].size != size:
                output.axes[dim] = scope.leaf(size, "a broadcast that could not be followed")
    for expression in _factors(node):
        if any(True for _ in variables(expression)):
            scope.scales.append((node, expression))


def _factors(node: Node) -> list[Expression]:
    """Numbers that the operator may have computed with.

    The Python call behind it may have had others: ``x[:, :half] = y`` ends in a copy, which uses no number.
    """
    lifted = node.name.startswith("lift") and node.output.shape == ()  # torch.tensor(number)
    if not lifted and not any(
        isinstance(item, int | float) and not isinstance(item, bool) for item in node.args
    ):
        return []
    return [*(node.floats or []), *(node.sizes or [])]


@rule("type_as")
def type_as(node: Node, scope: Scope) -> None:
    """Of the second tensor only the type is used."""
    node.output.axes = list(next(node.inputs()).axes)


@rule("prelu", "_prelu_kernel")
def prelu(node: Node, scope: Scope) -> None:
    """One slope for everything, or one a channel (dimension 1)."""
    data, weight = list(node.inputs())[:2]
    if weight.shape and weight.axes[-1].size > 1 and len(weight.shape) == 1:
        scope.unify(data.axes[1 if len(data.axes) > 1 else 0], weight.axes[0])
    elif weight.shape:
        broadcast([data, weight], len(data.shape), scope)
    node.output.axes = list(data.axes)


@rule("glu")
def glu(node: Node, scope: Scope) -> None:
    """Halves of one dimension multiply each other, so they are the same axis."""
    from dwindle.graph.axes import split

    data = next(node.inputs())
    dim = int(node.argument("dim")) % len(data.axes)
    half = data.shape[dim] // 2
    first, second = split(data.axes[dim], [half, half], scope.where)
    scope.unify(first, second)
    node.output.axes = [first if place == dim else axis for place, axis in enumerate(data.axes)]
