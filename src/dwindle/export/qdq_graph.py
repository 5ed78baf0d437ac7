"""Edits an ONNX graph: placeholders become ``QuantizeLinear`` and ``DequantizeLinear``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwindle.config.errors import require
from dwindle.quantization.numbers import NumberFormat

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class StoredWeight:
    """A weight as ``DequantizeLinear`` reads it.

    Attributes:
        values: Integers, the weight's shape.
        scale: float32: one value, one per channel, or (with ``block``) a matrix with one per block.
        zero_point: The shape of the scale, the type of the values.
        axis: Dimension of the channels, or None.
        block: Neighbours along the other dimension that share a scale, or None.
    """

    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None
    block: int | None = None

    def transposed(self, order: list[int]) -> StoredWeight:
        """Return the weight with its dimensions in another order."""
        axis = None if self.axis is None else order.index(self.axis)
        scale, zero_point = self.scale, self.zero_point
        if self.block is not None:
            scale, zero_point = scale.transpose(order), zero_point.transpose(order)
        return StoredWeight(self.values.transpose(order), scale, zero_point, axis, self.block)

    def attributes(self) -> dict[str, int]:
        """Return the attributes of the operator."""
        if self.axis is None:
            return {}
        return (
            {"axis": self.axis} if self.block is None else {"axis": 1 - self.axis, "block_size": self.block}
        )


class GraphEditor:
    """Collects changes of one graph; :meth:`finish` puts them in.

    Args:
        proto: The ``onnx.ModelProto``, changed in place.
    """

    def __init__(self, proto: Any) -> None:
        self.onnx = require("onnx", "onnx")
        self.proto, self.graph = proto, proto.graph
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.replacements: dict[str, list[Any]] = {}  # first output of a node -> what stands in its place
        self.renamed: dict[str, str] = {}
        self._done: dict[tuple[str, int], str] = {}
        self._weights: dict[tuple[Any, ...], str] = {}
        self._names = set(self.initializers) | {name for node in self.graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def placeholders(self, domain: str) -> list[Any]:
        """Return the nodes of a domain, in order."""
        return [node for node in self.graph.node if node.domain == domain]

    def attributes(self, node: Any) -> dict[str, Any]:
        """Return a node's attributes as plain values."""
        return {entry.name: self.onnx.helper.get_attribute_value(entry) for entry in node.attribute}

    def quantize_activation(
        self, node: Any, number: int, scale: float, zero_point: int, form: NumberFormat
    ) -> None:
        """Replace a placeholder by quantize and dequantize.

        Args:
            node: The placeholder.
            number: The quantizer's number; values quantized twice by the same one share the operators.
            scale: Its scale.
            zero_point: Its zero point.
            form: Its levels. Fewer levels than a byte holds are cut by a ``Clip`` before.
        """
        source, output = self._name(node.input[0]), node.output[0]
        known = self._done.get((source, number))
        if known is not None and not self._is_result(output):
            self._replace(node, [])
            self.renamed[output] = known
            return
        kind = np.dtype(form.stored).type
        stored_scale = self.constant(f"quantizer_{number}_scale", np.float32(scale))
        stored_zero = self.constant(f"quantizer_{number}_zero_point", kind(zero_point))
        nodes, value = [], source
        if not form.fills_storage:
            low = np.float32((form.lowest - zero_point) * scale)
            high = np.float32((form.highest - zero_point) * scale)
            edges = [
                self.constant(f"quantizer_{number}_low", low),
                self.constant(f"quantizer_{number}_high", high),
            ]
            value = self._fresh(f"{output}_clipped")
            nodes.append(self.onnx.helper.make_node("Clip", [source, *edges], [value], name=value))
        quantized = self._fresh(f"{output}_quantized")
        make = self.onnx.helper.make_node
        nodes.append(make("QuantizeLinear", [value, stored_scale, stored_zero], [quantized], name=quantized))
        nodes.append(
            make("DequantizeLinear", [quantized, stored_scale, stored_zero], [output], name=f"{output}_value")
        )
        self._replace(node, nodes)
        self._done[(source, number)] = output

    def dequantize_weight(self, node: Any, name: str, weight: StoredWeight) -> None:
        """Replace a placeholder by a stored integer weight and its dequantizing.

        A transpose behind moves into the stored weight.

        Args:
            node: The placeholder.
            name: Name of the weight in the model.
            weight: The weight.
        """
        for reader in self._readers.get(node.output[0], []):
            if reader.op_type == "Transpose":
                order = list(self.attributes(reader).get("perm", reversed(range(weight.values.ndim))))
                self._store_weight(reader, f"{name}_transposed", weight.transposed(order))
        self._store_weight(node, name, weight)

    def _store_weight(self, node: Any, name: str, weight: StoredWeight) -> None:
        output = node.output[0]
        stored = [
            self.constant(f"{name}_quantized", np.ascontiguousarray(weight.values)),
            self.constant(f"{name}_scale", np.ascontiguousarray(weight.scale)),
            self.constant(f"{name}_zero_point", np.ascontiguousarray(weight.zero_point)),
        ]
        attributes = weight.attributes()
        made = self.onnx.helper.make_node(
            "DequantizeLinear", stored, [output], name=f"{output}_weight", **attributes
        )
        self._replace(node, [made])

    def quantize_bias(self, node: Any, name: str, bias: np.ndarray, scale: np.ndarray) -> None:
        """Replace a placeholder by a stored bias, rounded as integer kernels add it.

        Args:
            node: The placeholder.
            name: What to call the bias.
            bias: Values, float32 or float64; divided as the simulation divides them, down to the last bit.
            scale: float32 scale, one value or one per channel (of a group, which is repeated).
        """
        output = node.output[0]
        if scale.size > 1 and scale.size != bias.size:
            scale = np.tile(scale, bias.size // scale.size)
        limit = float(2**31 - 1)
        integers = np.clip(np.round(bias / scale).astype(np.float64), -limit, limit)
        readers = self._readers.get(output, [])
        if any(reader.op_type not in _WITH_BIAS or reader.input[2] != output for reader in readers):
            rounded = (integers * scale).astype(np.float32)  # added apart from the product, in float
            self._replace(node, [])
            self.renamed[output] = self.constant(name, rounded)
            return
        single = scale.size == 1
        stored = [
            self.constant(f"{name}_quantized", integers.astype(np.int32)),
            self.constant(f"{name}_scale", (scale.reshape(()) if single else scale).astype(np.float32)),
        ]
        attributes = {} if single else {"axis": 0}
        made = self.onnx.helper.make_node(
            "DequantizeLinear", stored, [output], name=f"{output}_bias", **attributes
        )
        self._replace(node, [made])

    def constant(self, name: str, value: Any) -> str:
        """Store a constant once and return its name, made unique when another value has it."""
        array = np.asarray(value)
        identity = (name, array.dtype.str, array.shape, array.tobytes())
        if identity not in self._weights:
            fresh = self._fresh(name)
            tensor = self.onnx.numpy_helper.from_array(array, fresh)
            self.initializers[fresh] = tensor
            self._weights[identity] = fresh
        return self._weights[identity]

    def finish(self, domain: str) -> None:
        """Put all changes into the graph and drop nodes and constants that nobody reads."""
        nodes = []
        for node in self.graph.node:
            for made in self.replacements.get(node.output[0], [node]):
                made.input[:] = [self._name(name) for name in made.input]
                nodes.append(made)
        kept = _alive(nodes, [value.name for value in self.graph.output])
        used = {name for node in kept for name in node.input} | {value.name for value in self.graph.output}
        del self.graph.node[:]
        self.graph.node.extend(kept)
        del self.graph.initializer[:]
        self.graph.initializer.extend(t for name, t in self.initializers.items() if name in used)
        del self.graph.value_info[:]
        domains = [entry for entry in self.proto.opset_import if entry.domain != domain]
        del self.proto.opset_import[:]
        self.proto.opset_import.extend(domains)

    def _replace(self, node: Any, nodes: list[Any]) -> None:
        self.replacements[node.output[0]] = nodes

    def _name(self, name: str) -> str:
        while name in self.renamed:
            name = self.renamed[name]
        return name

    def _is_result(self, name: str) -> bool:
        return any(value.name == name for value in self.graph.output)

    def _fresh(self, name: str) -> str:
        fresh, count = name, 1
        while fresh in self._names:
            count += 1
            fresh = f"{name}_{count}"
        self._names.add(fresh)
        return fresh


def _alive(nodes: Iterable[Any], results: list[str]) -> list[Any]:
    """Return the nodes that the results need, in order."""
    needed, kept = set(results), []
    for node in reversed(list(nodes)):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]
