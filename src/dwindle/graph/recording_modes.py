"""The two modes that listen while a model runs: one to its functions and sizes, one to its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.graph.expressions import Dimension, Expression, Operation, TaggedFloat, TaggedInt
from dwindle.graph.nodes import Node, Value
from dwindle.graph.recording import Recording, where
from dwindle.graph.trace import Choice

_SHAPE, _SIZE = torch.Tensor.shape, torch.Tensor.size
_ELEMENTS = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
_TRUTH = torch.Tensor.__bool__
_NUMBERS = frozenset({torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__int__, torch.Tensor.__float__})


def _collect(argument: Any, sizes: list[Expression], floats: list[Expression]) -> None:
    """Gather the integers (as expressions) and the tagged floats of an argument, in order."""
    kind = type(argument)
    if kind is TaggedInt:
        sizes.append(argument.expression)
    elif kind is int:
        sizes.append(argument)
    elif kind is TaggedFloat:
        floats.append(argument.expression)
    elif kind in (tuple, list, torch.Size):
        for item in argument:
            _collect(item, sizes, floats)
    elif kind is slice:
        for item in (argument.start, argument.stop, argument.step):
            _collect(item, sizes, floats)


class SizeTagging(TorchFunctionMode):
    """Tags sizes that are read from tensors and notes the tagged numbers that reach an operator."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SIZE or getattr(func, "__self__", None) is _SHAPE:
            return self._sizes(func, args, kwargs)
        if func in _ELEMENTS:
            return self._elements(func, args, kwargs)
        if func is _TRUTH or func in _NUMBERS:
            return self._choice(func, args, kwargs)
        sizes: list[Expression] = []
        floats: list[Expression] = []
        for argument in args:
            _collect(argument, sizes, floats)
        for argument in kwargs.values():
            _collect(argument, sizes, floats)
        recording = self.recording
        before = recording.sizes, recording.floats
        recording.sizes, recording.floats = sizes, floats
        recording.makes_tensor = func in (torch.tensor, torch.as_tensor, torch.scalar_tensor)
        try:
            return func(*args, **kwargs)
        finally:
            recording.sizes, recording.floats = before
            recording.makes_tensor = False

    def _choice(self, func: Any, args: Any, kwargs: Any) -> Any:
        choices = self.recording.choices
        choices.append(Choice(where(), func is _TRUTH))
        result = func(*args, **kwargs)
        return not result if func is _TRUTH and len(choices) - 1 == self.recording.turned else result

    def _elements(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``tensor.numel()`` is the product of the sizes."""
        tensor = args[0] if args else kwargs["self"]
        value = self.recording.value_of(tensor)
        result = func(*args, **kwargs)
        dims = [Dimension(value, dim) for dim, size in enumerate(value.shape) if size > 1]
        if not dims:
            return result
        expression: Expression = dims[0]
        for other in dims[1:]:
            expression = Operation("mul", (expression, other))
        return TaggedInt(result, expression)

    def _sizes(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        value = self.recording.value_of(tensor)
        result = func(*args, **kwargs)
        if isinstance(result, int):
            dim = int(args[1] if len(args) > 1 else kwargs["dim"]) % max(len(value.shape), 1)
            return TaggedInt(result, Dimension(value, dim)) if result > 1 else result
        return torch.Size(
            [TaggedInt(size, Dimension(value, dim)) if size > 1 else size for dim, size in enumerate(result)]
        )


#: Operators whose result has the shape and dtype of the first argument. On the meta device torch works this out
#: in Python for some of them, which takes longer than everything else here together.
_LIKE_FIRST = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "relu", "gelu", "silu", "mish",
     "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu"}
)  # fmt: skip


def _recurrent(func: Any, args: Any) -> tuple[torch.Tensor, ...] | None:
    """Results of a recurrent layer on the meta device, which would otherwise be taken apart step by step."""
    states = [args[1]] if isinstance(args[1], torch.Tensor) else args[1]
    if func._overloadname != "input" or not isinstance(states, list | tuple) or args[0].dim() != 3:
        return None
    width = states[0].shape[-1] * (2 if args[7] else 1)
    output = args[0].new_empty(*(int(size) for size in args[0].shape[:-1]), int(width))
    return (output, *(torch.empty_like(state) for state in states))


def _shape_only(func: Any, args: Any, kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """Result on the meta device where it follows from the shapes of a few arguments; None otherwise."""
    if kwargs or not args or not isinstance(args[0], torch.Tensor) or not args[0].is_meta:
        return None
    name = func._schema.name[6:]
    if not args[0].is_floating_point() or func.namespace != "aten":
        return None
    if name in _LIKE_FIRST:
        return torch.empty_like(args[0])
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return _recurrent(func, args)
    return args[0] if name.endswith("_") and name[:-1] in _LIKE_FIRST else None


class OperatorRecorder(TorchDispatchMode):
    """Writes down every operator that reaches the dispatcher."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recording = self.recording
        own_args = tuple(self._record_argument(argument) for argument in args)
        own_kwargs = {key: self._record_argument(argument) for key, argument in kwargs.items()}
        result = _shape_only(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            tensors, spec = [result], "one"
        elif isinstance(result, tuple | list):
            tensors, spec = list(result), "list"
        else:
            tensors, spec = [], "none"
        node = Node(func, own_args, own_kwargs, [], spec, recording.modules[-1], where())
        node.sizes, node.floats = recording.sizes, recording.floats
        node.strides = args[0].stride() if node.name == "as_strided" else None
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                node.outputs.append(Value("result", "", (), torch.int64, producer=node))
                continue
            value = Value("result", "", tuple(tensor.shape), tensor.dtype, producer=node)
            node.outputs.append(value)
            recording.bind(tensor, value)
        recording.nodes.append(node)
        return result

    def _record_argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.recording.value_of(argument)
        if isinstance(argument, list | tuple):
            return [self._record_argument(item) for item in argument]
        return argument
