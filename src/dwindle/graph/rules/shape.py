"""Operators that only rearrange: reshape, permute, expand, split, concatenate, slice."""

from __future__ import annotations

from collections.abc import Sequence

from dwindle.graph import axes as algebra
from dwindle.graph.axes import UNIT, Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.registry import Scope, freeze_everything, recorded_value, rule, single


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
)
def reshape(node: Node, scope: Scope) -> None:
    """Row-major regrouping; sizes given by the user's code are observed."""
    data = next(node.inputs())
    if node.name == "view" and len(node.args) > 1 and not isinstance(node.args[1], list | tuple):
        node.output.axes = list(data.axes)  # a view as another dtype
        return
    node.output.axes = algebra.reshape(data.axes, node.output.shape, scope.where)
    sizes = _asked_sizes(node)
    if sizes is None:
        return
    first = len(node.output.shape) - len(sizes)
    if node.name == "unflatten":
        first = int(node.args[1]) % len(data.shape)
    scope.observe_each(sizes, node.output.axes[first : first + len(sizes)])


def _asked_sizes(node: Node) -> Sequence[int] | None:
    """The size list in the call; None for reshapes that name no sizes."""
    if node.name in ("view", "reshape", "_unsafe_view"):
        return node.args[1] if len(node.args) > 1 else node.kwargs.get("shape", node.kwargs.get("size"))
    if node.name == "unflatten":
        return node.args[2]
    return None


@rule(
    "permute",
    "transpose",
    "t",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "numpy_T",
    "mT",
    "adjoint",
    "matrix_H",
)
def permute(node: Node, scope: Scope) -> None:
    """Same axes in another order."""
    data = next(node.inputs())
    rank = len(data.axes)
    order = list(range(rank))
    name = node.name
    if name == "permute":
        order = [int(dim) % rank for dim in node.args[1]]
    elif name in ("transpose", "transpose_", "swapaxes", "swapdims"):
        first, second = int(node.args[1]) % rank, int(node.args[2]) % rank
        order[first], order[second] = order[second], order[first]
    elif name in ("mT", "adjoint", "matrix_H") and rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif name in ("t", "t_", "numpy_T"):
        order = order[::-1]
    elif name in ("movedim", "moveaxis"):
        source = [d % rank for d in ([node.args[1]] if isinstance(node.args[1], int) else node.args[1])]
        target = [d % rank for d in ([node.args[2]] if isinstance(node.args[2], int) else node.args[2])]
        rest = iter(dim for dim in range(rank) if dim not in source)
        places = dict(zip(target, source, strict=True))
        order = [places[dim] if dim in places else next(rest) for dim in range(rank)]
    node.output.axes = [data.axes[dim] for dim in order]


@rule("expand", "expand_as", "broadcast_to")
def expand(node: Node, scope: Scope) -> None:
    """Repeated dimensions are new axes; where another tensor gives the sizes, they are its axes."""
    values = list(node.inputs())
    data = values[0]
    rank = len(node.output.shape)
    shift = rank - len(data.axes)
    axes: list[Axis] = []
    for dim, size in enumerate(node.output.shape):
        own = data.axes[dim - shift] if dim >= shift else UNIT
        axes.append(own if own.size == size else scope.leaf(size))
    node.output.axes = axes
    if len(values) > 1:
        for axis, other in zip(axes, values[1].axes, strict=False):
            if axis.size > 1:
                scope.unify(axis, other)
        return
    sizes = node.args[1] if len(node.args) > 1 else node.kwargs["size"]
    if _given(node, sizes):
        scope.observe_each(sizes, axes[len(axes) - len(sizes) :])


def _given(node: Node, sizes: Sequence[int]) -> bool:
    """Whether the Python call had these sizes: ``x[:, 0] = 1`` ends in an expand whose sizes torch found itself."""
    if node.sizes is None:
        return True
    values = {recorded_value(expression) for expression in node.sizes}
    return all(size == 1 or size in values for size in sizes)


