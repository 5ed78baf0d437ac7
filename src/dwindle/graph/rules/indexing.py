"""Look-ups by number: embeddings, advanced indexing, gather, scatter."""

from __future__ import annotations

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.elementwise import broadcast
from dwindle.graph.rules.registry import Scope, freeze_everything, rule


@rule("embedding")
def embedding(node: Node, scope: Scope) -> None:
    """Rows are looked up by number and frozen; the width is free."""
    weight, index = list(node.inputs())[:2]
    scope.freeze([weight.axes[0]], "looked up by number")
    node.output.axes = [*index.axes, weight.axes[1]]


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(node: Node, scope: Scope) -> None:
    """Rows are looked up by number and added; the width is free."""
    weight, *numbers = list(node.inputs())
    scope.freeze([weight.axes[0], *(axis for value in numbers for axis in value.axes)], "looked up by number")
    node.outputs[0].axes = [scope.leaf(node.outputs[0].shape[0], "bags"), weight.axes[1]]
    for output in node.outputs[1:]:
        output.axes = [scope.leaf(size, "bags") for size in output.shape]


@rule("index", "_unsafe_index")
def index(node: Node, scope: Scope) -> None:
    """Indexed dimensions are frozen; the index tensors' axes take their place."""
    data = node.args[0]
    node.output.axes = [
        axis if axis is not None else scope.leaf(size, "chosen by a mask")
        for axis, size in zip(_looked_up(data, list(node.args[1]), scope), node.output.shape, strict=True)
    ]
    _check(node, scope)


def _looked_up(data: Value, indices: list[Value | None], scope: Scope) -> list[Axis | None]:
    """Axes of ``data[indices]``; None where a mask chooses. A mask stands for as many dimensions as it has."""
    places: list[int] = []
    numbers: list[Value] = []
    dim, masks = 0, 0
    for item in indices:
        if item is None:
            dim += 1
            continue
        mask = item.dtype in (torch.bool, torch.uint8)
        width = len(item.shape) if mask else 1
        covered = range(dim, dim + width)
        reason = "chosen by a mask" if mask else "looked up by number"
        scope.freeze([data.axes[place] for place in covered], reason)
        if mask:
            scope.freeze(item.axes, reason)
            masks += 1
        else:
            numbers.append(item)
        places += covered
        dim += width
    rank = max([len(item.shape) for item in numbers] + [1 if masks else 0])
    found: list[Axis | None] = list(broadcast(numbers, rank, scope))
    if masks:
        found[-1] = None
    rest: list[Axis | None] = [axis for dim, axis in enumerate(data.axes) if dim not in places]
    together = places == list(range(places[0], places[-1] + 1)) if places else True
    front = len([dim for dim in range(places[0]) if dim not in places]) if places and together else 0
    return [*rest[:front], *found, *rest[front:]]


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(node: Node, scope: Scope) -> None:
    """``data[indices] = values``: indexed dimensions are frozen, the others are those of the values."""
    data, values = node.args[0], node.args[2]
    target = _looked_up(data, list(node.args[1]), scope)
    shift = len(target) - len(values.axes)
    for place, axis in enumerate(values.axes):
        own = target[place + shift] if place + shift >= 0 else None
        if own is None:
            scope.freeze([axis], "put by number")
        elif axis.size > 1:
            scope.unify(axis, own)
    node.output.axes = list(data.axes)


@rule("masked_scatter")
def masked_scatter(node: Node, scope: Scope) -> None:
    """Rows of the source go, one after another, where the mask says; whole rows when the mask is one number a row."""
    data, mask, source = list(node.inputs())[:3]
    shared = _same_along(mask)
    broadcast([data, mask], len(data.shape), scope)
    rows = 0
    while (
        rows < min(shared, len(source.shape))
        and source.shape[-1 - rows] == data.shape[len(data.shape) - 1 - rows]
    ):
        rows += 1
    for place in range(len(data.shape)):
        back = len(data.shape) - place
        if back <= rows:
            scope.unify(source.axes[-back], data.axes[place])
        else:
            scope.freeze([data.axes[place]], "filled by a mask")
    scope.freeze(source.axes[: len(source.axes) - rows], "filled by a mask")
    node.output.axes = list(data.axes)


def _same_along(mask: Value) -> int:
    """Number of last dimensions along which a mask was only repeated."""
    value, count = mask, 0
    while value.producer is not None and value.producer.name in (
        "to",
        "_to_copy",
        "alias",
        "contiguous",
        "clone",
    ):
        value = next(value.producer.inputs())
    if value.producer is None or value.producer.name not in ("expand", "expand_as", "broadcast_to"):
        return 0
    origin = next(value.producer.inputs())
    for own in reversed(origin.shape):
        if own != 1:
            break
        count += 1
    return len(mask.shape) if count == len(origin.shape) else count


def _check(node: Node, scope: Scope) -> None:
    """Freeze what does not have the recorded size."""
    for output in node.outputs:
        if tuple(axis.size for axis in output.axes) != output.shape:
            freeze_everything(node, scope, f"{node.name} could not be followed")
            return


@rule("index_select")
def index_select(node: Node, scope: Scope) -> None:
    """One dimension is looked up by number."""
    data, index_value = list(node.inputs())[:2]
    dim = int(node.args[1]) % max(len(data.axes), 1)
    scope.freeze([data.axes[dim]], "looked up by number")
    new: Axis = index_value.axes[0] if index_value.axes else scope.leaf(1)
    node.output.axes = [new if place == dim else axis for place, axis in enumerate(data.axes)]


@rule("gather", "take_along_dim", "scatter", "scatter_add", "index_add", "index_copy", "index_fill")
def gather(node: Node, scope: Scope) -> None:
    """The dimension is frozen everywhere; other dimensions of equal size are the same axes."""
    values = list(node.inputs())
    data = values[0]
    dim = int(node.args[1]) % len(data.axes)
    output = node.output
    for value in values:
        if len(value.axes) == len(data.axes):
            scope.freeze([value.axes[dim]], "looked up by number")
            for place, axis in enumerate(value.axes):
                if place != dim and axis.size == data.axes[place].size:
                    scope.unify(axis, data.axes[place])
                elif place != dim:
                    scope.freeze([axis, data.axes[place]], "looked up by number")
        else:
            scope.freeze(value.axes, "looked up by number")
    output.axes = [
        axis if axis.size == size else scope.leaf(size, "looked up by number")
        for axis, size in zip(data.axes, output.shape, strict=True)
    ]


@rule(
    "select_scatter",
    "slice_scatter",
    "one_hot",
    "bincount",
    "bucketize",
    "searchsorted",
    "histc",
    "nms",
    "multinomial",
)
def frozen(node: Node, scope: Scope) -> None:
    """Not followed: everything it touches is frozen."""
    freeze_everything(node, scope, f"{node.name} uses positions as numbers")


@rule("masked_select", "nonzero_numpy", "_unique2", "unique_dim")
def chosen(node: Node, scope: Scope) -> None:
    """How much comes out depends on the values."""
    freeze_everything(node, scope, f"{node.name} chooses by values")
