"""Writes a model as ONNX by the way that fits it: an int8 simulation as QDQ, anything else as it is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from dwindle.export.capture import capture
from dwindle.export.onnx_file import OPSET, has_dynamic_batch, write_onnx
from dwindle.measure.structure import InputStructure
from dwindle.quantization.aware_training import finished


@dataclass
class WrittenModel:
    """What was written.

    Attributes:
        files: All files, the model first.
        dynamic_batch: Whether the file takes any batch size.
        quantized: Whether it is an int8 model, made from a simulation.
        weights_only: Whether only its weights are integers.
        notes: What the user should know.
    """

    files: list[Path]
    dynamic_batch: bool
    quantized: bool = False
    weights_only: bool = False
    notes: list[str] = field(default_factory=list)


def is_quantized(model: nn.Module) -> bool:
    """Tell whether dwindle quantized this model (it then simulates int8 and is exported as such)."""
    check = getattr(importlib.import_module("dwindle.quantization"), "is_quantized", None)
    return check is not None and bool(check(model))


def _has_packed_weights(model: nn.Module) -> bool:
    return bool(importlib.import_module("dwindle.export.weight_only").has_packed_weights(model))


def write_onnx_of(
    model: nn.Module,
    structure: InputStructure,
    path: Path,
    *,
    dynamic_batch: bool | None = None,
    opset: int = OPSET,
    external_data: bool | None = None,
    exact_products: bool = False,
) -> WrittenModel:
    """Write a model as ONNX.

    Args:
        model: The model; it is left as it was. One that is trained with quantizers is written as the integer model.
        structure: Its example inputs.
        path: The ``.onnx`` file.
        dynamic_batch: See :func:`dwindle.export.capture.capture`.
        opset: ONNX operator set.
        external_data: Whether weights go into a file of their own; None decides by size.
        exact_products: See :func:`dwindle.export.weight_only.write_packed`.

    Raises:
        ExportError: The model has no ONNX form.
    """
    model = finished(model)
    if is_quantized(model):
        return _write_quantized(model, structure, path, dynamic_batch, opset)
    if _has_packed_weights(model):
        packed = importlib.import_module("dwindle.export.weight_only")
        captured = packed.write_packed(
            model, structure, path, dynamic_batch=dynamic_batch, opset=opset, exact_products=exact_products
        )
        return WrittenModel(
            [path], captured.dynamic_batch, quantized=True, weights_only=True, notes=captured.notes
        )
    captured = capture(model, structure, dynamic_batch=dynamic_batch)
    files = write_onnx(captured, path, opset=opset, external_data=external_data)
    return WrittenModel(files, captured.dynamic_batch, notes=captured.notes)


def _write_quantized(
    model: nn.Module, structure: InputStructure, path: Path, dynamic_batch: bool | None, opset: int
) -> WrittenModel:
    qdq = importlib.import_module("dwindle.export.qdq")
    qdq.export_qdq(model, path, structure.args, structure.kwargs, dynamic_batch=dynamic_batch, opset=opset)
    notes = (
        [] if has_dynamic_batch(path) else ["the batch is fixed, because torch.export refuses a dynamic one"]
    )
    return WrittenModel([path], dynamic_batch=not notes, quantized=True, notes=notes)
