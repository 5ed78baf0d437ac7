"""Operators that sum over a shared axis: linear, matrix products, convolutions, attention, einsum."""

from __future__ import annotations

from typing import Any

from dwindle.graph import axes as algebra
from dwindle.graph.axes import Axis
from dwindle.graph.expressions import Dimension, Expression, Operation
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.elementwise import broadcast
from dwindle.graph.rules.registry import Scope, freeze_everything, recorded_value, rule


@rule("linear")
def linear(node: Node, scope: Scope) -> None:
    """``x @ weight.T + bias`` with weight (out, in)."""
    values = list(node.inputs())
    data, weight = values[:2]
    scope.unify(data.axes[-1], weight.axes[-1])
    _contract(weight, data.axes[-1], scope)
    out = weight.axes[0] if len(weight.axes) > 1 else None
    if len(values) > 2 and out is not None:
        scope.unify(values[2].axes[0], out)
    node.output.axes = [*data.axes[:-1], *([out] if out is not None else [])]


def _contract(weight: Value, axis: Axis, scope: Scope) -> None:
    """Sums against a parameter are exact once its slices are zero; sums of activations need zeros there."""
    if weight.kind != "parameter":
        scope.mix([axis], exact_on_zeros=True)


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(node: Node, scope: Scope) -> None:
    """Batched matrix product with broadcasting; vectors as numpy does."""
    first, second = list(node.inputs())[:2]
    node.output.axes = _matmul_axes(first, second, scope)


def _matmul_axes(first: Value, second: Value, scope: Scope) -> list[Axis]:
    left, right = first.axes, second.axes
    inner = right[-2] if len(right) > 1 else right[0]
    scope.unify(left[-1], inner)
    if first.kind != "parameter" and second.kind != "parameter":
        scope.mix([left[-1]], exact_on_zeros=True)
        if len(left) > 2 and len(right) > 2:
            scope.heads += left[:-2]
            scope.head_widths += [left[-1], right[-1]]
    batch_left, batch_right = left[:-2], right[:-2]
    rank = max(len(batch_left), len(batch_right))
    batch = broadcast([_part(first, batch_left), _part(second, batch_right)], rank, scope)
    rows = [left[-2]] if len(left) > 1 else []
    columns = [right[-1]] if len(right) > 1 else []
    return [*batch, *rows, *columns]