@rule("repeat", "tile")
def repeat(node: Node, scope: Scope) -> None:
    """Copies one after another: the copy number is the outer factor."""
    data = next(node.inputs())
    times = [int(count) for count in node.args[1]]
    axes = [UNIT] * (len(times) - len(data.axes)) + list(data.axes)
    times = [1] * (len(axes) - len(times)) + times
    result = []
    for axis, number in zip(axes, times, strict=True):
        copies = scope.leaf(number)
        scope.observe(number, [copies])
        result.append(algebra.product([copies, axis]))
    node.output.axes = result


@rule("repeat_interleave")
def repeat_interleave(node: Node, scope: Scope) -> None:
    """Each index repeated in place: the copy number is the inner factor."""
    data = next(node.inputs())
    number = node.args[1] if len(node.args) > 1 else None
    dim = node.argument("dim")
    if not isinstance(number, int) or dim is None:
        freeze_everything(node, scope, "repeats each index a different number of times")
        return
    copies = scope.leaf(number)
    scope.observe(number, [copies])
    axes = list(data.axes)
    axes[dim % len(axes)] = algebra.product([axes[dim % len(axes)], copies])
    node.output.axes = axes


@rule("cat", "concat", "concatenate")
def cat(node: Node, scope: Scope) -> None:
    """The joined dimension is a concatenation; all others are the same axes."""
    values = [value for value in node.inputs() if value.shape != (0,)]
    dim = int(node.argument("dim", 0)) % len(values[0].shape)
    axes = list(values[0].axes)
    for value in values[1:]:
        for place, axis in enumerate(value.axes):
            if place != dim:
                scope.unify(axes[place], axis)
    axes[dim] = algebra.concatenation([value.axes[dim] for value in values])
    node.output.axes = axes


@rule("stack")
def stack(node: Node, scope: Scope) -> None:
    """A new dimension numbers the tensors."""
    values = list(node.inputs())
    rank = len(values[0].shape) + 1
    dim = int(node.argument("dim", 0)) % rank
    axes = list(values[0].axes)
    for value in values[1:]:
        for own, axis in zip(axes, value.axes, strict=True):
            scope.unify(own, axis)
    axes.insert(dim, scope.leaf(len(values), "numbers stacked tensors"))
    node.output.axes = axes


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(node: Node, scope: Scope) -> None:
    """Consecutive segments of one dimension."""
    data = next(node.inputs())
    dim = int(node.argument("dim", 0)) % len(data.shape)
    sizes = [output.shape[dim] for output in node.outputs]
    pieces = algebra.split(data.axes[dim], sizes, scope.where)
    for output, piece in zip(node.outputs, pieces, strict=True):
        output.axes = [piece if place == dim else axis for place, axis in enumerate(data.axes)]
    asked = node.args[1] if len(node.args) > 1 else None
    if node.name in ("chunk", "tensor_split", "unsafe_chunk"):
        if isinstance(asked, int):
            scope.same_counts.append(pieces)
        else:
            scope.freeze(pieces, "cut at literal positions")
    elif isinstance(asked, int):
        for piece in pieces:
            if piece.size == asked:
                scope.observe(asked, [piece])
            else:
                scope.freeze([piece], "the rest of a split")
    else:
        scope.observe_each(asked or [], pieces)


@rule("unbind")
def unbind(node: Node, scope: Scope) -> None:
    """Every index of one dimension becomes a tensor of its own."""
    data = next(node.inputs())
    dim = int(node.argument("dim", 0)) % len(data.shape)
    single(data.axes[dim], scope)
    for output in node.outputs:
        output.axes = [axis for place, axis in enumerate(data.axes) if place != dim]


@rule("select")
def select(node: Node, scope: Scope) -> None:
    """One index of one dimension."""
    data = next(node.inputs())
    dim = int(node.args[1]) % len(data.shape)
    single(data.axes[dim], scope)
    node.output.axes = [axis for place, axis in enumerate(data.axes) if place != dim]


