"""The mask applied inside an operator: what the reference of the proof does where plain zeros are not enough.

It is made to believe as little of the axis analysis as it can, because what both sides of a proof believe is not
proven. A sum (of products) runs at full size, with zeros at the removed indices: operands whose indices do not
correspond cannot line up by chance, as they would if each was cut. Where indices must be left out (a norm, a mean, a
softmax), only the combined axes are cut; which positions these are is said by the data alone, and scales, shifts and
results follow it by their place in the operator, not by what the rules say of their axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.positions import Positions, kept_positions
from dwindle.graph.rules.registry import Mixing, normalize_dims

#: Everything behind the data lies along its last dimensions.
_ALIGNED_AT_THE_END = frozenset(
    {
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "_weight_norm",
        "_weight_norm_interface",
    }
)
#: Everything behind the data is one number a channel.
_ALIGNED_WITH_CHANNELS = frozenset(
    {"group_norm", "native_group_norm", "batch_norm", "native_batch_norm", "_native_batch_norm_legit",
     "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_with_update", "instance_norm"}
)  # fmt: skip


def spread(small: torch.Tensor, dim: int, index: torch.Tensor, size: int) -> torch.Tensor:
    """Return a tensor of ``size`` along ``dim`` with ``small`` at ``index`` and zeros elsewhere."""
    shape = list(small.shape)
    shape[dim] = size
    return small.new_zeros(shape).index_copy(dim, index.to(small.device), small)


def masked_group_norm(
    data: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    stay: torch.Tensor,
) -> torch.Tensor:
    """Group norm at full size: statistics of each group over the channels that stay, zeros at the others.

    Cutting the channels first would only be the same if every group lost equally many, which is to be shown.

    Args:
        data: (N, C, ...).
        groups: Number of groups of the original.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
        stay: Which channels stay, a boolean tensor.
    """
    place = [1, -1] + [1] * (data.dim() - 2)
    held = stay.to(data.device).view(place)
    shape = (data.shape[0], groups, -1)
    present = held.expand(data.shape).reshape(shape).to(data.dtype)
    grouped = torch.where(held, data, torch.zeros_like(data)).reshape(shape)
    number = present.sum(-1, keepdim=True).clamp_min(1)
    centred = (grouped - grouped.sum(-1, keepdim=True) / number) * present
    result = centred * (centred.square().sum(-1, keepdim=True) / number + eps).rsqrt()
    result = result.reshape(data.shape)
    if weight is not None:
        result = result * weight.view(place)
    if bias is not None:
        result = result + bias.view(place)
    return torch.where(held, result, torch.zeros_like(result))


@dataclass(slots=True)
class MaskInside:
    """The mask inside one call.

    Attributes:
        node: The call.
        left_out: Leaves whose removed indices the call must not see, with what stays of them.
        zeroed: Leaves whose removed indices the call must see as zeros.
        memory: Positions that were worked out before.
        counts: How many indices of the leaves that are left out the call sees.
    """

    node: Node
    left_out: dict[Axis, torch.Tensor] = field(default_factory=dict)
    zeroed: dict[Axis, torch.Tensor] = field(default_factory=dict)
    memory: dict[Axis, Positions] | None = None
    counts: dict[Axis, int] = field(default_factory=dict)

    def run(self, get: Callable[[Value], torch.Tensor]) -> torch.Tensor | None:
        """Run the call as a whole where cutting its arguments would presume too much; None: cut and spread.

        Args:
            get: Returns the tensor of a value.
        """
        if self.node.name != "group_norm" or not self.left_out:
            return None
        data = self.node.args[0]
        index = kept_positions(data.axes[1], self.left_out, self.memory)
        if index is None:
            return None
        stay = torch.zeros(data.shape[1], dtype=torch.bool)
        stay[index] = True
        weight, bias = (
            get(value) if isinstance(value, Value) else None
            for value in (self.node.argument("weight"), self.node.argument("bias"))
        )
        eps, groups = float(self.node.argument("eps")), int(self.node.argument("num_groups"))
        return masked_group_norm(get(data), groups, weight, bias, eps, stay)

    def applied(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Return an argument of the call as the call should see it."""
        for dim, axis in enumerate(value.axes):
            stay = kept_positions(axis, self.zeroed, self.memory) if self.zeroed else None
            if stay is not None:
                gone = torch.ones(axis.size, dtype=torch.bool)
                gone[stay] = False
                tensor = tensor.index_fill(dim, gone.nonzero().flatten().to(tensor.device), 0)
        for dim in range(len(value.axes)):
            index = self._index(value, dim)
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    def spread(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Return a result of the call at full size, with zeros where indices were left out."""
        if not self.left_out:
            return tensor
        for dim, size in enumerate(value.shape):
            index = self._kept(self._source(value, dim), value.axes[dim])
            if index is not None and size > 1:
                tensor = spread(tensor, dim, index, size)
        return tensor

    def _index(self, value: Value, dim: int) -> torch.Tensor | None:
        """Positions that the call sees along one dimension of an argument; None for all."""
        data = next(self.node.inputs())
        if value is data or not self.left_out:
            return self._kept(data.axes[dim] if value is data else None, value.axes[dim])
        place = dim - len(value.shape) + len(data.shape) if self.node.name in _ALIGNED_AT_THE_END else None
        if self.node.name in _ALIGNED_WITH_CHANNELS and len(value.shape) == 1:
            place = 1
        if place is None:
            return self._kept(None, value.axes[dim])
        return self._kept(data.axes[place], None) if value.shape[dim] == data.shape[place] else None

    def _source(self, value: Value, dim: int) -> Axis | None:
        """The axis of the data that a dimension of a result is, by its place; None where that is not known."""
        data = next(self.node.inputs())
        if len(value.shape) == len(data.shape):
            return data.axes[dim] if value.shape[dim] == data.shape[dim] else None
        reduced = self.node.argument("dim")
        if reduced is not None and len(value.shape) < len(data.shape):
            gone = set(normalize_dims(reduced, len(data.shape)))
            places = [place for place in range(len(data.shape)) if place not in gone]
            if len(places) == len(value.shape):
                return data.axes[places[dim]]
        return None

    def _kept(self, source: Axis | None, otherwise: Axis | None) -> torch.Tensor | None:
        axis = source if source is not None else otherwise
        return kept_positions(axis, self.left_out, self.memory) if axis is not None else None


def masks_inside(
    mixings: Iterable[Mixing],
    keep: Mapping[Axis, torch.Tensor],
    memory: dict[Axis, Positions] | None = None,
) -> dict[int, MaskInside]:
    """Return the mask inside every call that combines indices of a cut axis, by the identity of its node.

    Args:
        mixings: What the rules said of such calls.
        keep: For each leaf that is cut, which indices stay.
        memory: Positions that were worked out before.
    """
    masks: dict[int, MaskInside] = {}
    for mixing in mixings:
        for leaf in {leaf for axis in mixing.axes for leaf in axis.leaves() if leaf in keep}:
            own = masks.setdefault(id(mixing.node), MaskInside(mixing.node, memory=memory))
            (own.zeroed if mixing.exact_on_zeros else own.left_out)[leaf] = keep[leaf]
    for own in masks.values():
        own.zeroed = {leaf: chosen for leaf, chosen in own.zeroed.items() if leaf not in own.left_out}
        own.counts = {leaf: int(chosen.sum()) for leaf, chosen in own.left_out.items()}
    return masks
