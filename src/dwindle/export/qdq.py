"""Writes a simulated int8 model as ONNX with ``QuantizeLinear`` and ``DequantizeLinear``.

The simulation itself is what gets captured: while the exporter records the forward, every simulated quantizer
leaves a placeholder, and every placeholder becomes the standard operators with the simulation's own scale and
zero point. So file and simulation quantize at the very same places, by construction. Weights are stored as
int8, biases as int32 with the scale of input times weight.
"""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dwindle.config.errors import ExportError, require
from dwindle.export.capture import capture, structure_of
from dwindle.export.onnx_file import OPSET, write_onnx
from dwindle.export.qdq_graph import GraphEditor, StoredWeight
from dwindle.export.qdq_merge import merge_equal
from dwindle.export.qdq_simplify import Simplifier
from dwindle.graph.modes import in_mode
from dwindle.measure.structure import example_call
from dwindle.quantization.calls import CallKey
from dwindle.quantization.levels import fake_quantize, spread_over
from dwindle.quantization.places import WeightPlace
from dwindle.quantization.simulation import (
    NODE_DOMAIN,
    Simulation,
    quantization_parameters,
    simulation_of,
)

LOWEST_OPSET = 17
WIDE_OPSET = 21
"""The first operator set in which quantizers have 16 bits and groups of weights a scale each."""


def export_qdq(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool | None = True,
    opset: int = OPSET,
) -> Path:
    """Write a model that :func:`dwindle.quantize` made as an int8 ONNX file.

    Args:
        model: The simulated model, float32; it is left as it was.
        path: The ``.onnx`` file. It is replaced as a whole or not at all.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
        example_kwargs: Keyword inputs.
        dynamic_batch: True: any batch size, or an error. False: the example's only. None: if it can be.
        opset: ONNX operator set, 17 or later. Where 16-bit numbers or groups of weights ask for it, 21 is written.

    Returns:
        The path.

    Raises:
        ConfigError: The model was not quantized, or the inputs do not fit.
        ExportError: The model has no ONNX form.
        MissingDependencyError: The ONNX libraries are not installed.
    """
    onnx = require("onnx", "onnx")
    simulation = simulation_of(model)
    if opset < LOWEST_OPSET:
        raise ExportError(f"opset {opset} is too old for int8 models; the lowest is {LOWEST_OPSET}")
    opset = max(opset, _needed_opset(simulation))
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        raise ExportError("only float32 models are written as int8; call model.float() first")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    args, kwargs = example_call(model, example_inputs, example_kwargs)
    structure = structure_of(model, args, kwargs)
    weights = integer_weights(model, args, kwargs)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as directory:
        draft = Path(directory) / path.name
        with _exporting(simulation):
            captured = capture(model, structure, dynamic_batch=dynamic_batch)
            write_onnx(captured, draft, opset=opset)
        proto = onnx.load(str(draft))
        _insert(proto, model, weights)
        onnx.checker.check_model(proto)
        draft.write_bytes(proto.SerializeToString())
        os.replace(draft, path)
    return path


def _needed_opset(simulation: Simulation) -> int:
    """Return the first operator set that has the types and scales of a model."""
    places = [slot.place for slot in simulation.slots.values()]
    wide = any(form.stored.endswith("16") for form in [*simulation.forms, *(place.form for place in places)])
    return WIDE_OPSET if wide or any(place.block is not None for place in places) else LOWEST_OPSET


@contextmanager
def _exporting(simulation: Simulation) -> Iterator[None]:
    simulation.exporting = True
    try:
        yield
    finally:
        simulation.exporting = False


@dataclass(frozen=True)
class IntegerWeight:
    """A weight and its bias as the file stores them.

    Attributes:
        values: In the type that its levels are stored as, the weight's shape.
        scale: float32: one value, one per channel, or a matrix with one per block.
        zero_point: In the type of the values, the shape of the scale.
        bias: Unrounded bias, float32 or as wide as the model is, or None.
        bias_scale: float32 scale of the bias: input scale times weight scale, one value or one per channel.
    """

    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bias: np.ndarray | None
    bias_scale: np.ndarray


def integer_weights(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[CallKey, IntegerWeight]:
    """Return every quantized weight, by the call that reads it.

    The weights are taken from a run of the model, so masks and other parametrizations are in them.

    Args:
        model: The simulated model.
        args: Positional inputs to run it with.
        kwargs: Keyword inputs.
    """
    simulation = simulation_of(model)
    simulation.captured = {}
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(*args, **kwargs)
        captured = simulation.captured
    finally:
        simulation.captured = None
    activation_scale, _, scales, zero_points = quantization_parameters(model)
    result = {}
    for key, slot in simulation.slots.items():
        if (key, "weight") not in captured:
            continue
        place, part = slot.place, slice(slot.start, slot.start + slot.length)
        scale = scales[part].float()
        bias = captured.get((key, "bias"))
        weight, zero_point = captured[key, "weight"].cpu(), zero_points[part]
        kind = np.dtype(place.form.stored)
        result[key] = IntegerWeight(
            integers(weight, scale, zero_point, place).astype(kind),
            _in_file(scale, weight, place).numpy(),
            _in_file(zero_point, weight, place).numpy().astype(kind),
            None if bias is None else bias.cpu().to(torch.promote_types(bias.dtype, torch.float32)).numpy(),
            (scale * activation_scale[place.input_quantizer]).numpy(),
        )
    return result


def integers(weight: Tensor, scale: Tensor, zero_point: Tensor, place: WeightPlace) -> np.ndarray:
    """Return the levels of a weight, int32."""
    rounded = fake_quantize(weight, scale, zero_point, place.form, place.axis, place.block)
    step, zero = (spread_over(own.double(), weight, place.axis, place.block) for own in (scale, zero_point))
    levels: np.ndarray = (rounded.double() / step + zero).round().to(torch.int32).numpy()
    return levels


def _in_file(parameter: Tensor, weight: Tensor, place: WeightPlace) -> Tensor:
    """Return scales or zero points in the shape that ``DequantizeLinear`` takes."""
    if place.axis is None:
        return parameter.reshape(())
    if place.block is None:
        return parameter
    blocks = parameter.reshape(weight.shape[place.axis], -1)
    return blocks if place.axis == 0 else blocks.t()


def _insert(proto: Any, model: nn.Module, weights: Mapping[CallKey, IntegerWeight]) -> None:
    """Replace all placeholders of a graph, and drop what nobody reads any more."""
    simulation = simulation_of(model)
    scale, zero_point, _, _ = quantization_parameters(model)
    Simplifier(proto, NODE_DOMAIN).run()
    editor = GraphEditor(proto)
    for node in editor.placeholders(NODE_DOMAIN):
        attributes = editor.attributes(node)
        if node.op_type == "Activation":
            number = int(attributes["quantizer"])
            editor.quantize_activation(
                node, number, float(scale[number]), int(zero_point[number]), simulation.forms[number]
            )
            continue
        key = CallKey(*ast.literal_eval(attributes["call"].decode()))
        if key not in weights:
            raise ExportError(f"the call {key} did not happen in the example run, so its weight is unknown")
        weight, place = weights[key], simulation.slots[key].place
        if node.op_type == "Weight":
            stored = StoredWeight(weight.values, weight.scale, weight.zero_point, place.axis, place.block)
            editor.dequantize_weight(node, place.name, stored)
        elif weight.bias is not None:
            editor.quantize_bias(node, f"{place.name}_bias", weight.bias, weight.bias_scale)
    editor.finish(NODE_DOMAIN)
    merge_equal(proto)
