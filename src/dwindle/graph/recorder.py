"""Records one forward pass as a list of ATen operator calls, with the provenance of every size.

The model runs eagerly, under ``inference_mode``, where a dispatch mode sees composite operators (``linear``,
``conv2d``, ``scaled_dot_product_attention``) before they are taken apart. Integers are tagged in the same run
(:mod:`dwindle.graph.tagging`), so that sizes need no matching afterwards. Tensors stand on the ``meta`` device
where the model allows it, so that recording computes nothing and touches nothing of the user's; models whose
code looks at values are recorded with real ones.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional
import torch.utils._pytree as pytree
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.config.errors import CaptureError
from dwindle.graph import expressions
from dwindle.graph.expressions import Dimension, Expression, Operation, TaggedFloat, TaggedInt
from dwindle.graph.function_caches import function_caches_kept
from dwindle.graph.module_calls import ModuleCall, recorded_calls
from dwindle.graph.opaque import OpaqueTarget, opaque_modules, recorded_as_nodes, structure
from dwindle.graph.rules.registry import opaque_kinds
from dwindle.graph.stand_ins import (
    assigned_tensors,
    attributes_kept,
    empty_caches,
    own_object,
    stand_ins,
    tensor_dictionaries,
    to_meta,
)
from dwindle.graph.tagging import tagged_integers
from dwindle.graph.trace import Choice, Node, Trace, Value

_LIBRARY_FOLDERS = (torch.__path__[0] + os.sep, __file__.rsplit("graph", 1)[0])
_SHAPE, _SIZE = torch.Tensor.shape, torch.Tensor.size
_ELEMENTS = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
_TRUTH = torch.Tensor.__bool__
_NUMBERS = frozenset({torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__int__, torch.Tensor.__float__})


class _Recording:
    """State shared by the two modes while a model runs."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[int, Value] = {}
        self.keep_alive: list[torch.Tensor] = []
        self.equalities: list[tuple[Expression, Expression]] = []
        self.sizes: list[Expression] | None = None
        self.floats: list[Expression] | None = None
        self.modules: list[str] = [""]
        self.calls: list[ModuleCall] = []
        self.plain: list[tuple[str, Expression]] = []
        self.makes_tensor = False
        self.choices: list[Choice] = []
        self.turned: int | None = None
        self.lost_numbers = False

    def lose(self, expression: Expression) -> None:
        """Note that a tagged number became a plain float; the operators that make tensors tell of theirs."""
        if not self.makes_tensor:
            self.plain.append((_where(), expression))

    def known_value(self, tensor: torch.Tensor) -> Value | None:
        """Return the value that stands for ``tensor`` now; None for a tensor from nowhere."""
        value = self.known.get(id(tensor))
        return tensor.__dict__.get("_dwindle_value") if value is None else value

    def value_of(self, tensor: torch.Tensor) -> Value:
        """Return the value that stands for ``tensor`` now; a tensor from nowhere becomes a constant."""
        value = self.known_value(tensor)
        if value is None:
            value = Value("constant", "", tuple(int(s) for s in tensor.size()), tensor.dtype, tensor=tensor)
            self.bind(tensor, value, keep=True)
            self.lost_numbers |= tensor.is_meta and tensor.numel() > 0
        return value

    def must_differ(self, left: Expression, right: Expression) -> None:
        """Note that two sizes were compared and found unequal: code that asks does something else otherwise."""
        self.equalities.append((Operation("differs", (left, right)), True))

    def write_opaque(
        self,
        target: OpaqueTarget,
        inputs: list[Any],
        tensors: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        """Write down a call of an opaque module."""
        given = [self.value_of(item) if isinstance(item, torch.Tensor) else item for item in inputs]
        own = [self.value_of(tensor) for tensor in tensors]
        spec = "one" if len(results) == 1 else "list"
        node = Node(target, (given, own), {}, [], spec, target.path, _where())
        for tensor in results:
            node.outputs.append(Value("result", "", tuple(tensor.shape), tensor.dtype, producer=node))
            self.bind(tensor, node.outputs[-1])
        self.nodes.append(node)

    def bind(self, tensor: torch.Tensor, value: Value, keep: bool = False) -> None:
        """State that ``tensor`` now holds ``value``."""
        if keep or id(tensor) in self.known:
            self.known[id(tensor)] = value
            self.keep_alive.append(tensor)
        else:
            tensor.__dict__["_dwindle_value"] = value


def _where() -> str:
    """Source line of the innermost frame outside torch and dwindle."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


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


class _Tagging(TorchFunctionMode):
    """Tags sizes that are read from tensors and notes the tagged numbers that reach an operator."""

    def __init__(self, recording: _Recording) -> None:
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
        choices.append(Choice(_where(), func is _TRUTH))
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


class _Recorder(TorchDispatchMode):
    """Writes down every operator that reaches the dispatcher."""

    def __init__(self, recording: _Recording) -> None:
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
        node = Node(func, own_args, own_kwargs, [], spec, recording.modules[-1], _where())
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


@contextmanager
def _transparent_functions() -> Iterator[None]:
    """Let the tagging mode see the operators inside torch's Python functions rather than the function itself."""
    never: Callable[..., bool] = lambda *_: False  # noqa: E731
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    places = [torch.nn.functional, torch.functional, torch._tensor]
    saved = [
        (place, name, getattr(place, name)) for place in places for name in names if hasattr(place, name)
    ]
    for place, name, _ in saved:
        setattr(place, name, never)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    vars(torch.nn.functional)["float"] = expressions.KeepingFloat
    try:
        yield
    finally:
        del vars(torch.nn.functional)["float"]
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for place, name, original in saved:
            setattr(place, name, original)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers and dataclasses. Other objects (caches) are not entered."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, list | tuple | set):
        for item in tree:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for entry in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, entry.name))


