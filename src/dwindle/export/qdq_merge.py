"""Nodes that compute the same are made one, so that a value which several layers read alike is quantized once."""

from __future__ import annotations

from typing import Any

_STATELESS = frozenset(("Mul", "Clip", "QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape"))
"""Operators that are merged: those that stand between a value and the layers that read it."""


def merge_equal(proto: Any) -> None:
    """Merge equal constants and then equal nodes, in place.

    Args:
        proto: The ``onnx.ModelProto``, its nodes in an order in which they can run. Results of the graph keep their
            names.
    """
    graph = proto.graph
    results = {value.name for value in graph.output}
    names: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for tensor in graph.initializer:
        content = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if tensor.raw_data and tensor.name not in results:
            names[tensor.name] = seen.setdefault(content, tensor.name)
    known: dict[Any, str] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        attributes = tuple(sorted(entry.SerializeToString() for entry in node.attribute))
        identity = (node.op_type, node.domain, tuple(node.input), attributes)
        mergeable = node.op_type in _STATELESS and len(node.output) == 1 and node.output[0] not in results
        if mergeable and identity in known:
            names[node.output[0]] = known[identity]
            continue
        if mergeable:
            known[identity] = node.output[0]
        kept.append(node)
    used = {name for node in kept for name in node.input} | results
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:]
    graph.node.extend(kept)
    del graph.initializer[:]
    graph.initializer.extend(constants)
