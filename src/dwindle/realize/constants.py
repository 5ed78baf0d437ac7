"""What masked channels still emit: a constant-propagation over a recording, one number a channel.

For each tensor it finds, along the axes that could be cut, the value that an index has for *every* input: zero, a
constant (a bias, the shift of a norm, through activations), or none (NaN: it varies). An index may go when every
operator that sums over it gets zero there, has a zero weight there, or can take the constant into its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.opaque import OpaqueTarget
from dwindle.graph.positions import positions
from dwindle.graph.trace import Node, Value
from dwindle.realize import constants_weights

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_NAN = float("nan")

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
#: Sums of differences: an index goes only when both sides are zero there, parameters too.
_COMPARISONS = frozenset({"cdist", "pairwise_distance", "cosine_similarity"})
_AVERAGE_POOLS = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})


@dataclass(slots=True)
class Constants:
    """The result of the propagation.

    Attributes:
        values: For each value of the recording, a float64 tensor of its rank: full size along dimensions with an
            axis that could be cut, 1 elsewhere; NaN where it varies.
        removable: For each leaf, which indices may go.
        sums: What positions of each convolution's or linear layer's input add to its outputs.
        padded: Modules whose zero padding keeps them from taking a constant into their bias.
    """

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    removable: dict[Axis, torch.Tensor] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Sum:
    """One call that sums over an axis against a weight: ``contribution[o, p]`` is what position p adds to output o."""

    module: str
    axis: Axis
    contribution: torch.Tensor


class ConstantPropagation:
    """Runs over the evaluation recording of an analysis.

    Args:
        analysis: The axes.
        tensors: Effective (masked) parameters and buffers by name.
        foldable: Whether the module of a path can take a constant into its bias.
    """

    def __init__(
        self, analysis: Analysis, tensors: Mapping[str, torch.Tensor], foldable: Callable[[str], bool]
    ) -> None:
        self.analysis = analysis
        self.tensors = tensors
        self.foldable = foldable
        self.free = {info.axis for info in analysis.axes if info.axis.frozen is None and info.size > 1}
        self.result = Constants()
        self.uses: dict[str, int] = {}

    def run(self) -> Constants:
        """Propagate, then decide which indices may go."""
        nodes = self.analysis.trace.live_nodes()
        for leaf in self.free:
            self.result.removable[leaf] = torch.ones(leaf.size, dtype=torch.bool)
        for name, value in self.analysis.trace.parameters.items():
            self.result.values[id(value)] = self._compressed(self.tensors[name], value)
        for node in nodes:
            for value in node.inputs():
                if value.kind == "parameter":
                    self.uses[value.name] = self.uses.get(value.name, 0) + 1
        mixed: dict[int, list[Axis]] = {}
        for mixing in self.analysis.scope.mixings:
            mixed.setdefault(id(mixing.node), []).extend(mixing.axes)
        with torch.no_grad():
            for node in nodes:
                self._node(node, mixed.get(id(node), []))
        return self.result

    def _cuttable(self, axis: Axis) -> bool:
        return any(leaf in self.free for leaf in axis.leaves())

    def _shape(self, value: Value) -> list[int]:
        return [axis.size if self._cuttable(axis) else 1 for axis in value.axes]

    def _unknown(self, value: Value) -> torch.Tensor:
        return torch.full(self._shape(value), _NAN, dtype=torch.float64)

    def _compressed(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Reduce a parameter to one number along the axes that could be cut; NaN where it is not one number."""
        if not tensor.is_floating_point() or not value.axes:
            return self._unknown(value)
        dims = [dim for dim, axis in enumerate(value.axes) if not self._cuttable(axis) and axis.size > 1]
        data = tensor.detach().double().cpu()
        if not dims:
            return data
        high, low = data.amax(dims, keepdim=True), data.amin(dims, keepdim=True)
        return torch.where(high == low, high, torch.full_like(high, _NAN))

    def get(self, value: Value) -> torch.Tensor:
        """Constants of a value."""
        found = self.result.values.get(id(value))
        return found if found is not None else self._unknown(value)

    # operators

    def _node(self, node: Node, mixed: list[Axis]) -> None:
        name = node.name.removesuffix("_")
        if name in ("linear", "addmm") or name in _CONVOLUTIONS:
            self._sum(node, name)
            return
        if mixed:
            self._require_zeros(node, mixed)
        for value in node.outputs:
            self.result.values[id(value)] = self._unknown(value)
        if name in constants_weights.CONTRACTIONS or isinstance(node.target, OpaqueTarget):
            self._weights(node, name)
        if isinstance(node.target, OpaqueTarget):
            return
        if name in constants_weights.RECURRENT | constants_weights.TRANSPOSED:
            return
        if not node.outputs or not node.output.is_floating:
            return
        try:
            constants = self._transfer(node, name)
        except Exception:
            constants = None
        if constants is None:
            if any(self._cuttable(axis) for value in node.inputs() for axis in value.axes):
                self._vanish(node, mixed)
            return
        for value, own in zip(node.outputs, constants, strict=False):
            if list(own.shape) == self._shape(value):
                self.result.values[id(value)] = own

    def _vanish(self, node: Node, mixed: list[Axis]) -> None:
        """After a norm with the mask inside, a removed index is zero."""
        leaves = {leaf for axis in mixed for leaf in axis.leaves()}
        for value in node.outputs[:1]:
            dims = [
                dim for dim, axis in enumerate(value.axes) if any(leaf in leaves for leaf in axis.leaves())
            ]
            if node.name in ("layer_norm", "native_layer_norm", "rms_norm", "group_norm") and dims:
                data = self.get(next(node.inputs()))
                own = torch.where(data == 0, data, torch.full_like(data, _NAN))
                parameters = list(node.inputs())[1:]
                for parameter in parameters[-1:]:
                    shift = self.get(parameter)
                    if parameter.axes and shift.dim() == 1 and node.name != "rms_norm":
                        place = [1] * own.dim()
                        place[1 if "group" in node.name else -1] = shift.numel()
                        own = torch.where(shift.view(place) == 0, own, torch.full_like(own, _NAN))
                if list(own.shape) == self._shape(value):
                    self.result.values[id(value)] = own

    def _transfer(self, node: Node, name: str) -> list[torch.Tensor] | None:
        """Constants of the results; None where the operator is not followed."""
        inputs = list(node.inputs())
        if name in _SAME_EVERYWHERE:
            return [self._reshaped(self.get(inputs[0]), self._shape(node.output))]
        if name in _AVERAGE_POOLS:
            data = self.get(inputs[0])
            padding = node.argument("padding", [0])
            if any(padding) and node.argument("count_include_pad", True):
                data = torch.where(data == 0, data, torch.full_like(data, _NAN))
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
            result = torch.where(varying.expand(result.shape), torch.full_like(result, _NAN), result)
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
        mean, variance = channel("running_mean", _NAN), channel("running_var", _NAN)
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
        elements = sum(_elements(value.shape) for value in inputs)
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

    # sums

    def _require_zeros(self, node: Node, mixed: list[Axis]) -> None:
        """Indices that are combined without a weight must be zero to go."""
        leaves = {leaf for axis in mixed for leaf in axis.leaves() if leaf in self.free}
        for value in node.inputs():
            plain = value.kind in ("parameter", "buffer") and node.name not in _COMPARISONS
            if not value.is_floating or plain:
                continue
            zero = self.get(value) == 0
            for dim, axis in enumerate(value.axes):
                if any(leaf in leaves for leaf in axis.leaves()):
                    others = [d for d in range(zero.dim()) if d != dim]
                    self._restrict(axis, zero.amin(others) if others else zero)

    def _weights(self, node: Node, name: str) -> None:
        """Sums against weights that nothing can be folded into, and the constants behind them."""
        weight = constants_weights.weights_from(self.tensors)
        for leaf, allowed in constants_weights.summed_away(node, self.free, weight, self.get).items():
            self.result.removable[leaf] &= allowed
        shape = self._shape(node.output)
        if name in constants_weights.TRANSPOSED:
            channel = len(shape) - len(node.args[1].shape) + 1
            own = constants_weights.transposed_outputs(node, weight)
            if own is not None and shape[channel] == own.numel():
                place = [-1 if dim == channel else 1 for dim in range(len(shape))]
                self.result.values[id(node.output)] = own.view(place).expand(shape)
        elif name in constants_weights.RECURRENT:
            for leaf, (zero, allowed) in constants_weights.recurrent_zeros(node, weight, self.get).items():
                if leaf not in self.free:
                    continue
                self.result.removable[leaf] &= allowed
                for value in node.outputs:
                    index = positions(value.axes[-1], self.analysis.memory).get(leaf)
                    if index is not None:
                        own = torch.where(zero, 0.0, _NAN).double()[index]
                        self.result.values[id(value)] = own.expand(self._shape(value))

    def _restrict(self, axis: Axis, allowed: torch.Tensor) -> None:
        """Only indices all of whose positions are allowed may go."""
        for leaf, index in positions(axis, self.analysis.memory).items():
            if leaf in self.free:
                bad = index[~allowed.to(torch.bool)]
                self.result.removable[leaf][bad[bad >= 0]] = False

    def _sum(self, node: Node, name: str) -> None:
        inputs = list(node.inputs())
        data_value, weight_value = (inputs[1], inputs[2]) if name == "addmm" else (inputs[0], inputs[1])
        for value in node.outputs:
            self.result.values[id(value)] = self._unknown(value)
        groups = int(node.argument("groups", 1) or 1) if name in _CONVOLUTIONS else 1
        channel = len(data_value.axes) - len(weight_value.axes) + 1 if name in _CONVOLUTIONS else -1
        axis = data_value.axes[channel]
        data = self.get(data_value)
        others = [dim for dim in range(data.dim()) if dim != channel % data.dim()]
        constants = data
        if others:
            high, low = data.amax(others), data.amin(others)
            constants = torch.where(high == low, high, torch.full_like(high, _NAN))
        constants = constants.expand(axis.size)
        weight = self.tensors.get(weight_value.name) if weight_value.kind == "parameter" else None
        if weight is None or (groups > 1 and weight.shape[1] != 1) or name == "addmm":
            unread = (weight == 0).all(1).cpu() if weight is not None and name == "addmm" else False
            self._restrict(axis, (constants == 0) | unread)
            if weight is not None and name == "addmm":
                self._addmm(node, inputs, weight, constants, axis)
            elif weight is not None:
                self._emit(node, weight, constants, name, grouped=groups)
            return
        weight = weight.detach().double().cpu()
        padded = name in _CONVOLUTIONS and _is_padded(node)
        self._emit(node, weight, constants, name, grouped=groups)
        if groups > 1:
            return  # depthwise: the same axis goes on
        per_input = weight.movedim(1, 0).flatten(1)
        dead = (per_input == 0).all(1)
        module = weight_value.name.rpartition(".")[0]
        allowed = dead | (constants == 0)
        if not padded and self.uses.get(weight_value.name) == 1 and self.foldable(module):
            foldable = constants.isfinite() & ~allowed
            allowed = allowed | foldable
            taken = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            share = taken * torch.where(foldable, constants, torch.zeros_like(constants))
            self.result.sums.append(Sum(module, axis, share))
        if padded and bool((constants.isfinite() & (constants != 0) & ~dead).any()):
            self.result.padded.append(module)
        self._restrict(axis, allowed)

    def _addmm(
        self, node: Node, inputs: list[Value], weight: torch.Tensor, constants: torch.Tensor, axis: Axis
    ) -> None:
        weight = weight.detach().double().cpu()
        bias = self.tensors.get(inputs[0].name)
        live = torch.where(weight == 0, torch.zeros_like(weight), weight * constants[:, None])
        out = live.sum(0) + (bias.detach().double().cpu() if bias is not None else 0)
        shape = self._shape(node.output)
        if shape[-1] == out.numel():
            self.result.values[id(node.output)] = out.view([1] * (len(shape) - 1) + [-1]).expand(shape)

    def _emit(
        self, node: Node, weight: torch.Tensor, constants: torch.Tensor, name: str, grouped: int
    ) -> None:
        """Constants of the outputs of a linear layer or convolution."""
        weight = weight.detach().double().cpu()
        kernel = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        if grouped > 1 and weight.shape[1] == 1 and weight.shape[0] % grouped == 0:
            inputs = constants.repeat_interleave(weight.shape[0] // grouped)[:, None]
        elif grouped > 1:
            inputs = torch.full((weight.shape[0], weight.shape[1]), _NAN, dtype=torch.float64)
        else:
            inputs = constants[None, :]
        if name in _CONVOLUTIONS and _is_padded(node):
            inputs = torch.where(inputs == 0, inputs, torch.full_like(inputs, _NAN))
        live = (kernel != 0).any(2)
        products = torch.where(live, kernel.sum(2) * inputs, torch.zeros_like(kernel[:, :, 0]))
        out = products.sum(1)
        bias = node.argument("bias")
        if isinstance(bias, Value) and bias.name in self.tensors:
            out = out + self.tensors[bias.name].detach().double().cpu()
        elif isinstance(bias, Value):
            out = torch.full_like(out, _NAN)
        shape = self._shape(node.output)
        place = len(node.output.axes) - len(weight.shape) + 1 if name in _CONVOLUTIONS else len(shape) - 1
        if shape[place] == out.numel():
            view = [1] * len(shape)
            view[place] = -1
            self.result.values[id(node.output)] = out.view(view).expand(shape).clone()


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


def _is_padded(node: Node) -> bool:
    padding = node.argument("padding", [0])
    return padding == "same" if isinstance(padding, str) else any(int(p) for p in padding or [0])


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