#: Ends of the names under which models return, beside their result, what they computed on the way.
_BESIDE = ("hidden_states", "attentions", "past_key_values", "cache_params", "encoder_last_hidden_state")


def main_outputs(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output whose shape must stay.

    Where the output is a mapping with logits or predictions, only those (and losses) count: hidden states and
    caches beside them may shrink with the model. Of another mapping everything counts but hidden states,
    attention weights and caches, unless it holds nothing else.
    """
    if isinstance(result, Mapping):
        names = [str(key) for key in result]
        if any("logits" in name or "pred" in name for name in names):
            chosen = [name for name in names if "logits" in name or "pred" in name or name == "loss"]
        else:
            chosen = [name for name in names if not name.endswith(_BESIDE)] or names
        found = list(tensors_in([held for key, held in result.items() if str(key) in chosen]))
        if found:
            return found
    return list(tensors_in(pytree.tree_leaves(result)))


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    device: str | None = None,
    turned: int | None = None,
) -> Trace:
    """Run ``model`` once and return what it did.

    The model is left as it was: mode, parameters, buffers, hooks and random state.

    Args:
        model: Any module.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        training: Record in training mode (branches that exist only there); evaluation mode otherwise.
        device: ``"meta"`` to record without computing, ``"real"`` to run on the real values; None tries ``meta``
            first.
        turned: Number of a choice by value (see :attr:`Trace.choices`) that goes the other way.

    Raises:
        CaptureError: The model itself fails on the inputs.
    """
    devices = [device] if device is not None else ["meta", "real"]
    # what was computed from parameters and kept is not followed: it is computed again, where the model can do that
    emptied = [tensor_dictionaries(model), []] if tensor_dictionaries(model) else [[]]
    failure: Exception | None = None
    for caches in emptied:
        for attempt in devices:
            try:
                return _record_once(model, tuple(args), dict(kwargs or {}), training, attempt, turned, caches)
            except Exception as error:
                failure = error
    raise CaptureError(
        f"{type(model).__name__} could not be run on the example inputs in "
        f"{'training' if training else 'evaluation'} mode: {type(failure).__name__}: {failure}"
    ) from failure


def _restore_modes(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode


def _record_once(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    training: bool,
    device: str,
    turned: int | None,
    emptied: list[tuple[str, str]],
) -> Trace:
    recording = _Recording()
    recording.turned = turned
    modes = {module: module.training for module in model.modules()}
    if device == "meta":
        replace: Callable[[torch.Tensor], torch.Tensor] = to_meta
    else:
        # running statistics, caches and the like are updated on copies, not on the user's
        replace = lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()  # noqa: E731
    flat, input_spec = pytree.tree_flatten((args, kwargs))
    flat = [own_object(item) for item in flat]
    if device == "meta":
        flat = [item.detach().to("meta") if isinstance(item, torch.Tensor) else item for item in flat]
    with ExitStack() as stack:
        stack.enter_context(function_caches_kept())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(attributes_kept(model))
        empty_caches(model, emptied)
        opaque = opaque_modules(model, opaque_kinds())
        if opaque and device == "meta":
            raise CaptureError("opaque modules run on real values")
        copies = {path: structure(module) for path, module in opaque.items()}
        listing = stack.enter_context(stand_ins(model, replace))
        parameters: dict[str, Value] = {}
        for tensor, kind, name in listing:
            parameters[name] = Value(kind, name, tuple(tensor.shape), tensor.dtype)
            recording.bind(tensor, parameters[name], keep=True)
        inputs = []
        for number, item in enumerate(flat):
            if isinstance(item, torch.Tensor):
                flat[number] = item = item.view_as(item) if id(item) in recording.known else item
                value = Value("input", f"input {number}", tuple(item.shape), item.dtype)
                inputs.append(value)
                recording.bind(item, value, keep=True)
        for module in model.modules():
            module.training = training
        stack.callback(_restore_modes, modes)
        owners = stack.enter_context(tagged_integers(model))
        stack.enter_context(_transparent_functions())
        stack.enter_context(
            recorded_calls(
                model, recording.modules, recording.calls, lambda: len(recording.nodes), recording.known_value
            )
        )
        previous = expressions.on_equal
        expressions.on_equal = lambda left, right: recording.equalities.append((left, right))
        stack.callback(lambda: setattr(expressions, "on_equal", previous))
        unequal = expressions.on_unequal
        expressions.on_unequal = recording.must_differ
        stack.callback(lambda: setattr(expressions, "on_unequal", unequal))
        outer = expressions.on_plain
        expressions.on_plain = recording.lose
        stack.callback(lambda: setattr(expressions, "on_plain", outer))
        if device == "meta":
            stack.enter_context(torch.device("meta"))
        stack.enter_context(recorded_as_nodes(copies, model, training, recording.write_opaque))
        stack.enter_context(_Recorder(recording))
        stack.enter_context(_Tagging(recording))
        run_args, run_kwargs = pytree.tree_unflatten(flat, input_spec)
        result = model(*run_args, **run_kwargs)
        assigned = {
            name: held
            for name, tensor in assigned_tensors(model)
            if name in parameters
            and (held := recording.known_value(tensor)) is not None
            and held is not parameters[name]
        }
    if recording.lost_numbers:
        raise CaptureError("the model makes tensors from numbers, which the meta device cannot hold")
    flat_outputs, output_spec = pytree.tree_flatten(result)
    outputs = [recording.value_of(tensor) for tensor in main_outputs(result)]
    flat_values = [recording.value_of(o) if isinstance(o, torch.Tensor) else o for o in flat_outputs]
    known_inputs = iter(inputs)
    flat_inputs = [next(known_inputs) if isinstance(item, torch.Tensor) else item for item in flat]
    return Trace(
        recording.nodes,
        parameters,
        inputs,
        outputs,
        input_spec,
        flat_inputs,
        output_spec,
        flat_values,
        recording.equalities,
        training,
        device,
        owners,
        recording.calls,
        recording.plain,
        assigned,
        recording.choices,
        caches=emptied,
    )
