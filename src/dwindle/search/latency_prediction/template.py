"""The file that a runtime gets, with every size a function of the counts of axes.

A :class:`Template` is read from exports of the whole model and of one that is cut. From then on a file for any counts
is made in milliseconds, by cropping weights: the same operators, shapes and types as a real export has, so the same
latency (which does not depend on the values).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dwindle.config.errors import ConfigError, require
from dwindle.graph.axes import Axis
from dwindle.graph.counts import Counts
from dwindle.search.latency_prediction.exported import Exported
from dwindle.search.latency_prediction.sizes import Size, SizeMatcher

__all__ = ["Constant", "Template", "TemplateNode"]


@dataclass(eq=False, slots=True)
class Constant:
    """A constant of the file.

    Attributes:
        name: Its name in the export of the whole model.
        array: Its values there.
        dims: Its shape.
        values: Its values as sizes, when it is a short list of integers (the target of a reshape); otherwise None.
    """

    name: str
    array: np.ndarray
    dims: tuple[Size, ...]
    values: tuple[Size, ...] | None = None

    def at(self, counts: Mapping[Any, float]) -> np.ndarray:
        """Return the values for counts: the first indices of each dimension."""
        if self.values is not None and any(value.axis is not None for value in self.values):
            numbers = [value.at(counts) for value in self.values]
            return np.array(numbers, self.array.dtype).reshape([dim.at(counts) for dim in self.dims])
        shape = tuple(dim.at(counts) for dim in self.dims)
        return self.array if shape == self.array.shape else self.array[tuple(map(slice, shape))]


@dataclass(eq=False, slots=True)
class TemplateNode:
    """One operator.

    Attributes:
        proto: The operator in the export of the whole model.
        inputs: A constant, the name of a tensor, or ``""`` for one that is left out.
        attributes: Integers among its attributes that change, by name and place (-1: not a list).
    """

    proto: Any
    inputs: list[Constant | str]
    attributes: dict[tuple[str, int], Size] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Names of the results."""
        return [name for name in self.proto.output if name]

    @property
    def name(self) -> str:
        """Operator type, such as ``"Conv"``."""
        return str(self.proto.op_type)

    @property
    def tensors(self) -> list[str]:
        """Names of the inputs that are no constants."""
        return [entry for entry in self.inputs if isinstance(entry, str) and entry]

    def reading(self, renamed: Mapping[str, str], prefix: str = "") -> TemplateNode:
        """Return a copy that reads tensors by other names.

        Args:
            renamed: New names by old ones.
            prefix: Stands before the names of the copy and of its results.
        """
        proto = type(self.proto)()
        proto.CopyFrom(self.proto)
        inputs = [renamed.get(entry, entry) if isinstance(entry, str) else entry for entry in self.inputs]
        for place, entry in enumerate(inputs):
            if isinstance(entry, str):
                proto.input[place] = entry
        if prefix:
            proto.name = prefix + proto.name
            proto.output[:] = [prefix + name if name else "" for name in proto.output]
        return TemplateNode(proto, inputs, self.attributes)


@dataclass(eq=False, slots=True)
class Tensor:
    """A tensor that operators pass on.

    Attributes:
        dtype: ONNX element type.
        dims: Its shape.
        batched: Which dimensions have the name of the batch in the file's inputs, or follow the batch.
        values: Its values as sizes, when it is a short list of integers.
        sample: Its values in the whole model, for an input of the file, or when it is no float.
    """

    dtype: int
    dims: tuple[Size, ...]
    batched: tuple[bool, ...]
    values: tuple[Size, ...] | None = None
    sample: np.ndarray | None = None

    def array(self, counts: Mapping[Any, float]) -> np.ndarray:
        """Return values to feed for counts."""
        onnx = require("onnx", "onnx")
        shape = tuple(dim.at(counts) for dim in self.dims)
        if self.values is not None:
            return np.array([value.at(counts) for value in self.values], np.int64).reshape(shape)
        kind = onnx.helper.tensor_dtype_to_np_dtype(self.dtype)
        if self.sample is not None:
            return np.asarray(self.sample[tuple(map(slice, shape))], order="C")
        generator = np.random.default_rng(0)
        if np.issubdtype(kind, np.floating):
            return generator.standard_normal(shape, np.float32).astype(kind)
        return generator.integers(0, 100, shape).astype(kind)


