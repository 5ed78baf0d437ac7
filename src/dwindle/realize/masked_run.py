"""Runs the user's own masked model with the mask applied inside the operators that combine a cut axis.

Like the masked world of :mod:`dwindle.realize.replay`, but nothing is replayed: the model's own code runs, so that it
may choose by values (which experts get which tokens) and take any batch size. The axes of every tensor follow from
those of the parameters by the same rules, one call after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.config.errors import RealizeError
from dwindle.graph import axes as algebra
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import LEAF, UNIT, Axis
from dwindle.graph.nodes import Node, Value
from dwindle.graph.propagate import apply_rule
from dwindle.graph.rules.registry import Scope, recorded_value
from dwindle.realize.mask_inside import masks_inside
from dwindle.realize.replay import Replay, eager_call
from dwindle.realize.surgery import tensor_slots


def cloned(axis: Axis, memory: dict[Axis, Axis]) -> Axis:
    """Return a copy of an axis and all below it: rules that run on it leave the original alone."""
    axis = axis.find()
    if axis is UNIT:
        return UNIT
    if axis not in memory:
        memory[axis] = copy.copy(axis)
        memory[axis].parts = tuple(cloned(part, memory) for part in axis.parts)
        memory[axis].before = tuple(cloned(piece, memory) for piece in axis.before)
        memory[axis].selector = cloned(axis.selector, memory) if axis.selector is not None else None
    return memory[axis]


class _OneCall(Replay):
    """The masked world for one call."""

    def __init__(
        self, node: Node, scope: Scope, keep: dict[Axis, torch.Tensor], device: torch.device
    ) -> None:
        self.analysis: Any = SimpleNamespace(memory={})
        self.keep = keep
        self.counts = {leaf: int(chosen.sum()) for leaf, chosen in keep.items()}
        self.small = False
        self.call = eager_call
        self.device = device
        self.env = {}
        self.inside = masks_inside(scope.mixings, keep)
        self.observed = {}
        for observation in scope.observations:
            number = int(recorded_value(observation.expression))
            self.observed.setdefault((id(node), number), (observation.axes, observation.sign))


class MaskedRun(TorchDispatchMode):
    """Applies the mask inside operators while a masked model runs.

    Args:
        analysis: The axes.
        keep: For each leaf that is cut, which indices stay.
        masked: The model, whose parameters the axes belong to.
    """

    def __init__(self, analysis: Analysis, keep: Mapping[Axis, torch.Tensor], masked: nn.Module) -> None:
        super().__init__()
        memory: dict[Axis, Axis] = {}
        self.known: dict[int, Value] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.keep = {cloned(leaf, memory): chosen for leaf, chosen in keep.items()}
        for name, holders in tensor_slots(masked).items():
            axes = analysis.parameter_axes.get(name)
            for module, key in holders:
                tensor = getattr(module, key)
                if axes is not None and isinstance(tensor, torch.Tensor):
                    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                    self._bind(
                        tensor,
                        Value(
                            kind, name, tuple(tensor.shape), tensor.dtype, [cloned(a, memory) for a in axes]
                        ),
                    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tuple(self._given(item) for item in args)
        node = Node(func, given, {key: self._given(item) for key, item in kwargs.items()}, [], "none", "", "")
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            node.output_spec, tensors = "one", [result]
        elif isinstance(result, tuple | list):
            node.output_spec, tensors = "list", list(result)
        else:
            return result
        node.outputs = [
            Value("result", "", tuple(item.shape), item.dtype, producer=node)
            if isinstance(item, torch.Tensor)
            else Value("result", "", (), torch.int64, producer=node)
            for item in tensors
        ]
        scope = Scope()
        apply_rule(node, scope)
        going_in = (leaf for value in node.inputs() for axis in value.axes for leaf in axis.leaves())
        if scope.unknown and any(leaf in self.keep for leaf in going_in):
            raise RealizeError(f"{node.name} is not followed, and an axis that is cut goes into it")
        self.keep = {leaf.find(): chosen for leaf, chosen in self.keep.items()}
        if any(leaf.kind != LEAF for leaf in self.keep):
            raise RealizeError(f"{node.name} cuts an axis in a way that no recording did")
        mixed = (leaf for mixing in scope.mixings for axis in mixing.axes for leaf in axis.leaves())
        empty = any(0 in value.shape for value in node.inputs())  # an expert that gets no token
        if not empty and any(leaf in self.keep for leaf in mixed):
            tensors = self._masked(node, scope, tensors)
            result = tensors[0] if node.output_spec == "one" else type(result)(tensors)
        for item, value in zip(tensors, node.outputs, strict=True):
            if isinstance(item, torch.Tensor):
                self._bind(item, value)
        return result

    def _masked(self, node: Node, scope: Scope, tensors: list[Any]) -> list[Any]:
        """Results of the call on the kept indices only, at full size with zeros elsewhere."""
        if node.target._schema.is_mutable:
            raise RealizeError(f"{node.name} combines a cut axis in place")
        device = next(
            (item.device for item in tensors if isinstance(item, torch.Tensor)), torch.device("cpu")
        )
        call = _OneCall(node, scope, self.keep, device)
        for value in node.inputs():
            call.env[id(value)] = self.tensors[id(value)]
        call._node(node)
        return [call.env[id(value)] for value in node.outputs]

    def _bind(self, tensor: torch.Tensor, value: Value) -> None:
        self.known[id(tensor)] = value
        self.tensors[id(value)] = tensor  # kept alive, so that no other tensor gets its identity

    def _given(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            if id(argument) not in self.known:
                axes = [algebra.leaf(size, "given from outside") for size in argument.shape]
                self._bind(argument, Value("constant", "", tuple(argument.shape), argument.dtype, axes))
            return self.known[id(argument)]
        if isinstance(argument, list | tuple):
            return [self._given(item) for item in argument]
        return argument
