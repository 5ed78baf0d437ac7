"""How constants go through operators: one number a channel where it is the same for every input, else NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value

NAN = float("nan")

#: Operators that change no value where the value is the same everywhere (or only move it).
_SAME_EVERYWHERE = frozenset(
    {
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "to",
        "_to_copy",
        "lift_fresh",
    }
)
_AVERAGE_POOLS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})


class ConstantValues:
    """The constants of the values of a recording, along the axes that could be cut.

    Args:
        analysis: The axes.
        tensors: Effective (masked) parameters and buffers by name.
    """

    def __init__(self, analysis: Analysis, tensors: Mapping[str, torch.Tensor]) -> None:
        self.analysis = analysis
        self.tensors = tensors
        self.free = {info.axis for info in analysis.axes if info.axis.frozen is None and info.size > 1}
        self.values: dict[int, torch.Tensor] = {}

    def _cuttable(self, axis: Axis) -> bool:
        return any(leaf in self.free for leaf in axis.leaves())

    def _shape(self, value: Value) -> list[int]:
        return [axis.size if self._cuttable(axis) else 1 for axis in value.axes]

    def _unknown(self, value: Value) -> torch.Tensor:
        return torch.full(self._shape(value), NAN, dtype=torch.float64)

    def _compressed(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Reduce a parameter to one number along the axes that could be cut; NaN where it is not one number."""
        if not tensor.is_floating_point() or not value.axes:
            return self._unknown(value)
        dims = [dim for dim, axis in enumerate(value.axes) if not self._cuttable(axis) and axis.size > 1]
        data = tensor.detach().double().cpu()
        if not dims:
            return data
        high, low = data.amax(dims, keepdim=True), data.amin(dims, keepdim=True)
        return torch.where(high == low, high, torch.full_like(high, NAN))

    def get(self, value: Value) -> torch.Tensor:
        """Constants of a value."""
        found = self.values.get(id(value))
        return found if found is not None else self._unknown(value)

    def _transfer(self, node: Node, name: str) -> list[torch.Tensor] | None:
        """Constants of the results; None where the operator is not followed."""
        inputs = list(node.inputs())
        if name in _SAME_EVERYWHERE:
            return [self._reshaped(self.get(inputs[0]), self._shape(node.output))]
        if name in _AVERAGE_POOLS:
            data = self.get(inputs[0])
            padding = node.argument("padding", [0])
            if any(padding) and node.argument("count_include_pad", True):
                data = torch.where(data == 0, data, torch.full_like(data, NAN))
            return [data]
        if name == "batch_norm":
            return [self._batch_norm(node, inputs)]
        if name in ("mul", "mul_"):
            return [self._product(node)]
        if name in ("mean",):
            return [self._reduced(node, inputs[0])]
        if name in ("flatten", "view", "reshape", "_unsafe_view", "unflatten", "squeeze", "unsqueeze"):
            return [self._regrouped(self.get(inputs[0]), inputs[0], node.output)]
        if name in (
            "permute",
            "transpose",
            "t",
            "movedim",
            "chunk",
            "split",
            "split_with_sizes",
            "cat",
            "select",
            "unbind",
            "slice",
            "expand",
            "constant_pad_nd",
            "pad",
        ):
            return self._moved(node, name, inputs)
        if name == "embedding":
            return [self.get(inputs[0])[:1].view([1] * (len(node.output.shape) - 1) + [-1])]
        if name == "scaled_dot_product_attention":
            # weights sum to one: a value that is the same for all tokens comes out as it is
            value, wanted = self.get(inputs[2]), self._shape(node.output)
            if value.dim() > 2 and value.shape[-3] not in (1, wanted[-3]):
                value = value.repeat_interleave(wanted[-3] // value.shape[-3], dim=-3)  # grouped queries
            return [self._reshaped(value, wanted)]
        if name in ("matmul", "bmm"):
            return [self._zero_products(node, inputs)]
        if torch.Tag.pointwise in node.target.tags or name in (
            "masked_fill",
            "where",
            "hardswish",
            "relu6",
            "selu",
        ):
            return [self._pointwise(node)]
        return None

    def _pointwise(self, node: Node) -> torch.Tensor:
        """Run the operator itself on the constants; NaN goes through."""
        target = _functional(node)

        def swap(argument: Any) -> Any:
            if isinstance(argument, Value):
                return self.get(argument).clone()
            if isinstance(argument, list | tuple):
                return [swap(item) for item in argument]
            return argument

        kwargs = {
            key: swap(item) for key, item in node.kwargs.items() if key not in ("dtype", "device", "layout")
        }
        args = [swap(argument) for argument in node.args]
        varying = None
        for tensor in [item for item in args if isinstance(item, torch.Tensor)]:
            varying = tensor.isnan() if varying is None else varying | tensor.isnan()
        result = target(*args, **kwargs)
        if varying is not None:
            # clamp and the like may hide a NaN
            result = torch.where(varying.expand(result.shape), torch.full_like(result, NAN), result)
        return result

    def _product(self, node: Node) -> torch.Tensor:
        factors = [
            self.get(a) if isinstance(a, Value) else torch.tensor(float(a)).double() for a in node.args[:2]
        ]
        result = factors[0] * factors[1]
        zero = (factors[0] == 0) | (factors[1] == 0)
        return torch.where(zero.expand(result.shape), torch.zeros_like(result), result)

    def _batch_norm(self, node: Node, inputs: list[Value]) -> torch.Tensor:
        data = self.get(inputs[0])
        place = [1] * data.dim()
        place[1] = -1

        def channel(argument: str, default: float) -> torch.Tensor:
            value = node.argument(argument)
            return self.get(value).view(place) if isinstance(value, Value) else torch.tensor(default).double()

        weight, bias = channel("weight", 1.0), channel("bias", 0.0)
        mean, variance = channel("running_mean", NAN), channel("running_var", NAN)
        result = (data - mean) / (variance + float(node.argument("eps"))).sqrt() * weight + bias
        return torch.where((weight == 0).expand(result.shape), bias.expand(result.shape), result)

    def _zero_products(self, node: Node, inputs: list[Value]) -> torch.Tensor:
        """A product of activations is zero where one factor is zero all along the summed axis."""
        left, right = (self.get(value) == 0 for value in inputs[:2])
        unknown = self._unknown(node.output)
        if left.dim() < 2 or right.dim() < 2:
            return unknown
        zero = left.all(-1, keepdim=True) | right.all(-2, keepdim=True)
        return torch.where(zero.expand(unknown.shape), torch.zeros_like(unknown), unknown)

    def _reduced(self, node: Node, value: Value) -> torch.Tensor:
        data = self.get(value)
        dims = node.argument("dim")
        dims = list(range(data.dim())) if not dims else [dim % data.dim() for dim in dims]
        if any(data.shape[dim] != 1 for dim in dims):
            return self._unknown(node.output)
        return (
            data
            if node.argument("keepdim")
            else data.view([s for d, s in enumerate(data.shape) if d not in dims])
        )

    def _reshaped(self, data: torch.Tensor, shape: list[int]) -> torch.Tensor:
        return data if list(data.shape) == shape else data.view(shape)

    def _regrouped(self, data: torch.Tensor, value: Value, output: Value) -> torch.Tensor:
        """Reshape constants: widen merged dimensions to full size where the merged one could be cut."""
        full = data.expand([axis.size for axis in value.axes]).reshape(output.shape)
        return self._compressed(full, output)

    def _moved(self, node: Node, name: str, inputs: list[Value]) -> list[torch.Tensor]:
        """Run the operator at full size along every dimension, then compress."""
        elements = sum(math.prod(value.shape) for value in inputs)
        if elements > 50_000_000:
            return [self._unknown(value) for value in node.outputs]

        def swap(argument: Any) -> Any:
            if isinstance(argument, Value):
                return self.get(argument).expand([axis.size for axis in argument.axes])
            if isinstance(argument, list | tuple):
                return [swap(item) for item in argument]
            return argument

        result = _functional(node)(*(swap(argument) for argument in node.args), **node.kwargs)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        return [self._compressed(own, value) for own, value in zip(results, node.outputs, strict=True)]


def _functional(node: Node) -> Any:
    """The operator without its in-place form."""
    name = str(node.target._schema.name).split("::")[1]
    if not name.endswith("_") or name.startswith("_"):
        return node.target
    packet = getattr(torch.ops.aten, name[:-1], None)
    if packet is None:
        return node.target
    overload = node.target._overloadname
    return getattr(packet, overload, packet.default) if overload in packet.overloads() else packet
