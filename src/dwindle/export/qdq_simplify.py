"""Small rewrites of a graph so that integer kernels find the patterns they know. None changes a value.

A zero padding before a convolution becomes the convolution's own, because runtimes have no int8 ``Pad``; a mean
over height and width becomes ``GlobalAveragePool``, which has an int8 kernel where ``ReduceMean`` has none; a
reduction that a quantizer reads keeps its dimensions and drops them behind, because OpenVINO computes a quantizer
with one range for each channel wrongly when it is fused into a reduction that drops some (2026.4.1: 13 dB, where a
norm's weights, which move through the mean into the quantizer, differ between channels).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dwindle.config.errors import require

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")


class Simplifier:
    """Looks for the patterns in a graph whose quantizers are still placeholders.

    Args:
        proto: The ``onnx.ModelProto``, changed in place.
        domain: Domain of the placeholders.
    """

    def __init__(self, proto: Any, domain: str) -> None:
        self.onnx = require("onnx", "onnx")
        self.graph, self.domain = proto.graph, domain
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.results = {value.name for value in self.graph.output}
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in [*self.graph.value_info, *self.graph.input]
        }

    def run(self) -> None:
        """Apply all rewrites."""
        for node in list(self.graph.node):
            if node.op_type in _REDUCTIONS:
                self._keep_dimensions(node)
        for node in self.graph.node:
            if node.op_type == "Conv":
                self._take_padding(node)
            elif node.op_type == "ReduceMean":
                self._use_global_average(node)

    def _attribute(self, node: Any, name: str, default: Any) -> Any:
        for entry in node.attribute:
            if entry.name == name:
                return self.onnx.helper.get_attribute_value(entry)
        return default

    def _constant(self, name: str) -> np.ndarray | None:
        if name not in self.constants:
            return None
        array: np.ndarray = self.onnx.numpy_helper.to_array(self.constants[name])
        return array

    def _quantizer(self, name: str) -> int | None:
        """Return the number of the quantizer that made a value, or None."""
        maker = self.makers.get(name)
        if maker is None or maker.domain != self.domain or maker.op_type != "Activation":
            return None
        return int(self._attribute(maker, "quantizer", -1))

    def _take_padding(self, convolution: Any) -> None:
        """Convolution of (quantized zero padding of a value quantized alike): pad in the convolution."""
        quantizer = self._quantizer(convolution.input[0])
        if quantizer is None:
            return
        pad = self.makers.get(self.makers[convolution.input[0]].input[0])
        if pad is None or pad.op_type != "Pad" or self._quantizer(pad.input[0]) != quantizer:
            return
        widths = self._zero_padding(pad)
        own = self._attribute(convolution, "pads", None)
        if widths is None or own is None:
            return
        if self._attribute(convolution, "auto_pad", b"NOTSET") != b"NOTSET":
            return
        if len(widths) != len(own) + 4:  # before and after of batch and channel come on top
            return
        half = len(widths) // 2
        spatial = [*widths[2:half], *widths[half + 2 :]]
        if any(widths[:2]) or any(widths[half : half + 2]) or any(width < 0 for width in spatial):
            return
        for entry in convolution.attribute:
            if entry.name == "pads":
                entry.ints[:] = [int(a + b) for a, b in zip(own, spatial, strict=True)]
        convolution.input[0] = pad.input[0]

    def _zero_padding(self, pad: Any) -> list[int] | None:
        if self._attribute(pad, "mode", b"constant") != b"constant" or (len(pad.input) > 3 and pad.input[3]):
            return None
        widths = self._constant(pad.input[1])
        if widths is None:
            return None
        if len(pad.input) > 2 and pad.input[2]:
            value = self._constant(pad.input[2])
            if value is None or float(value) != 0.0:
                return None
        return [int(width) for width in widths]

    def _keep_dimensions(self, reduction: Any) -> None:
        """Reduction that drops dimensions before a quantizer: keep them, and drop them behind."""
        output = reduction.output[0]
        axes = reduction.input[1] if len(reduction.input) > 1 else ""
        quantized = any(node.domain == self.domain and output in node.input for node in self.graph.node)
        if not axes or not quantized or self._attribute(reduction, "keepdims", 1) != 0:
            return
        kept = f"{output}_kept"
        for entry in reduction.attribute:
            if entry.name == "keepdims":
                entry.i = 1
        reduction.output[0] = kept
        self.makers[kept] = reduction
        squeeze = self.onnx.helper.make_node("Squeeze", [kept, axes], [output], name=f"{output}_squeezed")
        self.makers[output] = squeeze
        position = next(i for i, node in enumerate(self.graph.node) if kept in node.output)
        self.graph.node.insert(position + 1, squeeze)

    def _use_global_average(self, mean: Any) -> None:
        """Mean over height and width of a quantized value: ``GlobalAveragePool``."""
        if self._quantizer(mean.input[0]) is None or self.ranks.get(mean.input[0]) != 4:
            return
        axes = self._constant(mean.input[1]) if len(mean.input) > 1 else None
        if axes is None or self._attribute(mean, "keepdims", 1) != 1:
            return
        if sorted(int(axis) % 4 for axis in axes.reshape(-1)) == [2, 3]:
            mean.op_type = "GlobalAveragePool"
            del mean.attribute[:]
            del mean.input[1:]
