"""Look-ups by number: embeddings, advanced indexing, gather, scatter."""

from __future__ import annotations

from dwindle.graph.axes import Axis
from dwindle.graph.rules.elementwise import broadcast
from dwindle.graph.rules.registry import Scope, freeze_everything, rule
from dwindle.graph.trace import Node, Value


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
    data, indices = node.args[0], list(node.args[1])
    given = [(dim, item) for dim, item in enumerate(indices) if isinstance(item, Value)]
    if any(
        item.dtype.is_floating_point or str(item.dtype) in ("torch.bool", "torch.uint8") for _, item in given
    ):
        freeze_everything(node, scope, "chosen by a mask")
        return
    for dim, _ in given:
        scope.freeze([data.axes[dim]], "looked up by number")
    rank = max((len(item.shape) for _, item in given), default=0)
    looked_up = broadcast([item for _, item in given], rank, scope)
    places = [dim for dim, _ in given]
    rest = [axis for dim, axis in enumerate(data.axes) if dim not in places]
    together = places == list(range(places[0], places[-1] + 1)) if places else True
    front = len([dim for dim in range(places[0]) if dim not in places]) if places and together else 0
    node.output.axes = [*rest[:front], *looked_up, *rest[front:]]
    _check(node, scope)


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
    "index_put",
    "index_put_",
    "masked_scatter",
    "select_scatter",
    "slice_scatter",
    "masked_select",
    "one_hot",
    "bincount",
    "bucketize",
    "searchsorted",
    "histc",
    "nms",
)
def frozen(node: Node, scope: Scope) -> None:
    """Not followed: everything it touches is frozen."""
    freeze_everything(node, scope, f"{node.name} uses positions as numbers")
