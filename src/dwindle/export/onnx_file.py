"""Writes a captured program as an ONNX file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dwindle.config.errors import ExportError, require
from dwindle.export.capture import Capture, first_line, quiet

INLINE_LIMIT = 1_500_000_000
"""Weights above this many bytes go into a file beside the model: a protobuf message ends at 2 GiB."""

OPSET = 20


def write_onnx(
    captured: Capture, path: Path, *, opset: int = OPSET, external_data: bool | None = None
) -> list[Path]:
    """Write a captured program as ONNX.

    Weights in a file of their own are named after their content, so that a model file never finds weights
    of another export under the name it looks for.

    Args:
        captured: The program.
        path: The ``.onnx`` file.
        opset: ONNX operator set.
        external_data: Whether the weights go into a file of their own; None decides by size.

    Returns:
        The files, the model first.

    Raises:
        ExportError: The program uses an operator that has no ONNX form.
        MissingDependencyError: The ONNX libraries are not installed.
    """
    onnx = require("onnx", "onnx")
    require("onnxscript", "onnx")
    size = sum(tensor.nbytes for tensor in captured.program.state_dict.values())
    external = size > INLINE_LIMIT if external_data is None else external_data
    try:
        with quiet():
            _convert(captured, path, opset, external)
    except Exception as error:  # the exporter raises a great many classes
        raise ExportError(f"the model has no ONNX form: {first_line(_origin(error))}") from error
    return [path, _name_weights(onnx, path)] if external else [path]


def _convert(captured: Capture, draft: Path, opset: int, external: bool) -> None:
    _loosen_views(captured.program)
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels promise memory layouts that their parts do not have
        program = torch.onnx.export(
            captured.program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=captured.input_names,
            output_names=captured.output_names,
            verbose=False,
            external_data=external,
        )
    assert program is not None  # only for the type checker: the dynamo exporter always returns a program
    _use_names_of_the_model(program.model)
    if captured.dynamic_batch:
        _name_batch(program.model, captured.batched)
    _strip_traces(program.model)
    program.save(str(draft), external_data=external)


def _origin(error: Exception) -> Exception:
    """The first error of a chain; those around it only say at which step it happened."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _loosen_views(program: Any) -> None:
    """Let every view be a reshape: operators are taken apart next, and the parts may lay memory out differently."""
    module = program.graph_module
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    module.recompile()


def _use_names_of_the_model(model: Any) -> None:
    """Give weights the names they have in the model, without the prefix of the wrapper they were captured
    in.
    """
    initializers = model.graph.initializers
    taken = {value.name for node in model.graph for value in node.outputs} | set(initializers)
    taken |= {value.name for value in model.graph.inputs}
    for name in [name for name in initializers if name.startswith("model.")]:
        wanted = name.removeprefix("model.")
        if wanted not in taken:
            initializers[name].name = wanted
            taken.add(wanted)


def _strip_traces(model: Any) -> None:
    """Drop the Python stack traces that the exporter notes: they name paths of this machine, and cost
    bytes.
    """
    holders = [model, model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        holders.extend([node, *node.outputs])
    for function in model.functions.values():
        holders.append(function)
        for node in function.all_nodes():
            holders.extend([node, *node.outputs])
    for holder in holders:
        for key in [key for key in holder.metadata_props if key.startswith("pkg.")]:
            del holder.metadata_props[key]


def _name_batch(model: Any, batched: Sequence[bool]) -> None:
    """Call the batch dimension ``batch`` wherever the exporter left a made-up symbol."""
    inputs = [value for value, is_batched in zip(model.graph.inputs, batched, strict=False) if is_batched]
    if not inputs or inputs[0].shape is None:
        return
    symbol = str(inputs[0].shape[0])
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for index, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size) == symbol:
                value.shape[index] = "batch"


def _name_weights(onnx: Any, draft: Path) -> Path:
    """Name the external weights after their content, and write that name into the model."""
    model = onnx.load(str(draft), load_external_data=False)
    old = draft.parent / next(iter(external_files(draft)))
    with old.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    new = draft.parent / f"{draft.name}.{digest}.data"
    old.rename(new)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = new.name
    draft.write_bytes(model.SerializeToString())
    return new


def external_files(path: Path) -> set[str]:
    """Return the names of the files beside it that an ONNX file takes weights from (only those named after
    it).
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # a file that is no ONNX refers to nothing
        return set()
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return {name for name in names if Path(name).name == name and name.startswith(path.name)}


def has_dynamic_batch(path: Path) -> bool:
    """Tell whether some input of an ONNX file has a first dimension of any size."""
    model = require("onnx", "onnx").load(str(path), load_external_data=False)
    firsts = [entry.type.tensor_type.shape.dim[:1] for entry in model.graph.input]
    return any(dim.HasField("dim_param") for dims in firsts for dim in dims)
