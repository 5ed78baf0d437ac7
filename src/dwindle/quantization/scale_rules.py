"""What each operator does to the scale of channels. See :mod:`dwindle.quantization.free_scales`.

Every value has a tensor of unit numbers of the same rank, with size 1 along dimensions on which they do not depend.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwindle.graph.homogeneity import MOVEMENTS, UNARY, base_name, compressed, moved
from dwindle.graph.nodes import Node, Value, values_in
from dwindle.quantization.scale_units import Units

FROZEN = torch.zeros((), dtype=torch.int64)
LARGEST_ELEMENTS = 1 << 16
"""A parameter that is added or multiplied element by element is followed only up to this size."""


class NotFollowedError(Exception):
    """An operator is used in a way that no rule covers."""


@dataclass
class Role:
    """What a parameter does: ``makes`` channels, ``read``s them, or scales and shifts by ``elements``."""

    name: str
    kind: str
    units: Tensor


class Following:
    """Follows units through a recording, call by call.

    Args:
        units: The units.
        passed_over: Paths of batch normalizations that do nothing.
    """

    def __init__(self, units: Units, passed_over: Container[str] = ()) -> None:
        self.units, self.passed_over = units, passed_over
        self.values: dict[int, Tensor] = {}
        self.roles: dict[tuple[str, bool], Role] = {}
        self.channels: dict[str, Tensor] = {}
        self.frozen: set[str] = set()

    # -- values and parameters

    def get(self, value: Value) -> Tensor:
        """Return the units of a value, of its rank. A parameter read as data is one that cannot be scaled."""
        if value.kind == "parameter":
            self.freeze_parameter(value.name)
        known = self.values.get(id(value))
        return torch.zeros([1] * len(value.shape), dtype=torch.int64) if known is None else known

    def freeze_value(self, value: Value) -> None:
        """Note that the scale of a value would be noticed."""
        self.units.unite(self.get(value), FROZEN)

    def freeze_parameter(self, name: str) -> None:
        """Note that a parameter must stay as it is."""
        self.frozen.add(name)

    def roles_of(self, name: str) -> list[Role]:
        """Return what a parameter does."""
        return [role for (own, _), role in self.roles.items() if own == name]

    def make(self, parameter: Value, shape: list[int], kind: str = "makes") -> Tensor:
        """Return the units that a parameter makes, new at its first use.

        Args:
            parameter: The parameter; anything else makes nothing that could be scaled.
            shape: Shape of the units, broadcastable to the parameter.
            kind: ``"makes"`` or ``"elements"``.
        """
        if parameter.kind != "parameter":
            self.freeze_value(parameter)
            return torch.zeros(shape, dtype=torch.int64)
        key = (parameter.name, False)
        role = self.roles.get(key)
        if role is None:
            count = int(torch.Size(shape).numel())
            role = self.roles[key] = Role(parameter.name, kind, self.units.new(count).reshape(shape))
        elif list(role.units.shape) != shape or role.kind != kind:
            self.freeze_parameter(parameter.name)
            return torch.zeros(shape, dtype=torch.int64)
        return role.units

    def read(self, weight: Value, units: Tensor, channels: Tensor) -> None:
        """Note that a weight reads channels.

        Args:
            weight: The weight.
            units: The unit that each of its elements reads, broadcastable to it.
            channels: The unit of each channel of the input.
        """
        if weight.kind != "parameter":
            self.units.unite(units, FROZEN)
            return
        role = self.roles.setdefault((weight.name, True), Role(weight.name, "read", units))
        self.units.unite(role.units, units)
        self.channels[weight.name] = channels

    def uniform(self, units: Tensor, dims: list[int]) -> Tensor:
        """Return units of size 1 along some dimensions; what depends on those dimensions is frozen."""
        for dim in dims:
            if units.shape[dim] > 1:
                self.units.unite(units, FROZEN)
                units = units.narrow(dim, 0, 1)
        return units

    # -- calls

    def node(self, node: Node) -> None:
        """Follow one call; what no rule covers is frozen."""
        try:
            results = self._results(node)
        except Exception:
            # a call that a rule does not fit may do anything with its inputs
            for value in node.inputs():
                self.freeze_value(value)
            results = [torch.zeros([1] * len(value.shape), dtype=torch.int64) for value in node.outputs]
        for value, units in zip(node.outputs, results, strict=True):
            if value.is_floating:
                self.values[id(value)] = units

    def _results(self, node: Node) -> list[Tensor]:
        name = base_name(node)
        if name == "batch_norm" and node.module in self.passed_over:
            return [self.get(next(node.inputs()))]
        if name in MOVEMENTS:
            return self._moved(node)
        if name in UNARY:
            return [self.get(next(node.inputs())) for _ in node.outputs]
        rule = RULES.get(name)
        if rule is None:
            raise NotFollowedError(name)
        results = rule(self, node)
        for value, units in zip(node.outputs, results, strict=True):
            if units.dim() != len(value.shape) or any(
                own not in (1, size) for own, size in zip(units.shape, value.shape, strict=True)
            ):
                raise NotFollowedError(name)
        return results

    def _moved(self, node: Node) -> list[Tensor]:
        data = next(node.inputs())
        units = self.get(data)
        if units.numel() == 1:
            return [units.reshape([1] * len(value.shape)) for value in node.outputs]
        return [compressed(own) for own in moved(node, units.expand(data.shape).contiguous())]


Rule = Callable[[Following, Node], list[Tensor]]
RULES: dict[str, Rule] = {}
"""The rules by operator. A rule returns the units of each result."""


def scale_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def decorate(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return decorate


def ranked(units: Tensor, rank: int) -> Tensor:
    """Return units with leading dimensions of size 1 up to a rank."""
    return units.reshape([1] * (rank - units.dim()) + list(units.shape))


def _operand(following: Following, value: Value) -> Tensor:
    """Units of an operand of a sum or product; a small parameter is scaled element by element."""
    size = int(torch.Size(value.shape).numel())
    if value.kind == "parameter" and value.is_floating and size <= LARGEST_ELEMENTS:
        return following.make(value, list(value.shape), "elements")
    return following.get(value)


@scale_rule("add", "sub", "subtract", "maximum", "minimum", "where")
def _added(following: Following, node: Node) -> list[Tensor]:
    rank = len(node.output.shape)
    numbers = [item for item in node.args[:2] if isinstance(item, int | float)]
    values = [v for argument in node.args for v in values_in(argument) if v.dtype is not torch.bool]
    every = [ranked(_operand(following, value), rank) for value in values]
    result = every[0]
    for units in every[1:]:
        following.units.unite(result, units)
        result = torch.broadcast_tensors(result, units)[0]
    if any(numbers) or (base_name(node) == "where" and len(values) < 2):
        following.units.unite(result, FROZEN)
    return [compressed(result)]


@scale_rule("mul", "multiply", "div", "divide", "true_divide")
def _multiplied(following: Following, node: Node) -> list[Tensor]:
    if node.argument("rounding_mode") is not None:
        raise NotFollowedError
    values = list(node.inputs())
    rank = len(node.output.shape)
    product = base_name(node) in ("mul", "multiply")
    if not product and not isinstance(node.args[0], Value):
        raise NotFollowedError
    if len(values) == 1:
        return [ranked(following.get(values[0]), rank)]
    every = [ranked(_operand(following, value), rank) for value in values]
    # One operand carries its scale on; the other keeps its own: a parameter's is the best to choose.
    order = sorted(
        range(2), key=lambda i: (values[i].kind != "parameter", following.units.frozen(every[i]), i)
    )
    carries = order[0] if product else 0
    following.units.unite(every[1 - carries], FROZEN)
    return [every[carries]]


@scale_rule("cat", "concat", "concatenate", "stack")
def _joined(following: Following, node: Node) -> list[Tensor]:
    values = list(node.inputs())
    join = torch.stack if base_name(node) == "stack" else torch.cat
    full = [following.get(value).expand(value.shape) for value in values]
    return [compressed(join(full, int(node.argument("dim", 0))))]


def _dims(node: Node, rank: int) -> list[int]:
    given = node.argument("dim")
    if given is None or given == []:
        return list(range(rank))
    return [int(dim) % rank for dim in (given if isinstance(given, list | tuple) else [given])]


@scale_rule("sum", "mean", "amax", "amin")
def _reduced(following: Following, node: Node) -> list[Tensor]:
    units = following.get(next(node.inputs()))
    dims = _dims(node, units.dim())
    units = following.uniform(units, dims)
    if not node.argument("keepdim", False):
        units = units.reshape([size for dim, size in enumerate(units.shape) if dim not in dims])
    return [units]


@scale_rule(
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3))
)
def _pooled(following: Following, node: Node) -> list[Tensor]:
    units = following.get(next(node.inputs()))
    rank = int(base_name(node)[-2])
    return [following.uniform(units, list(range(-rank, 0))) for _ in node.outputs]


@scale_rule("upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d", "upsample_bicubic2d")
def _resized(following: Following, node: Node) -> list[Tensor]:
    units = following.get(next(node.inputs()))
    return [following.uniform(units, list(range(-(units.dim() - 2), 0)))]


@scale_rule("pad", "constant_pad_nd")
def _padded(following: Following, node: Node) -> list[Tensor]:
    if node.argument("value"):
        raise NotFollowedError
    units = following.get(next(node.inputs()))
    dims = len(node.args[1]) // 2
    return [following.uniform(units, list(range(-dims, 0)))]


def _bias(following: Following, bias: Any, made: Tensor) -> None:
    """A bias has the units of its channels."""
    if not isinstance(bias, Value):
        return
    if bias.kind != "parameter" or bias.shape != (made.numel(),):
        following.units.unite(made, FROZEN)
        following.freeze_value(bias)
        return
    own = following.make(bias, list(bias.shape))
    following.units.unite(own, made.reshape(-1))


@scale_rule("linear")
def _linear(following: Following, node: Node) -> list[Tensor]:
    data, weight = node.args[0], node.argument("weight")
    columns = _last(following, data)
    following.read(weight, columns.reshape(1, -1), columns)
    made = following.make(weight, [weight.shape[0], 1]).reshape(-1)
    _bias(following, node.argument("bias"), made)
    return [ranked(made, len(node.output.shape))]


@scale_rule("addmm")
def _added_product(following: Following, node: Node) -> list[Tensor]:
    bias, data, weight = list(node.inputs())[:3]
    if node.argument("beta", 1) != 1 or weight.kind != "parameter":
        raise NotFollowedError
    columns = _last(following, data)
    following.read(weight, columns.reshape(-1, 1), columns)
    made = following.make(weight, [1, weight.shape[1]]).reshape(-1)
    _bias(following, bias, made)
    return [ranked(made, 2)]


def _last(following: Following, data: Value) -> Tensor:
    """Units along the last dimension, one for each index."""
    units = following.get(data)
    units = following.uniform(units, list(range(units.dim() - 1)))
    return units.reshape(-1).expand(data.shape[-1])


@scale_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(following: Following, node: Node) -> list[Tensor]:
    data, weight = node.args[0], node.argument("weight")
    transposed = "transpose" in node.name
    spatial = len(weight.shape) - 2
    units = following.get(data)
    dim = units.dim() - spatial - 1
    units = following.uniform(units, [own for own in range(units.dim()) if own != dim])
    groups = int(node.argument("groups", 1))
    columns = units.reshape(-1).expand(data.shape[dim])
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    tail = [1] * spatial
    if transposed:
        following.read(weight, columns.reshape(-1, 1, *tail), columns)
        if groups != 1:
            following.get(weight)  # one element makes another channel in each group: not scaled
            made = torch.zeros(outputs, dtype=torch.int64)
        else:
            made = following.make(weight, [1, outputs, *tail]).reshape(-1)
    else:
        grouped = columns.reshape(groups, 1, weight.shape[1]).expand(
            groups, outputs // groups, weight.shape[1]
        )
        following.read(weight, grouped.reshape(outputs, weight.shape[1], *tail), columns)
        made = following.make(weight, [outputs, 1, *tail]).reshape(-1)
    _bias(following, node.argument("bias"), made)
    return [made.reshape([1] * dim + [-1] + tail)]


@scale_rule("embedding")
def _embedding(following: Following, node: Node) -> list[Tensor]:
    weight = node.args[0]
    made = following.make(weight, [1, weight.shape[1]])
    return [ranked(made[0], len(node.output.shape))]


@scale_rule("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
def _normalized(following: Following, node: Node) -> list[Tensor]:
    following.freeze_value(next(node.inputs()))
    weight, bias = node.argument("weight"), node.argument("bias")
    rank = len(node.output.shape)
    if not isinstance(weight, Value) or weight.kind != "parameter":
        if isinstance(bias, Value):
            following.get(bias)
        return [torch.zeros([1] * rank, dtype=torch.int64)]
    made = following.make(weight, list(weight.shape), "elements")
    if isinstance(bias, Value):
        following.units.unite(made, _operand(following, bias))
    if base_name(node) in ("layer_norm", "rms_norm"):
        return [ranked(made, rank)]
    return [made.reshape([1, -1] + [1] * (rank - 2))]


@scale_rule("scaled_dot_product_attention")
def _attention(following: Following, node: Node) -> list[Tensor]:
    values = list(node.inputs())
    for value in [*values[:2], *values[3:]]:
        following.freeze_value(value)
    units = following.uniform(following.get(values[2]), [-2])
    heads, wanted = units.shape[-3], values[0].shape[-3]
    if heads > 1 and heads != wanted:
        units = units.repeat_interleave(wanted // heads, -3)
    return [ranked(units, len(node.output.shape))]


@scale_rule("matmul", "bmm", "mm")
def _product(following: Following, node: Node) -> list[Tensor]:
    first, second = (following.get(value) for value in list(node.inputs())[:2])
    rank = len(node.output.shape)
    if first.dim() < 2 or second.dim() < 2:
        raise NotFollowedError
    if following.units.frozen(first):
        return [ranked(following.uniform(second, [-2]), rank)]
    if following.units.frozen(second):
        return [ranked(following.uniform(first, [-1]), rank)]
    raise NotFollowedError
