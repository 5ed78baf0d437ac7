"""An exported file with the shape of every tensor in it, as a run of it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwindle.config.errors import ConfigError, require
from dwindle.measure.structure import InputStructure, batch_size, with_batch

__all__ = ["Exported", "ShownTensor"]


@dataclass(frozen=True, slots=True)
class ShownTensor:
    """What a run shows of a tensor.

    Attributes:
        dtype: ONNX element type.
        shape: Its shape at the batch of the example.
        batched: Which dimensions change with the batch.
        sample: Its values, unless they are floats that the file computes.
        is_shape: Whether it is computed from shapes alone, so that it is a constant where the batch is.
    """

    dtype: int
    shape: tuple[int, ...]
    batched: tuple[bool, ...]
    sample: np.ndarray | None
    is_shape: bool


@dataclass(slots=True)
class Exported:
    """An exported file.

    Attributes:
        nodes: Operators in order, without those that only hold a constant.
        constants: Constants by name.
        shown: Every other tensor by name, in order.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opsets: Operator sets.
        ir_version: Of the file.
    """

    nodes: list[Any]
    constants: dict[str, np.ndarray]
    shown: dict[str, ShownTensor]
    inputs: list[str]
    outputs: list[str]
    opsets: list[Any]
    ir_version: int

    @classmethod
    def read(cls, path: Path, structure: InputStructure) -> Exported:
        """Read a file and run it with all its tensors shown.

        Args:
            path: An ONNX file.
            structure: Example inputs.

        Raises:
            ConfigError: The file holds functions.
        """
        onnx = require("onnx", "onnx")
        model = onnx.load(str(path))
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        graph = model.graph
        constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant":
                held = next(own for own in node.attribute if own.name == "value")
                constants[node.output[0]] = onnx.numpy_helper.to_array(held.t)
            else:
                nodes.append(node)
        inputs = [entry.name for entry in graph.input if entry.name not in constants]
        outputs = [entry.name for entry in graph.output]
        named = any(dim.dim_param for entry in graph.input for dim in entry.type.tensor_type.shape.dim)
        shown = _shown(model, nodes, inputs, structure, dynamic=named)
        return cls(nodes, constants, shown, inputs, outputs, list(model.opset_import), model.ir_version)


def _shown(
    model: Any, nodes: Sequence[Any], inputs: Sequence[str], structure: InputStructure, *, dynamic: bool
) -> dict[str, ShownTensor]:
    """Run a model with all its tensors as outputs, at two batch sizes where it takes any."""
    onnx, onnxruntime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    names = [name for node in nodes for name in node.output if name]
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.output[:]
    twin.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        twin.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    own = dict(zip(structure.names, structure.example, strict=True))
    if any(name not in own for name in inputs):
        raise ConfigError(f"the file takes the inputs {list(inputs)}, the model {list(own)}")
    feeds = [{name: own[name].detach().cpu().numpy() for name in inputs}]
    size = batch_size(structure.example)
    if dynamic and size is not None:
        larger = dict(zip(structure.names, with_batch(structure.example, size + 1), strict=True))
        feeds.append({name: larger[name].detach().cpu().numpy() for name in inputs})
    runs = [{**feed, **dict(zip(names, session.run(names, feed), strict=True))} for feed in feeds]
    from_shapes = _from_shapes(nodes)
    shown = {}
    for name in (*inputs, *names):
        array = runs[0][name]
        batched = tuple(a != b for a, b in zip(array.shape, runs[-1][name].shape, strict=True))
        kept = array if name in inputs or not np.issubdtype(array.dtype, np.floating) else None
        kept = kept if kept is None or name in inputs or kept.dtype not in (np.uint8, np.int8) else None
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        shown[name] = ShownTensor(kind, array.shape, batched, kept, name in from_shapes)
    return shown


def _from_shapes(nodes: Sequence[Any]) -> set[str]:
    """Return the tensors that are computed from shapes (and constants) alone."""
    made = {name for node in nodes for name in node.output}
    found: set[str] = set()
    for node in nodes:
        inputs = [name for name in node.input if name in made]
        if node.op_type in ("Shape", "Size") or (inputs and all(name in found for name in inputs)):
            found.update(node.output)
    return found
