"""Writes models with packed weights as ONNX with ``MatMulNBits``, which ONNX Runtime and OpenVINO compute as it is.

While the model is captured, every packed layer leaves a placeholder; afterwards each placeholder becomes the operator
with the layer's own integers, scales and zero points. OpenVINO reads the operator as constants of 2, 4 or 8 bits with
their decompression, and keeps them so in its own format.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.config.errors import ExportError, require
from dwindle.export.capture import Capture, capture
from dwindle.export.onnx_file import OPSET, write_onnx
from dwindle.measure.structure import InputStructure
from dwindle.quantization.simulation import NODE_DOMAIN
from dwindle.quantization.weight_only import PackedWeight, packed_weights
from dwindle.quantization.weight_only.packing import pack
from dwindle.realize import PackedLinear
from dwindle.realize.module_places import ModulePlaces

_OPERATOR = "PackedLinear"
_CONTAINERS = (2, 4, 8)
_SMALLEST_BLOCK = 16
_INT8_INPUTS = 4
"""The operator's ``accuracy_level`` that allows inputs rounded to int8."""


def has_packed_weights(model: nn.Module) -> bool:
    """Tell whether layers of a model hold packed integers, simulated or real."""
    return bool(packed_weights(model)) or any(isinstance(own, PackedLinear) for own in model.modules())


def write_packed(
    model: nn.Module,
    structure: InputStructure,
    path: Path,
    *,
    dynamic_batch: bool | None = None,
    opset: int = OPSET,
    exact_products: bool = False,
) -> Capture:
    """Write a model with packed weights as one ONNX file.

    Args:
        model: The model, float32; it is left as it was.
        structure: Its example inputs.
        path: The ``.onnx`` file. It is replaced as a whole or not at all.
        dynamic_batch: See :func:`dwindle.export.capture.capture`.
        opset: ONNX operator set.
        exact_products: Ask ONNX Runtime to multiply with the float inputs. Otherwise it may round them to int8, in
            blocks with a scale each, which is where its speed comes from.

    Returns:
        What was captured, with its notes.

    Raises:
        ExportError: The model has no ONNX form.
        MissingDependencyError: The ONNX libraries are not installed.
    """
    onnx = require("onnx", "onnx")
    if any(own.is_floating_point() and own.dtype != torch.float32 for own in model.parameters()):
        raise ExportError("only float32 models are written with packed weights; call model.float() first")
    weights = _weights(model)
    blocks = {name: block_form(name, weight) for name, weight in weights.items()}
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as directory:
        draft = Path(directory) / path.name
        with _placeholders(model, weights):
            captured = capture(model, structure, dynamic_batch=dynamic_batch)
            write_onnx(captured, draft, opset=opset, external_data=False)
        proto = onnx.load(str(draft))
        for node in [own for own in proto.graph.node if own.domain == NODE_DOMAIN]:
            _replace(onnx, proto, node, blocks, 0 if exact_products else _INT8_INPUTS)
        _domains(onnx, proto)
        draft.write_bytes(proto.SerializeToString())
        os.replace(draft, path)
    return captured


