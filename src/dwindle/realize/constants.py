"""What masked channels still emit: a constant-propagation over a recording, one number a channel.

For each tensor it finds, along the axes that could be cut, the value that an index has for *every* input: zero, a
constant (a bias, the shift of a norm, through activations), or none (NaN: it varies). An index may go when every
operator that sums over it gets zero there, has a zero weight there, or can take the constant into its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.opaque import OpaqueTarget
from dwindle.graph.positions import positions
from dwindle.realize import constants_weights
from dwindle.realize.constant_values import NAN, ConstantValues

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")

#: Sums of differences: an index goes only when both sides are zero there, parameters too.
_COMPARISONS = frozenset({"cdist", "pairwise_distance", "cosine_similarity"})


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


class ConstantPropagation(ConstantValues):
    """Runs over the evaluation recording of an analysis.

    Args:
        analysis: The axes.
        tensors: Effective (masked) parameters and buffers by name.
        foldable: Whether the module of a path can take a constant into its bias.
    """

    def __init__(
        self, analysis: Analysis, tensors: Mapping[str, torch.Tensor], foldable: Callable[[str], bool]
    ) -> None:
        super().__init__(analysis, tensors)
        self.foldable = foldable
        self.result = Constants(self.values)
        self.uses: dict[str, int] = {}

    def run(self) -> Constants:
        """Propagate, then decide which indices may go."""
        nodes = self.analysis.trace.live_nodes()
        for leaf in self.free:
            self.result.removable[leaf] = torch.ones(leaf.size, dtype=torch.bool)
        for name, value in self.analysis.trace.parameters.items():
            self.values[id(value)] = self._compressed(self.tensors[name], value)
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

    # operators

    def _node(self, node: Node, mixed: list[Axis]) -> None:
        name = node.name.removesuffix("_")
        if name in ("linear", "addmm") or name in _CONVOLUTIONS:
            self._sum(node, name)
            return
        if mixed:
            self._require_zeros(node, mixed)
        for value in node.outputs:
            self.values[id(value)] = self._unknown(value)
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
                self.values[id(value)] = own

    def _vanish(self, node: Node, mixed: list[Axis]) -> None:
        """After a norm with the mask inside, a removed index is zero."""
        leaves = {leaf for axis in mixed for leaf in axis.leaves()}
        for value in node.outputs[:1]:
            dims = [
                dim for dim, axis in enumerate(value.axes) if any(leaf in leaves for leaf in axis.leaves())
            ]
            if node.name in ("layer_norm", "native_layer_norm", "rms_norm", "group_norm") and dims:
                data = self.get(next(node.inputs()))
                own = torch.where(data == 0, data, torch.full_like(data, NAN))
                parameters = list(node.inputs())[1:]
                for parameter in parameters[-1:]:
                    shift = self.get(parameter)
                    if parameter.axes and shift.dim() == 1 and node.name != "rms_norm":
                        place = [1] * own.dim()
                        place[1 if "group" in node.name else -1] = shift.numel()
                        own = torch.where(shift.view(place) == 0, own, torch.full_like(own, NAN))
                if list(own.shape) == self._shape(value):
                    self.values[id(value)] = own

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
                self.values[id(node.output)] = own.view(place).expand(shape)
        elif name in constants_weights.RECURRENT:
            for leaf, (zero, allowed) in constants_weights.recurrent_zeros(node, weight, self.get).items():
                if leaf not in self.free:
                    continue
                self.result.removable[leaf] &= allowed
                for value in node.outputs:
                    index = positions(value.axes[-1], self.analysis.memory).get(leaf)
                    if index is not None:
                        own = torch.where(zero, 0.0, NAN).double()[index]
                        self.values[id(value)] = own.expand(self._shape(value))

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
            self.values[id(value)] = self._unknown(value)
        groups = int(node.argument("groups", 1) or 1) if name in _CONVOLUTIONS else 1
        channel = len(data_value.axes) - len(weight_value.axes) + 1 if name in _CONVOLUTIONS else -1
        axis = data_value.axes[channel]
        data = self.get(data_value)
        others = [dim for dim in range(data.dim()) if dim != channel % data.dim()]
        constants = data
        if others:
            high, low = data.amax(others), data.amin(others)
            constants = torch.where(high == low, high, torch.full_like(high, NAN))
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
            self.values[id(node.output)] = out.view([1] * (len(shape) - 1) + [-1]).expand(shape)

    def _emit(
        self, node: Node, weight: torch.Tensor, constants: torch.Tensor, name: str, grouped: int
    ) -> None:
        """Constants of the outputs of a linear layer or convolution."""
        weight = weight.detach().double().cpu()
        kernel = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        if grouped > 1 and weight.shape[1] == 1 and weight.shape[0] % grouped == 0:
            inputs = constants.repeat_interleave(weight.shape[0] // grouped)[:, None]
        elif grouped > 1:
            inputs = torch.full((weight.shape[0], weight.shape[1]), NAN, dtype=torch.float64)
        else:
            inputs = constants[None, :]
        if name in _CONVOLUTIONS and _is_padded(node):
            inputs = torch.where(inputs == 0, inputs, torch.full_like(inputs, NAN))
        live = (kernel != 0).any(2)
        products = torch.where(live, kernel.sum(2) * inputs, torch.zeros_like(kernel[:, :, 0]))
        out = products.sum(1)
        bias = node.argument("bias")
        if isinstance(bias, Value) and bias.name in self.tensors:
            out = out + self.tensors[bias.name].detach().double().cpu()
        elif isinstance(bias, Value):
            out = torch.full_like(out, NAN)
        shape = self._shape(node.output)
        place = len(node.output.axes) - len(weight.shape) + 1 if name in _CONVOLUTIONS else len(shape) - 1
        if shape[place] == out.numel():
            view = [1] * len(shape)
            view[place] = -1
            self.values[id(node.output)] = out.view(view).expand(shape).clone()


def _is_padded(node: Node) -> bool:
    padding = node.argument("padding", [0])
    return padding == "same" if isinstance(padding, str) else any(int(p) for p in padding or [0])