def _part(value: Value, axes: list[Axis]) -> Value:
    return Value(value.kind, value.name, tuple(axis.size for axis in axes), value.dtype, list(axes))


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(node: Node, scope: Scope) -> None:
    """``beta * input + alpha * (a @ b)``."""
    added, first, second = list(node.inputs())[:3]
    axes = _matmul_axes(first, second, scope)
    node.output.axes = broadcast([_part(second, axes), added], len(node.output.shape), scope)
    for expression in node.floats or []:
        scope.scales.append((node, expression))


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(node: Node, scope: Scope) -> None:
    """Weight (out, in / groups, ...); groups relate ``in = G x i`` with ``out = G x o``."""
    if node.argument("transposed"):
        conv_transpose(node, scope)
        return
    values = list(node.inputs())
    data, weight = values[:2]
    groups = int(node.argument("groups", 1) or 1)
    channels = len(data.axes) - len(weight.axes) + 1
    if groups == 1:
        scope.unify(data.axes[channels], weight.axes[1])
    else:
        group, inner = scope.leaf(groups), scope.leaf(weight.shape[1])
        outer = scope.leaf(weight.shape[0] // groups)
        scope.unify(data.axes[channels], algebra.product([group, inner]))
        scope.unify(weight.axes[1], inner)
        scope.unify(weight.axes[0], algebra.product([group, outer]))
        scope.observe(groups, [group])
    _contract(weight, weight.axes[1], scope)
    _finish(node, values, weight.axes[0], channels, scope)


def _finish(node: Node, values: list[Value], out: Axis, channels: int, scope: Scope) -> None:
    data, weight = values[:2]
    if len(values) > 2:
        scope.unify(values[2].axes[0], out)
    scope.freeze(weight.axes[2:], "kernel")
    spatial = []
    for dim, size in enumerate(node.output.shape[channels + 1 :]):
        before = data.axes[channels + 1 + dim]
        if _pointwise(node, weight, dim):
            spatial.append(before)  # every place for itself: whatever stands there goes through
        else:
            scope.freeze([before], "spatial")
            spatial.append(scope.leaf(size, "spatial"))
    node.output.axes = [*data.axes[:channels], out, *spatial]


def _pointwise(node: Node, weight: Value, dim: int) -> bool:
    """Whether a convolution does not move or mix places along a spatial dimension."""

    def option(name: str, default: int) -> Any:
        given = node.argument(name, default)
        if isinstance(given, list | tuple):
            return given[dim] if len(given) > dim else given[0] if given else default
        return default if given is None else given

    unmoved = option("stride", 1) == 1 and option("padding", 0) in (0, "valid")
    return weight.shape[2 + dim] == 1 and unmoved and option("output_padding", 0) == 0


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(node: Node, scope: Scope) -> None:
    """Weight (in, out / groups, ...)."""
    values = list(node.inputs())
    data, weight = values[:2]
    groups = int(node.argument("groups", 1) or 1)
    channels = len(data.axes) - len(weight.axes) + 1
    out = weight.axes[1]
    if groups > 1:
        group, inner = scope.leaf(groups), scope.leaf(weight.shape[0] // groups)
        scope.unify(weight.axes[0], algebra.product([group, inner]))
        out = algebra.product([group, weight.axes[1]])
        scope.observe(groups, [group])
    scope.unify(data.axes[channels], weight.axes[0])
    _contract(weight, weight.axes[0], scope)
    _finish(node, values, out, channels, scope)


def default_scale(query: Value) -> Expression:
    """The factor that attention uses when it is given none."""
    return Operation("pow", (Dimension(query, len(query.shape) - 1), -0.5))


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(node: Node, scope: Scope) -> None:
    """Query (..., heads, L, width), key and value (..., key heads, S, width)."""
    query, key, value = list(node.inputs())[:3]
    heads = len(query.axes) - 3
    grouped = bool(node.argument("enable_gqa"))
    for place in range(heads + 1 if heads >= 0 else 0):
        is_heads = place == heads
        if is_heads and grouped and key.shape[place] != query.shape[place]:
            copies = scope.leaf(query.shape[place] // key.shape[place])
            scope.unify(query.axes[place], algebra.product([key.axes[place], copies]))
        elif query.shape[place] == key.shape[place]:
            scope.unify(query.axes[place], key.axes[place])
        scope.unify(key.axes[place], value.axes[place])
    scope.unify(query.axes[-1], key.axes[-1])
    scope.unify(key.axes[-2], value.axes[-2])
    scope.freeze([query.axes[-2], key.axes[-2]], "tokens of attention")
    scope.mix([query.axes[-1]], exact_on_zeros=True)
    scope.heads += query.axes[:-2]
    scope.head_widths += [query.axes[-1], value.axes[-1]]
    given = node.argument("scale")
    if given is None:
        scope.scales.append((node, default_scale(query)))
    for expression in [*(node.floats or []), *(node.sizes or [])]:
        if given is not None and recorded_value(expression) == given:  # others are dropout and its like
            scope.scales.append((node, expression))
    mask = node.argument("attn_mask")
    node.outputs[0].axes = [*query.axes[:-1], value.axes[-1]]
    if isinstance(mask, Value):
        scores = [*query.axes[:-1], key.axes[-2]]
        broadcast([_part(query, scores), mask], len(scores), scope)
    for output in node.outputs[1:]:
        output.axes = [scope.leaf(size, "attention statistics") for size in output.shape]


@rule("einsum")
def einsum(node: Node, scope: Scope) -> None:
    """Equal letters are equal axes; letters missing in the result are summed."""
    equation = str(node.args[0]).replace(" ", "")
    values = list(node.inputs())
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation:
        terms, right = _expand_ellipsis(terms, right, values)
    if "->" not in equation:
        letters = sorted(set("".join(terms)))
        right = "".join(letter for letter in letters if "".join(terms).count(letter) == 1)
    known: dict[str, Axis] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            if letter not in known or known[letter].size == 1:
                known[letter] = axis
            elif axis.size > 1:
                scope.unify(known[letter], axis)
    summed = [known[letter] for letter in sorted(set("".join(terms)) - set(right))]
    if not any(value.kind == "parameter" for value in values):
        scope.mix(summed, exact_on_zeros=True)
    node.output.axes = [known[letter] for letter in right]


def _expand_ellipsis(terms: list[str], right: str, values: list[Value]) -> tuple[list[str], str]:
    """Replace ``...`` by capital letters that the equation does not use."""
    used = set("".join(terms) + right)
    spare = [chr(code) for code in range(0x41, 0x5B) if chr(code) not in used]
    longest = max(len(v.shape) - len(t) + 3 for t, v in zip(terms, values, strict=True) if "..." in t)
    extra = "".join(spare[:longest])
    expanded = []
    for term, value in zip(terms, values, strict=True):
        count = len(value.shape) - len(term) + 3
        expanded.append(term.replace("...", extra[longest - count :] if count else ""))
    return expanded, right.replace("...", extra)


@rule("bilinear")
def bilinear(node: Node, scope: Scope) -> None:
    """Weight (out, first, second)."""
    first, second, weight, *bias = list(node.inputs())
    scope.unify(first.axes[-1], weight.axes[1])
    scope.unify(second.axes[-1], weight.axes[2])
    for value in bias:
        scope.unify(value.axes[0], weight.axes[0])
    batch = broadcast(
        [_part(first, first.axes[:-1]), _part(second, second.axes[:-1])], len(first.axes) - 1, scope
    )
    node.output.axes = [*batch, weight.axes[0]]


@rule("kron")
def unsupported(node: Node, scope: Scope) -> None:
    """Not followed: everything it touches is frozen."""
    freeze_everything(node, scope, f"{node.name} is not followed")