@dataclass(frozen=True)
class BlockForm:
    """A matrix as the operator holds it.

    Attributes:
        levels: uint8, ``[rows, blocks, bytes]``.
        scale: float32, ``[rows, blocks]``.
        zero_point: uint8, ``[rows, bytes]``.
        bits: 2, 4 or 8.
        block: A power of two.
        rows: Outputs.
        columns: Inputs.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    block: int
    rows: int
    columns: int


def block_form(name: str, weight: PackedWeight) -> BlockForm:
    """Return a packed matrix in blocks of the operator: a power of two long, of 2, 4 or 8 bits.

    Other sizes are written as the next larger number of bits, and as several blocks of one scale.

    Args:
        name: The layer, for messages.
        weight: The matrix.

    Raises:
        ExportError: No power of two of at least 16 divides the groups.
    """
    width, columns = weight.form.width(weight.columns), weight.columns
    block = width & -width
    if weight.form.count(columns) == 1:
        block = 32  # one scale for the whole row: any block will do, also where the last one is shorter
    if block < _SMALLEST_BLOCK:
        raise ExportError(
            f"{name}: groups of {width} are no blocks of MatMulNBits, which are powers of two from "
            f"{_SMALLEST_BLOCK} on; quantize with group_size 32, 64 or 128, or None"
        )
    bits = next(own for own in _CONTAINERS if own >= weight.form.bits)
    count = -(-columns // block)
    levels = weight.levels().flatten(1)[:, :columns]
    levels = functional.pad(levels, (0, count * block - columns)).unflatten(1, (count, block))
    each = -(-width // block) if weight.form.count(columns) > 1 else count
    scale = weight.scale.repeat_interleave(each, 1)[:, :count]
    zero = weight.zero_point().repeat_interleave(each, 1)[:, :count]
    return BlockForm(
        pack(levels, bits).cpu(),
        scale.cpu().contiguous(),
        pack(zero, bits).cpu(),
        bits,
        block,
        weight.rows,
        columns,
    )


class _Placeholder(nn.Module):
    """Stands where a packed layer stands while the model is captured."""

    factor: Tensor | None
    bias: Tensor | None

    def __init__(self, name: str, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.name, self.rows = name, weight.rows
        self.register_buffer("factor", weight.input_factor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Leave the placeholder."""
        if self.factor is not None:
            x = x * self.factor
        product: Tensor = torch.onnx.ops.symbolic(
            f"{NODE_DOMAIN}::{_OPERATOR}",
            (x,),
            attrs={"name": self.name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )
        return product if self.bias is None else product + self.bias


def _weights(model: nn.Module) -> dict[str, PackedWeight]:
    real = {name: own.integers for name, own in model.named_modules() if isinstance(own, PackedLinear)}
    return {**packed_weights(model), **real}


@contextmanager
def _placeholders(model: nn.Module, weights: dict[str, PackedWeight]) -> Iterator[None]:
    """Put placeholders in the places of packed layers, and the layers back."""
    places = ModulePlaces(model)
    old = {name: model.get_submodule(name) for name in weights}
    try:
        for name, weight in weights.items():
            fresh = _Placeholder(name, weight, old[name]._parameters.get("bias"))
            places.put(name, fresh.train(old[name].training))
        yield
    finally:
        for name, module in old.items():
            places.put(name, module)


def _replace(onnx: Any, proto: Any, node: Any, blocks: dict[str, BlockForm], accuracy: int) -> None:
    """Turn a placeholder into the operator, in place."""
    name = next(onnx.helper.get_attribute_value(own).decode() for own in node.attribute if own.name == "name")
    own = blocks[name]
    taken = {tensor.name for tensor in proto.graph.initializer}
    names = []
    parts = (("levels", own.levels), ("scales", own.scale), ("zero_points", own.zero_point))
    for part, tensor in parts:
        names.append(f"{name}.{part}")
        if names[-1] not in taken:  # a layer may be called several times
            array = tensor.numpy() if part == "levels" else tensor.flatten().numpy()
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, names[-1]))
    fresh = onnx.helper.make_node(
        "MatMulNBits",
        [node.input[0], *names],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=own.columns,
        N=own.rows,
        bits=own.bits,
        block_size=own.block,
        accuracy_level=accuracy,
    )
    node.CopyFrom(fresh)


def _domains(onnx: Any, proto: Any) -> None:
    """Declare the operator's domain instead of the placeholder's."""
    kept = [own for own in proto.opset_import if own.domain not in (NODE_DOMAIN, "com.microsoft")]
    del proto.opset_import[:]
    proto.opset_import.extend([*kept, onnx.helper.make_opsetid("com.microsoft", 1)])
