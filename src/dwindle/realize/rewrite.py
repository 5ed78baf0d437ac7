"""The fallback where the user's code holds sizes that cannot be corrected: a rewritten graph.

The recording is emitted as an fx graph of ATen calls with recomputed sizes and a dynamic batch. Both the
evaluation and the training recording are emitted over the same parameters, which keep the user's own names, so the
result is an ordinary module that can be trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from dwindle.config.errors import RealizeError
from dwindle.graph.analysis import Analysis
from dwindle.graph.axes import Axis
from dwindle.graph.nodes import Value
from dwindle.graph.opaque import OpaqueTarget
from dwindle.graph.trace import Trace
from dwindle.realize.replay import Replay
from dwindle.realize.surgery import _held, tensor_slots


class RewrittenModel(nn.Module):
    """A model whose forward is a recorded graph, one for evaluation and one for training.

    Args:
        source: The module that holds the (already cut) parameters; they are shared, under the same names.
        evaluation: Forward in evaluation mode: a function of this module and the flat tensor inputs.
        training: Forward in training mode; None when it was not recorded.
        evaluation_trace: Where the structure of inputs and outputs comes from.
        training_trace: Likewise.
        constants: Tensors that the recordings made from numbers.
    """

    def __init__(
        self,
        source: nn.Module,
        evaluation: Callable[..., Any],
        training: Callable[..., Any] | None,
        evaluation_trace: Trace,
        training_trace: Trace | None,
        constants: dict[str, torch.Tensor],
    ) -> None:
        super().__init__()
        for name, holders in tensor_slots(source).items():
            for module, key in holders:
                self._adopt(source, name, module, key)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self._forwards = (evaluation, training)
        self._traces = (_Structure(evaluation_trace), _Structure(training_trace) if training_trace else None)
        self.train(source.training)

    def _adopt(self, source: nn.Module, name: str, module: nn.Module, key: str) -> None:
        tensor = _held(module, key)
        *path, last = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(last, tensor)
        elif last not in place._buffers:
            persistent = key in module._buffers and key not in module._non_persistent_buffers_set
            place.register_buffer(last, tensor, persistent=persistent)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        number = 1 if self.training and self._forwards[1] is not None else 0
        structure, function = self._traces[number], self._forwards[number]
        assert structure is not None
        assert function is not None
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != structure.input_spec:
            raise TypeError(f"this model was rewritten for inputs of the structure {structure.input_spec}")
        return structure.outputs(function(self, *(item for item in flat if isinstance(item, torch.Tensor))))


class _Structure:
    """How inputs and outputs nest."""

    def __init__(self, trace: Trace) -> None:
        self.input_spec = trace.input_spec
        self.output_spec = trace.output_spec
        self.flat = [None if isinstance(item, Value) else item for item in trace.flat_outputs]
        self.places = [place for place, item in enumerate(trace.flat_outputs) if isinstance(item, Value)]

    def outputs(self, tensors: Any) -> Any:
        flat = list(self.flat)
        for place, tensor in zip(self.places, tensors, strict=True):
            flat[place] = tensor
        return pytree.tree_unflatten(flat, self.output_spec)


def rewrite(source: nn.Module, analysis: Analysis, keep: dict[Axis, torch.Tensor]) -> RewrittenModel:
    """Emit the recordings of an analysis as a module over the cut parameters of ``source``.

    Args:
        source: The module, already cut.
        analysis: The axes.
        keep: What was cut.

    Raises:
        RealizeError: The recording cannot be emitted.
    """
    constants: dict[str, torch.Tensor] = {}
    functions = []
    traces = [analysis.trace, *(trace for trace in analysis.traces[1:2] if trace.training)]
    for trace in traces:
        try:
            functions.append(_emit(analysis, trace, keep, constants, source))
        except Exception as error:
            raise RealizeError(f"the recorded graph cannot be rewritten: {error}") from error
    training = functions[1] if len(functions) > 1 else None
    return RewrittenModel(
        source, functions[0], training, traces[0], traces[1] if training is not None else None, constants
    )


def _emit(
    analysis: Analysis,
    trace: Trace,
    keep: dict[Axis, torch.Tensor],
    constants: dict[str, torch.Tensor],
    source: nn.Module,
) -> Callable[..., Any]:
    """Return a function ``f(module, *tensors) -> tuple of output tensors``."""
    device = next(source.parameters()).device
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{number}") for number in range(len(trace.inputs))]

    def call(function: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(function, OpaqueTarget):
            function = function.on(source)
            function.module.train(trace.training)
        return graph.call_function(function, tuple(args), dict(kwargs))

    replay = _GraphReplay(analysis, trace, keep, small=True, call=call, device=device)
    replay.graph, replay.constants = graph, constants
    replay.run(graph.get_attr, list(inputs))
    outputs = [replay.env[id(item)] for item in trace.flat_outputs if isinstance(item, Value)]
    graph.output(tuple(outputs))
    graph.eliminate_dead_code(lambda node: _impure(node))
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<rewritten by dwindle>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _impure(node: fx.Node) -> bool:
    """Keep placeholders, outputs and calls that change a tensor in place."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


class _GraphReplay(Replay):
    """A replay that emits graph nodes; constants become buffers."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]

    def _value(self, value: Value) -> Any:
        if id(value) not in self.env and value.kind == "constant" and value.tensor is not None:
            name = f"_constant_{len(self.constants)}"
            tensor = value.tensor
            self.constants[name] = (
                torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor.clone()
            )
            self.env[id(value)] = self.graph.get_attr(name)
        return super()._value(value)
