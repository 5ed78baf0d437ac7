"""Replays a recording: on tensors, to have a reference for the proof, or into an fx graph, to have a new model.

In the *masked* world tensors keep their full size, and operators that combine the indices of a cut axis (norms,
softmax, means) run on the kept indices only: the mask is applied inside them. In the *small* world every tensor
has its cut size, and the sizes in reshapes and the like are recomputed from the axes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.counts import count_of
from dwindle.graph.expressions import FUNCTIONS, Attribute, Dimension, Expression, Operation, variables
from dwindle.graph.nodes import Node, Value
from dwindle.graph.rules.creation import CREATIONS
from dwindle.graph.rules.registry import expressions_for, recorded_value
from dwindle.graph.trace import Trace
from dwindle.realize.mask_inside import MaskInside, masks_inside

#: Arguments that hold sizes, by operator; every other integer is a dimension, a stride or the like.
_SIZE_ARGUMENTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "repeat", "tile", "broadcast_to"), (1,)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), (1,)),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), (0,)),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "repeat_interleave"), (1,)),
    **dict.fromkeys(("split", "split_with_sizes", "group_norm"), (1,)),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), (1,)),
    "unflatten": (2,),
    "slice": (2, 3),
    "narrow": (2, 3),
    "conv1d": (6,),
    "conv2d": (6,),
    "conv3d": (6,),
    "convolution": (8,),
    "conv_transpose1d": (6,),
    "conv_transpose2d": (6,),
    "conv_transpose3d": (6,),
    "arange": (0, 1),
}

Call = Callable[..., Any]


class Replay:
    """One pass over a recording.

    Args:
        analysis: The axes.
        trace: The recording to replay.
        keep: For each leaf that is cut, which indices stay.
        small: Small world (cut sizes) or masked world (full sizes).
        call: How to call a function: ``call(function, args, kwargs)``.
        device: Where tensors that the recording created are made.
    """

    def __init__(
        self,
        analysis: Analysis,
        trace: Trace,
        keep: dict[Axis, torch.Tensor],
        *,
        small: bool,
        call: Call,
        device: torch.device,
    ) -> None:
        self.analysis = analysis
        self.trace = trace
        self.keep = keep
        self.counts = {leaf: int(chosen.sum()) for leaf, chosen in keep.items()}
        self.small = small
        self.call = call
        self.device = device
        self.env: dict[int, Any] = {}
        self.inside = {} if small else masks_inside(analysis.scope.mixings, keep, analysis.memory)
        self.observed: dict[tuple[int, int], tuple[list[Axis], int]] = {}
        for observation in analysis.scope.observations:
            number = recorded_value(observation.expression)
            self.observed.setdefault(
                (id(observation.node), int(number)), (observation.axes, observation.sign)
            )

        self.nodes = trace.live_nodes(sizes=True)
        self.copied = _only_copied(self.nodes)

    def run(self, parameter: Callable[[str], Any], inputs: list[Any]) -> list[Any]:
        """Replay with the given parameters and inputs; returns the outputs whose shape must stay.

        Args:
            parameter: Returns the parameter or buffer of a name.
            inputs: One for each of the recording's inputs.
        """
        for name, value in self.trace.parameters.items():
            self.env[id(value)] = parameter(name)
        for value, given in zip(self.trace.inputs, inputs, strict=True):
            self.env[id(value)] = given
        done = self._done_after() if self.call is eager_call else {}
        for node in self.nodes:
            if id(node) in self.copied:
                self.env[id(node.output)] = self._value(node.args[0])
            else:
                self._node(node)
            for value in done.get(id(node), ()):
                self._release(value)
        return [self._value(value) for value in self.trace.outputs]

    def _done_after(self) -> dict[int, list[Value]]:
        """Return by node the values that no later one takes."""
        last: dict[int, tuple[Node, Value]] = {}
        for node in self.nodes:
            for value in [*node.inputs(), *node.outputs]:
                last[id(value)] = node, value
        wanted = set(map(id, self.trace.outputs))
        done: dict[int, list[Value]] = {}
        for node, value in last.values():
            if value.kind == "result" and id(value) not in wanted:
                done.setdefault(id(node), []).append(value)
        return done

    def _release(self, value: Value) -> None:
        """Let a tensor go; its shape can still be asked for."""
        held = self.env.get(id(value))
        if isinstance(held, torch.Tensor):
            self.env[id(value)] = torch.empty(held.shape, dtype=held.dtype, device="meta")

    def _value(self, value: Value) -> Any:
        if id(value) not in self.env and value.kind == "constant" and value.tensor is not None:
            constant = value.tensor
            self.env[id(value)] = (
                torch.empty_like(constant, device=self.device) if constant.is_meta else constant
            )
        return self.env[id(value)]

    def _node(self, node: Node) -> None:
        mask = self.inside.get(id(node))
        whole = mask.run(self._value) if mask is not None else None
        if whole is not None:
            self.env[id(node.output)] = whole
            return
        restricted = mask.counts if mask is not None else None
        places = _SIZE_ARGUMENTS.get(
            node.name.removesuffix("_") if node.name not in _SIZE_ARGUMENTS else node.name, ()
        )
        args = tuple(
            self._sizes(node, argument, restricted) if place in places else self._argument(argument, mask)
            for place, argument in enumerate(node.args)
        )
        kwargs = {key: self._argument(argument, mask) for key, argument in node.kwargs.items()}
        if node.name == "narrow" and len(args) > 3:
            # start and length may be the same number: they are told apart by their order
            args = (*args[:2], *self._sizes(node, [int(number) for number in node.args[2:4]], restricted))
        if node.name == "scaled_dot_product_attention" and node.argument("scale") is None:
            kwargs["scale"] = node.args[0].shape[-1] ** -0.5  # as recorded, whatever the width is now
        result = self.call(node.target, args, kwargs)
        if node.output_spec == "one":
            self.env[id(node.output)] = mask.spread(result, node.output) if mask is not None else result
        elif node.output_spec == "list":
            for number, output in enumerate(node.outputs):
                item = self.call(operator.getitem, (result, number), {})
                self.env[id(output)] = mask.spread(item, output) if mask is not None else item

    def _argument(self, argument: Any, mask: MaskInside | None) -> Any:
        if isinstance(argument, Value):
            tensor = self._value(argument)
            return mask.applied(tensor, argument) if mask is not None else tensor
        if isinstance(argument, list | tuple):
            return [self._argument(item, mask) for item in argument]
        return self.device if isinstance(argument, torch.device) else argument

    def _sizes(self, node: Node, argument: Any, restricted: dict[Axis, int] | None) -> Any:
        if isinstance(argument, list | tuple):
            expressions = expressions_for(node, argument)
            return [
                self._size(node, number, expression, self._sized_axis(node, place, len(argument)), restricted)
                if isinstance(number, int) and number != -1
                else number
                for place, (number, expression) in enumerate(zip(argument, expressions, strict=True))
            ]
        if isinstance(argument, int) and not isinstance(argument, bool):
            return self._size(node, argument, expressions_for(node, [argument])[0], None, restricted)
        return self._argument(argument, None)

    def _sized_axis(self, node: Node, place: int, length: int) -> Axis | None:
        """Axis that a size in a list argument belongs to."""
        if node.name in (*CREATIONS, "view", "reshape", "_unsafe_view", "expand", "broadcast_to"):
            return node.output.axes[len(node.output.axes) - length + place]
        if node.name == "narrow":
            return node.output.axes[int(node.args[1])] if place else None
        if node.name == "unflatten":
            return node.output.axes[int(node.args[1]) % len(node.args[0].shape) + place]
        if node.name in ("layer_norm", "native_layer_norm", "rms_norm"):
            return node.args[0].axes[len(node.args[0].axes) - length + place]
        if node.name == "split_with_sizes" or (node.name == "split" and length > 1):
            return node.outputs[place].axes[int(node.argument("dim", 0))]
        return None

    def _size(
        self,
        node: Node,
        number: int,
        expression: Expression,
        axis: Axis | None,
        restricted: dict[Axis, int] | None,
    ) -> Any:
        """A size as it is now; ``restricted`` counts the indices that a call with the mask inside it sees."""
        axes, sign = ([axis], 1) if axis is not None else self.observed.get((id(node), number), ([], 1))
        counts = self.counts if restricted is None else restricted
        cut = any(leaf in counts for own in axes for leaf in own.leaves())
        dimensions = [variable for variable in variables(expression) if isinstance(variable, Dimension)]
        readable = bool(dimensions) and all(id(variable.value) in self.env for variable in dimensions)
        if cut and (restricted or (self.small and not readable)):
            return sign * sum(count_of(own, counts) for own in axes)
        # a size that the code reads from tensors may have the batch inside: it is read again
        return self._emit(expression) if (readable if cut else dimensions) else number

    def _emit(self, expression: Expression) -> Any:
        if isinstance(expression, Operation):
            operands = tuple(self._emit(operand) for operand in expression.operands)
            if all(isinstance(operand, int | float) for operand in operands):
                return FUNCTIONS[expression.name](*operands)
            return self.call(FUNCTIONS[expression.name], operands, {})
        if isinstance(expression, Dimension):
            if id(expression.value) not in self.env:
                return expression.value.shape[expression.dim]
            return self.call(
                torch.ops.aten.sym_size.int, (self.env[id(expression.value)], expression.dim), {}
            )
        if isinstance(expression, Attribute):
            return (
                expression.number
                if not self.small
                else self.analysis.solver.value_of(self.counts)(expression)
            )
        return expression


def _only_copied(nodes: list[Node]) -> set[int]:
    """Calls of ``expand`` that only prepare a copy, as ``x[:2] = 0`` makes them: the copy broadcasts by itself."""
    users: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.inputs():
            users.setdefault(id(value), []).append(node)
    return {
        id(node)
        for node in nodes
        if node.name == "expand"
        and all(
            own.name == "copy_" and own.args[0] is not node.output
            for own in users.get(id(node.output), [node])
        )
    }


def eager_call(function: Any, args: Any, kwargs: Any) -> Any:
    """Call at once: the backend of :class:`Replay` on tensors."""
    return function(*args, **kwargs)