@dataclass(eq=False, slots=True)
class Template:
    """A file as a function of counts.

    Attributes:
        nodes: The operators, in order.
        tensors: Every tensor by name.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opsets: Operator sets, as in the export.
        ir_version: Of the export.
        changing: Leaves that have different counts in the exports.
    """

    nodes: list[TemplateNode]
    tensors: dict[str, Tensor]
    inputs: list[str]
    outputs: list[str]
    opsets: list[Any]
    ir_version: int
    changing: set[Axis]

    @classmethod
    def of(cls, exports: Sequence[Exported], matcher: SizeMatcher) -> Template:
        """Compare exports of differently cut models.

        Args:
            exports: The whole model first.
            matcher: Knows the counts of each.

        Raises:
            ConfigError: They differ in more than sizes.
        """
        whole = exports[0]
        for other in exports[1:]:
            if [node.op_type for node in other.nodes] != [node.op_type for node in whole.nodes]:
                raise ConfigError(
                    "differently cut models are exported as different operators, so latency cannot be composed"
                )
        nodes, constants = [], _Constants(matcher)
        for row in zip(*(own.nodes for own in exports), strict=True):
            inputs: list[Constant | str] = []
            for place, name in enumerate(row[0].input):
                names = [node.input[place] for node in row]
                found = [own.constants.get(other) for own, other in zip(exports, names, strict=True)]
                inputs.append(name if found[0] is None else constants.of(name, found))
            nodes.append(TemplateNode(row[0], inputs, _attributes(row, matcher)))
        tensors = {}
        names = [list(own.shown) for own in exports]
        for own_names in zip(*names, strict=True):
            shown = [own.shown[name] for own, name in zip(exports, own_names, strict=True)]
            tensors[own_names[0]] = _tensor(own_names[0], shown, matcher)
        return cls(
            nodes, tensors, whole.inputs, whole.outputs, whole.opsets, whole.ir_version, matcher.changing
        )

    def model(
        self,
        counts: Counts | Mapping[Any, float],
        *,
        nodes: Sequence[TemplateNode] | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Any:
        """Return an ONNX model for counts, of all operators or of some.

        Args:
            counts: How many indices of each axis stay.
            nodes: The operators; None: all.
            inputs: Tensors that are fed.
            outputs: Tensors that are given back.
        """
        onnx = require("onnx", "onnx")
        helper = onnx.helper
        nodes = self.nodes if nodes is None else nodes
        inputs = self.inputs if inputs is None else inputs
        outputs = self.outputs if outputs is None else outputs
        protos: list[Any] = []
        initializers: dict[str, Any] = {}
        for node in nodes:
            protos.append(_operator(node, counts))
            for entry in node.inputs:
                if isinstance(entry, Constant) and entry.name not in initializers:
                    array = np.asarray(entry.at(counts), order="C")
                    initializers[entry.name] = onnx.numpy_helper.from_array(array, entry.name)
        fed = []
        for name in inputs:
            tensor = self.tensors[name]
            if tensor.values is not None:
                initializers[name] = onnx.numpy_helper.from_array(tensor.array(counts), name)
            else:
                dims = [
                    _batch_name(name, place) if batched else dim.at(counts)
                    for place, (dim, batched) in enumerate(zip(tensor.dims, tensor.batched, strict=True))
                ]
                fed.append(helper.make_tensor_value_info(name, tensor.dtype, dims))
        given = []
        for name in outputs:  # their sizes follow from the rest
            tensor = self.tensors[name]
            unknown = [f"{name}_{place}" for place in range(len(tensor.dims))]
            given.append(helper.make_tensor_value_info(name, tensor.dtype, unknown))
        graph = helper.make_graph(protos, "template", fed, given, list(initializers.values()))
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)

    def feed(self, counts: Mapping[Any, float], inputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return arrays to feed for counts."""
        names = self.inputs if inputs is None else inputs
        return {name: self.tensors[name].array(counts) for name in names if self.tensors[name].values is None}


def _batch_name(tensor: str, place: int) -> str:
    """Name of a dimension that follows the batch: one for all where it is the first, as in an export."""
    return "batch" if place == 0 else f"{tensor}_{place}"


def _operator(node: TemplateNode, counts: Mapping[Any, float]) -> Any:
    """Return an operator with the names of its constants and the numbers that it has under counts."""
    proto = type(node.proto)()
    proto.CopyFrom(node.proto)
    for place, entry in enumerate(node.inputs):
        if isinstance(entry, Constant):
            proto.input[place] = entry.name
    for (name, place), size in node.attributes.items():
        attribute = next(own for own in proto.attribute if own.name == name)
        if place < 0:
            attribute.i = size.at(counts)
        else:
            attribute.ints[place] = size.at(counts)
    return proto


class _Constants:
    """Constants by name, each compared once."""

    def __init__(self, matcher: SizeMatcher) -> None:
        self.matcher = matcher
        self.known: dict[tuple[str, tuple[tuple[int, ...], ...]], Constant] = {}

    def of(self, name: str, arrays: Sequence[np.ndarray | None]) -> Constant:
        if any(array is None or array.ndim != arrays[0].ndim for array in arrays):  # type: ignore[union-attr]
            raise ConfigError(f"{name} is a constant in one export and computed in another")
        present = [array for array in arrays if array is not None]
        key = (name, tuple(array.shape for array in present))
        values = _integers(name, present, self.matcher)
        if values is not None:  # equal at full size, but not always: one name, several constants
            key = (name, tuple(tuple(array.ravel().tolist()) for array in present))
        if key not in self.known:
            dims = tuple(
                self.matcher.size(sizes, f"dimension {place} of {name}")
                for place, sizes in enumerate(zip(*(array.shape for array in present), strict=True))
            )
            taken = sum(1 for other, _ in self.known if other == name)
            own = f"{name}.{taken}" if taken else name
            self.known[key] = Constant(own, present[0], dims, values)
        return self.known[key]


def _integers(what: str, arrays: Sequence[np.ndarray], matcher: SizeMatcher) -> tuple[Size, ...] | None:
    """Return the values of short integer arrays as sizes; None for anything else."""
    first = arrays[0]
    if first.dtype != np.int64 or first.ndim > 1 or first.size > 8 or first.size == 0:
        return None
    if any(array.shape != first.shape for array in arrays):
        return None
    rows = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    return tuple(matcher.size(row, f"value {place} of {what}") for place, row in enumerate(rows))


def _attributes(row: Sequence[Any], matcher: SizeMatcher) -> dict[tuple[str, int], Size]:
    """Return the integers among the attributes of one operator that differ between exports."""
    found: dict[tuple[str, int], Size] = {}
    for attribute in row[0].attribute:
        if attribute.type == attribute.GRAPH:
            raise ConfigError(f"latency cannot be composed of operators that hold graphs ({row[0].op_type})")
        others = [next(own for own in node.attribute if own.name == attribute.name) for node in row]
        what = f"{attribute.name} of {row[0].op_type}"
        if attribute.type == attribute.INT and len({own.i for own in others}) > 1:
            found[attribute.name, -1] = matcher.size([own.i for own in others], what)
        elif attribute.type == attribute.INTS:
            for place, numbers in enumerate(zip(*(own.ints for own in others), strict=True)):
                if len(set(numbers)) > 1:
                    found[attribute.name, place] = matcher.size(numbers, what)
    return found


def _tensor(name: str, shown: Sequence[Any], matcher: SizeMatcher) -> Tensor:
    first = shown[0]
    dims = tuple(
        matcher.size(sizes, f"dimension {place} of {name}")
        for place, sizes in enumerate(zip(*(own.shape for own in shown), strict=True))
    )
    values = None
    if all(own.sample is not None for own in shown) and first.is_shape:
        values = _integers(name, [own.sample for own in shown], matcher)
    return Tensor(first.dtype, dims, first.batched, values, first.sample)
