"""Segments of a file: a layer with what a runtime fuses into it, which can be run by itself at any width."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dwindle.graph.axes import CONCATENATION, LEAF, PRODUCT, Axis
from dwindle.search.latency_prediction.partition import ANCHORS, CONVOLUTIONS, is_dequantizer, partition
from dwindle.search.latency_prediction.sizes import Size, value_of
from dwindle.search.latency_prediction.template import Constant, Template, TemplateNode

__all__ = ["Segment", "segments_of"]

#: Classes of segments; each gets a scale of its own when predictions are fitted to whole models.
CLASSES = ("convolution", "product", "attention", "rest")


@dataclass(eq=False, slots=True)
class Segment:
    """A part of a file.

    Attributes:
        template: The whole file.
        nodes: Its operators.
        inputs: Tensors that come from outside.
        outputs: Tensors that are used outside.
        reads: Tensors of other segments that it is made of; a border quantizes some of them anew.
        layer: Path of the module whose weight it applies; the first operator's name where there is none.
        kind: ``"convolution"``, ``"product"`` (with a weight), ``"attention"`` (a product of two results) or
            ``"rest"``.
        variables: What its sizes depend on: leaves, or whole concatenations.
    """

    template: Template
    nodes: list[TemplateNode]
    inputs: list[str]
    outputs: list[str]
    reads: list[str]
    layer: str
    kind: str
    variables: list[Axis] = field(default_factory=list)

    @property
    def sizes(self) -> list[Size]:
        """Every size that changes with counts."""
        found: list[Size] = []
        for node in self.nodes:
            for entry in node.inputs:
                if isinstance(entry, Constant):
                    found += [*entry.dims, *(entry.values or ())]
            found += node.attributes.values()
        for name in self.inputs:
            tensor = self.template.tensors[name]
            found += [*tensor.dims, *(tensor.values or ())]
        return [size for size in found if size.axis is not None]

    def values(self, counts: Mapping[Axis, float]) -> tuple[float, ...]:
        """Return the value of each variable under counts of leaves."""
        return tuple(value_of(axis, counts) for axis in self.variables)

    def model(self, values: Sequence[int]) -> Any:
        """Return it as an ONNX model.

        Args:
            values: Of each variable.
        """
        counts = dict(zip(self.variables, values, strict=True))
        return self.template.model(counts, nodes=self.nodes, inputs=self.inputs, outputs=self.outputs)

    def feed(self, values: Sequence[int]) -> dict[str, np.ndarray]:
        """Return arrays to run it on."""
        return self.template.feed(dict(zip(self.variables, values, strict=True)), self.inputs)

    def signature(self, values: Sequence[int]) -> str:
        """Return what two segments have in common that take the same time: operators, attributes and shapes."""
        counts = dict(zip(self.variables, values, strict=True))
        names: dict[str, str] = {}
        lines = []

        def alias(name: str) -> str:
            return names.setdefault(name, f"t{len(names)}")

        for name in self.inputs:
            tensor = self.template.tensors[name]
            shape = [
                "b" if batched else dim.at(counts)
                for dim, batched in zip(tensor.dims, tensor.batched, strict=True)
            ]
            fixed = [size.at(counts) for size in tensor.values] if tensor.values is not None else ""
            lines.append(
                f"{alias(name)} {tensor.dtype} {shape} {[d.at(counts) for d in tensor.dims]} {fixed}"
            )
        for node in self.nodes:
            inputs = [
                _constant(entry, counts) if isinstance(entry, Constant) else (alias(entry) if entry else "")
                for entry in node.inputs
            ]
            attributes = [
                (own.name, hashlib.sha256(own.SerializeToString(deterministic=True)).hexdigest()[:8])
                for own in sorted(node.proto.attribute, key=lambda own: str(own.name))
                if not any(name == own.name for name, _ in node.attributes)
            ]
            changing = [(*key, size.at(counts)) for key, size in sorted(node.attributes.items())]
            outputs = [alias(name) for name in node.outputs]
            lines.append(f"{node.proto.domain} {node.name} {attributes} {changing} {inputs} {outputs}")
        lines.append(" ".join(alias(name) for name in self.outputs))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]

    def description(self, values: Sequence[int]) -> str:
        """Return a readable form: the operators and the shape of the first weight or input."""
        counts = dict(zip(self.variables, values, strict=True))
        operators = "+".join(node.name for node in self.nodes if "quantize" not in node.name.lower())
        weights = [
            entry
            for node in self.nodes
            for entry in node.inputs
            if isinstance(entry, Constant) and len(entry.dims) > 1
        ]
        dims = weights[0].dims if weights else ()
        if not weights and self.inputs:
            dims = self.template.tensors[self.inputs[0]].dims
        return f"{operators} {'x'.join(str(dim.at(counts)) for dim in dims)}"


def _constant(entry: Constant, counts: Mapping[Axis, float]) -> str:
    shape = [dim.at(counts) for dim in entry.dims]
    if entry.values is not None:
        return f"{entry.array.dtype}{shape}={[value.at(counts) for value in entry.values]}"
    return f"{entry.array.dtype}{shape}"


def segments_of(template: Template) -> list[Segment]:
    """Return the segments of a file, in order."""
    parts = partition(template.nodes)
    makers = {name: node for node in template.nodes for name in node.outputs}
    readers: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for name in part.reads:
            readers.setdefault(name, []).append(number)
    segments = []
    for number, part in enumerate(parts):
        own = {name for node in part.nodes for name in node.outputs}
        inputs = list(dict.fromkeys(name for node in part.nodes for name in node.tensors if name not in own))
        outputs = [
            name
            for node in part.nodes
            for name in node.outputs
            if name in template.outputs or any(reader != number for reader in readers.get(name, ()))
        ]
        if not outputs:  # nothing of it is used: it costs nothing
            continue
        layer, kind = _named(part.nodes, makers)
        segment = Segment(template, part.nodes, inputs, outputs, list(part.reads), layer, kind)
        segment.variables = _variables(segment.sizes, template.changing)
        segments.append(segment)
    return segments


def _named(nodes: Sequence[TemplateNode], makers: Mapping[str, TemplateNode]) -> tuple[str, str]:
    """Return the layer and the class of a segment."""
    anchor = next((node for node in nodes if node.name in ANCHORS), None)
    if anchor is None:
        return f"from {nodes[0].proto.name or nodes[0].name}", "rest"
    constants = _constants_behind(anchor, makers)
    kind = "convolution" if anchor.name in CONVOLUTIONS else ("product" if constants else "attention")
    following = [
        entry for node in nodes for entry in node.inputs if isinstance(entry, Constant) and node is not anchor
    ]
    for entry in (*constants, *following):  # exporters name transposed weights anew, but not biases
        stem = _module(entry.name)
        if stem is not None:
            return stem, kind
    return str(anchor.proto.name or anchor.name), kind


def _constants_behind(node: TemplateNode, makers: Mapping[str, TemplateNode]) -> list[Constant]:
    found = [entry for entry in node.inputs if isinstance(entry, Constant)]
    for name in node.tensors:
        maker = makers.get(name)
        if maker is not None and is_dequantizer(maker) and isinstance(maker.inputs[0], Constant):
            found.append(maker.inputs[0])
    return found


def _module(name: str) -> str | None:
    """Return the module that a constant's name says, such as ``"layer1.0.conv1"``."""
    for word in (".weight", ".bias"):
        stem, found, _ = name.rpartition(word)
        if found:
            return stem
    return None


def _variables(sizes: Sequence[Size], changing: set[Axis]) -> list[Axis]:
    """Return what sizes depend on: leaves; a concatenation as a whole where its parts do not occur by themselves."""
    pieces: dict[Axis, None] = {}
    for size in sizes:
        if size.axis is not None:
            pieces.update((piece, None) for piece in _factors(size.axis))
    while True:
        mixed = [
            axis
            for axis in pieces
            if axis.kind != LEAF
            and any(set(axis.leaves()) & set(other.leaves()) for other in pieces if other is not axis)
        ]
        if not mixed:
            return [axis for axis in pieces if not changing.isdisjoint(axis.leaves())]
        for axis in mixed:
            del pieces[axis]
            for part in axis.parts:
                pieces.update((piece, None) for piece in _factors(part))


def _factors(axis: Axis) -> list[Axis]:
    """Return the factors of an axis that can change; anything but a product is one."""
    axis = axis.find()
    if axis.kind == PRODUCT:
        return [piece for part in axis.parts for piece in _factors(part)]
    if axis.kind not in (LEAF, CONCATENATION):  # halves and pieces of shuffles: by their leaves
        return list(dict.fromkeys(axis.leaves()))
    return [axis]
