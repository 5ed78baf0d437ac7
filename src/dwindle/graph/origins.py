"""Which parameters a factor on a tensor can be moved to: the way back from a tensor to the weights behind it.

The way goes over operators that keep a factor (:mod:`dwindle.graph.homogeneity`): through reshapes and rotations
to the rows of the linear layer that make the tensor, or to the weight of the norm behind it. It only proposes;
whether a proposal holds is decided by following the factor forwards again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from dwindle.graph.homogeneity import LARGEST, MOVEMENTS, UNARY, base_name, compressed, moved
from dwindle.graph.nodes import Node, Value

#: For each parameter, which of its elements: a boolean tensor that broadcasts to its shape.
Elements = dict[str, torch.Tensor]

_FARTHEST = 60
_SELECTING = frozenset(
    {"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "select", "slice",
     "narrow"}
)  # fmt: skip
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")


def origins(value: Value, most: int = 12) -> Iterator[Elements]:
    """Yield sets of parameter elements that might carry a factor in place of ``value``, the nearest first.

    Args:
        value: A tensor of a recording.
        most: Give up after so many.
    """
    yield from itertools.islice(_back(value, _everywhere(len(value.shape)), 0), most)


def _everywhere(rank: int) -> torch.Tensor:
    return torch.ones([1] * rank, dtype=torch.bool)


def _back(value: Value, wanted: torch.Tensor, depth: int) -> Iterator[Elements]:
    """Ways for the elements ``wanted`` of one tensor."""
    if value.kind == "parameter":
        yield {value.name: wanted}
    node = value.producer
    if node is None or depth > _FARTHEST or not value.is_floating:
        return
    name = base_name(node)
    if name in MOVEMENTS:
        source = _source_of(node, value, wanted)
        if source is not None:
            yield from _back(next(node.inputs()), source, depth + 1)
    elif name in UNARY or name == "masked_fill":
        yield from _back(next(node.inputs()), wanted, depth + 1)
    elif name in ("mul", "multiply"):
        for operand in node.inputs():
            yield from _back(operand, _reduced(wanted, operand.shape), depth + 1)
    elif name in ("div", "divide", "true_divide") and isinstance(node.args[0], Value):
        yield from _back(node.args[0], _reduced(wanted, node.args[0].shape), depth + 1)
    elif name in ("add", "sub", "subtract"):
        yield from _all([(v, _reduced(wanted, v.shape)) for v in node.inputs()], depth)
    elif name in ("cat", "concat", "concatenate"):
        yield from _all(_pieces(node, wanted), depth)
    else:
        yield from _contracted(node, name, wanted, depth)


def _contracted(node: Node, name: str, wanted: torch.Tensor, depth: int) -> Iterator[Elements]:
    values = list(node.inputs())
    if name in ("matmul", "bmm", "mm"):
        for operand in values[:2]:
            yield from _back(operand, _everywhere(len(operand.shape)), depth + 1)
    elif name == "linear":
        rows = _last(wanted)
        weights = [(values[1], rows[:, None]), *((bias, rows) for bias in values[2:])]
        yield from _all(weights, depth)
        if len(values) == 2 and rows.numel() == 1:
            yield from _back(values[0], _everywhere(len(values[0].shape)), depth + 1)
    elif name == "addmm":
        columns = _last(wanted)
        bias = _reduced(columns, values[0].shape)
        yield from _all([(values[2], columns[None, :]), (values[0], bias)], depth)
    elif name in ("conv1d", "conv2d", "conv3d"):
        rank = len(values[1].shape)
        rows = _only(wanted, wanted.dim() - rank + 1)
        weights = [(values[1], rows.view([-1] + [1] * (rank - 1))), *((bias, rows) for bias in values[2:])]
        yield from _all(weights, depth)
    elif name == "embedding":
        yield from _back(node.args[0], _last(wanted)[None, :], depth + 1)
    elif name in _NORMS:
        place = wanted.dim() - 1 if name in ("layer_norm", "rms_norm") else 1
        given = [node.argument(key) for key in ("weight", "bias")]
        if isinstance(given[0], Value):
            yield from _all(
                [
                    (own, _only(wanted, place))
                    for own in given
                    if isinstance(own, Value) and len(own.shape) == 1
                ],
                depth,
            )
    elif name == "scaled_dot_product_attention" and wanted.numel() == 1:
        yield from _back(values[2], _everywhere(len(values[2].shape)), depth + 1)


def _all(parts: list[tuple[Value, torch.Tensor]], depth: int) -> Iterator[Elements]:
    """Ways that serve every one of several tensors at once."""
    ways = [list(itertools.islice(_back(value, wanted, depth + 1), 4)) for value, wanted in parts]
    for chosen in itertools.product(*ways):
        merged: Elements = {}
        for way in chosen:
            for name, elements in way.items():
                merged[name] = merged[name] | elements if name in merged else elements
        if merged:
            yield merged


def _reduced(wanted: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of an operand of ``shape`` that broadcast into the elements ``wanted``."""
    extra = wanted.dim() - len(shape)
    for _ in range(extra):
        wanted = wanted.any(0)
    for dim, size in enumerate(shape):
        if size == 1 and wanted.shape[dim] != 1:
            wanted = wanted.any(dim, keepdim=True)
    return wanted


def _only(wanted: torch.Tensor, dim: int) -> torch.Tensor:
    """Along one dimension: where anything is wanted."""
    others = [place for place in range(wanted.dim()) if place != dim]
    return wanted.any(others) if others else wanted


def _last(wanted: torch.Tensor) -> torch.Tensor:
    return _only(wanted, wanted.dim() - 1)


def _pieces(node: Node, wanted: torch.Tensor) -> list[tuple[Value, torch.Tensor]]:
    """The joined tensors of which anything is wanted."""
    values = list(node.inputs())
    dim = int(node.argument("dim", 0)) % wanted.dim()
    if wanted.shape[dim] == 1:
        return [(value, wanted) for value in values]
    pieces = wanted.split([value.shape[dim] for value in values], dim)
    return [
        (value, compressed(piece)) for value, piece in zip(values, pieces, strict=True) if bool(piece.any())
    ]


def _source_of(node: Node, value: Value, wanted: torch.Tensor) -> torch.Tensor | None:
    """Elements of the first input that a movement puts at the elements ``wanted`` of its result."""
    data = next(node.inputs())
    if wanted.numel() == 1 and base_name(node) not in _SELECTING:
        return _everywhere(len(data.shape))
    elements = math.prod(data.shape)
    if elements > LARGEST:
        return None
    numbers = torch.arange(elements, dtype=torch.int32).view(data.shape)
    results: list[Any] = moved(node, numbers)
    place = next(number for number, output in enumerate(node.outputs) if output is value)
    result = results[place]
    chosen = torch.zeros(elements, dtype=torch.bool)
    chosen[result[wanted.expand(result.shape)].long()] = True
    return compressed(chosen.view(data.shape))
