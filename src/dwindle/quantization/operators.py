"""Which operators run in int8, what fuses with them and what shares scales: data, one table for each runtime.

Operators are named as Python calls them (``conv2d``, ``add``, ``flatten``), which is also how they are seen
by a torch function mode, whether a module or a plain function called them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dwindle.config.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class ComputeRule:
    """Where an operator with weights has its operands.

    Attributes:
        input: Position of the activation; ``input`` by keyword.
        weight: Position of the weight; ``weight`` by keyword.
        bias: Position of the bias; ``bias`` by keyword.
        weight_axis: Dimension of the weight that is the output channel.
        quantize_output: True when the runtime has the operator in int8 only with an int8 output.
    """

    input: int = 0
    weight: int = 1
    bias: int = 2
    weight_axis: int = 0
    quantize_output: bool = False
    keywords: tuple[str, str, str] = ("input", "weight", "bias")


def _convolutions(quantize_output: bool) -> dict[str, ComputeRule]:
    plain = ComputeRule(quantize_output=quantize_output)
    transposed = ComputeRule(weight_axis=1, quantize_output=quantize_output)
    rules = {f"conv{rank}d": plain for rank in (1, 2, 3)}
    rules.update({f"conv_transpose{rank}d": transposed for rank in (1, 2, 3)})
    rules["linear"] = ComputeRule()
    rules["addmm"] = ComputeRule(input=1, weight=2, bias=0, weight_axis=1, keywords=("mat1", "mat2", "input"))
    return rules


SHARED = frozenset(
    [
        "flatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "swapaxes",
        "contiguous",
        "squeeze",
        "unsqueeze",
        "movedim",
        "unflatten",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "__getitem__",
        "narrow",
        "select",
        "expand",
        "tile",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_dropout",
        "identity",
        "detach",
        "clone",
        "relu",
        "relu_",
        "pad",
    ]
)
"""Operators that move or choose values: their output keeps the scale of their input."""


SUMS = frozenset(("add", "add_", "__add__", "__iadd__"))
PRODUCTS = frozenset(("mul", "mul_", "__mul__", "__imul__"))
_RECTIFIERS = frozenset(("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp"))
_SMOOTH_ACTIVATIONS = frozenset(
    (
        "hardswish",
        "silu",
        "sigmoid",
        "sigmoid_",
        "hardsigmoid",
        "gelu",
        "tanh",
        "leaky_relu",
        "elu",
        "mish",
        "softplus",
    )
)


@dataclass(frozen=True)
class Backend:
    """What one runtime does in int8.

    Attributes:
        name: The runtime.
        compute: Operators with weights.
        fused_activations: Operators that vanish into the quantizer behind a compute operator or a sum.
        elementwise: Operators on two or more activations that have an int8 kernel.
        gates: Operators whose output may be quantized to feed an int8 product (squeeze and excitation).
        pools: Averages, which want a scale of their own on their output.
        concatenations: Operators that join values; all inputs and the output share one scale.
        shared: Operators that keep the scale of their input.
        sums: Those of the elementwise operators that add.
        fuses_sums: True when the kernel of a compute operator adds a second operand before it rounds; what it gave
            itself is then never rounded.
    """

    name: str
    compute: Mapping[str, ComputeRule]
    fused_activations: frozenset[str] = _RECTIFIERS
    elementwise: frozenset[str] = SUMS | PRODUCTS
    gates: frozenset[str] = frozenset(("sigmoid", "sigmoid_", "hardsigmoid"))
    pools: frozenset[str] = frozenset(
        f"{kind}_pool{rank}d" for kind in ("avg", "adaptive_avg") for rank in (1, 2, 3)
    ) | frozenset(("mean",))
    concatenations: frozenset[str] = frozenset(("cat", "concat", "concatenate"))
    shared: frozenset[str] = field(default=SHARED)
    sums: frozenset[str] = SUMS
    fuses_sums: bool = False


def _layers_only(name: str) -> Backend:
    """Inputs and weights of layers; nothing between them."""
    none: frozenset[str] = frozenset()
    return Backend(
        name,
        _convolutions(quantize_output=False),
        elementwise=none,
        gates=none,
        pools=none,
        concatenations=none,
        shared=none,
    )


BACKENDS: dict[str, Backend] = {
    # ONNX Runtime's int8 convolution exists only with a quantized output (QLinearConv).
    "onnxruntime": Backend("onnxruntime", _convolutions(quantize_output=True)),
    # OpenVINO computes activations and sums in float inside of the int8 convolution in front of them.
    "openvino": Backend(
        "openvino",
        _convolutions(quantize_output=False),
        fused_activations=_RECTIFIERS | _SMOOTH_ACTIVATIONS,
        fuses_sums=True,
    ),
    # oneDNN's kernels: layers that are modules; what is between them stays in float.
    "torch": _layers_only("torch"),
    # What papers on few bits do: inputs and weights of layers; sums, averages and gates stay as they are.
    "layers": _layers_only("layers"),
}
"""Placement by runtime. Files placed for ``onnxruntime`` run at full int8 speed in OpenVINO too, but OpenVINO leaves
out the rounding in front of a sum, so that there they equal their simulation less closely than those placed for it."""


def get_backend(backend: str | Backend) -> Backend:
    """Return the table of a runtime by name.

    Raises:
        ConfigError: There is no such table.
    """
    if isinstance(backend, Backend):
        return backend
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend {backend!r} is not known: {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    return BACKENDS[backend]