@rule("slice", "narrow")
def slice_(node: Node, scope: Scope) -> None:
    """A range of one dimension; its borders are observed."""
    data = next(node.inputs())
    dim = int(node.argument("dim", 0)) % len(data.shape)
    size, axes = data.shape[dim], list(data.axes)
    if node.name == "narrow" and isinstance(node.args[2], Value):
        scope.freeze([data.axes[dim]], "cut where a tensor says")
        axes[dim] = scope.leaf(node.output.shape[dim], "cut where a tensor says")
        node.output.axes = axes
        return
    if node.name == "narrow":
        start, step = int(node.args[2]) % max(size, 1), 1
        end = start + int(node.args[3])
        start_number, end_number = int(node.args[2]), int(node.args[3])
    else:
        raw_start, raw_end = node.argument("start"), node.argument("end")
        start_number = 0 if raw_start is None else int(raw_start)
        end_number = size if raw_end is None else int(raw_end)
        step = int(node.argument("step") or 1)
        start = max(start_number + size, 0) if start_number < 0 else min(start_number, size)
        end = max(end_number + size, 0) if end_number < 0 else min(end_number, size)
    node.output.axes = axes
    if step != 1:
        axes[dim] = _strided(data.axes[dim], start, end, step, node.output.shape[dim], scope)
        return
    if end <= start:
        scope.freeze([axes[dim]], "an empty slice of it is taken")
        axes[dim] = scope.leaf(0, "empty")
        return
    if start == 0 and end == size:
        if node.name == "narrow":
            scope.observe_sums([start_number, end_number], [[], [axes[dim]]])
        return
    pieces = algebra.split(axes[dim], [s for s in (start, end - start, size - end) if s], scope.where)
    before, after = (pieces[:1] if start else []), (pieces[-1:] if end < size else [])
    middle = pieces[len(before)]
    axes[dim] = middle
    ends: list[Axis] = [middle] if node.name == "narrow" else []
    if node.name != "narrow" and end < size:
        ends = [*before, middle] if end_number >= 0 else after
    starts = before if start_number >= 0 else [middle, *after]
    scope.observe_sums([start_number, end_number], [starts if start else [], ends])


def _strided(axis: Axis, start: int, end: int, step: int, size: int, scope: Scope) -> Axis:
    """``x[start::step]`` over a whole axis keeps the outer factor of (size / step) x step."""
    if axis.size % step == 0 and 0 <= start < step and end > axis.size - step and size * step == axis.size:
        outer, inner = algebra.reshape([axis], [size, step], scope.where)
        scope.freeze([inner], "taken with a stride")
        return outer
    scope.freeze([axis], "taken with a stride")
    return scope.leaf(size, "taken with a stride")


@rule("pixel_shuffle")
def pixel_shuffle(node: Node, scope: Scope) -> None:
    """Channels = channels x r x r."""
    data = next(node.inputs())
    factor = int(node.args[1])
    channels = len(data.axes) - 3
    inner = scope.leaf(factor * factor, "moved into space")
    outer = scope.leaf(node.output.shape[channels])
    scope.unify(data.axes[channels], algebra.product([outer, inner]))
    spatial(node, data, channels, outer, scope)


@rule("pixel_unshuffle")
def pixel_unshuffle(node: Node, scope: Scope) -> None:
    """The inverse: r x r positions move into the channels."""
    data = next(node.inputs())
    factor = int(node.args[1])
    channels = len(data.axes) - 3
    inner = scope.leaf(factor * factor, "moved from space")
    spatial(node, data, channels, algebra.product([data.axes[channels], inner]), scope)


def spatial(node: Node, data: Value, channels: int, axis: Axis, scope: Scope) -> None:
    """Give the first result ``axis`` as channels, and new frozen axes behind them."""
    scope.freeze(data.axes[channels + 1 :], "spatial")
    sizes = node.output.shape[channels + 1 :]
    node.output.axes = [*data.axes[:channels], axis, *(scope.leaf(size, "spatial") for size in sizes)]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(node: Node, scope: Scope) -> None:
    """(groups, channels) -> (channels, groups)."""
    data = next(node.inputs())
    groups = int(node.args[1])
    outer, inner = algebra.reshape([data.axes[1]], [groups, data.shape[1] // groups], scope.where)
    scope.observe(groups, [outer])
    node.output.axes = [data.axes[0], algebra.product([inner, outer]), *data.axes[2:]]
