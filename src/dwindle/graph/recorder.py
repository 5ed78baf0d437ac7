"""Records one forward pass as a list of ATen operator calls, with the provenance of every size.

The model runs eagerly, under ``inference_mode``, where a dispatch mode sees composite operators (``linear``,
``conv2d``, ``scaled_dot_product_attention``) before they are taken apart. Integers are tagged in the same run
(:mod:`dwindle.graph.tagging`), so that sizes need no matching afterwards. Tensors stand on the ``meta`` device
where the model allows it, so that recording computes nothing and touches nothing of the user's; models whose
code looks at values are recorded with real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional
import torch.utils._pytree as pytree
from torch import nn

from dwindle.config.errors import CaptureError
from dwindle.graph import expressions
from dwindle.graph.function_caches import function_caches_kept
from dwindle.graph.modes import in_mode
from dwindle.graph.module_calls import recorded_calls
from dwindle.graph.nodes import Value
from dwindle.graph.opaque import opaque_modules, recorded_as_nodes, structure
from dwindle.graph.outputs import main_outputs
from dwindle.graph.recording import Recording
from dwindle.graph.recording_modes import OperatorRecorder, SizeTagging
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
from dwindle.graph.trace import Trace


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


@contextmanager
def _comparisons_noted(recording: Recording) -> Iterator[None]:
    """While inside, what code learns of tagged numbers is written down."""
    before = expressions.on_equal, expressions.on_unequal, expressions.on_plain
    expressions.on_equal = lambda left, right: recording.equalities.append((left, right))
    expressions.on_unequal = recording.must_differ
    expressions.on_plain = recording.lose
    try:
        yield
    finally:
        expressions.on_equal, expressions.on_unequal, expressions.on_plain = before


def _copied_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Running statistics, caches and the like are updated on copies, not on the user's."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _bound_inputs(recording: Recording, flat: list[Any]) -> list[Value]:
    """Return the values of the tensors among the inputs; one that is a parameter too gets an object of its own."""
    inputs = []
    for number, item in enumerate(flat):
        if isinstance(item, torch.Tensor):
            flat[number] = item = item.view_as(item) if id(item) in recording.known else item
            value = Value("input", f"input {number}", tuple(item.shape), item.dtype)
            inputs.append(value)
            recording.bind(item, value, keep=True)
    return inputs


def _bound_parameters(
    recording: Recording, listing: Iterable[tuple[torch.Tensor, str, str]]
) -> dict[str, Value]:
    parameters: dict[str, Value] = {}
    for tensor, kind, name in listing:
        parameters[name] = Value(kind, name, tuple(tensor.shape), tensor.dtype)
        recording.bind(tensor, parameters[name], keep=True)
    return parameters


def _record_once(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    training: bool,
    device: str,
    turned: int | None,
    emptied: list[tuple[str, str]],
) -> Trace:
    recording = Recording()
    recording.turned = turned
    on_meta = device == "meta"
    flat, input_spec = pytree.tree_flatten((args, kwargs))
    flat = [own_object(item) for item in flat]
    if on_meta:
        flat = [item.detach().to("meta") if isinstance(item, torch.Tensor) else item for item in flat]
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(function_caches_kept())
        enter(torch.random.fork_rng(devices=[]))
        enter(torch.inference_mode())
        enter(attributes_kept(model))
        empty_caches(model, emptied)
        opaque = opaque_modules(model, opaque_kinds())
        if opaque and on_meta:
            raise CaptureError("opaque modules run on real values")
        copies = {path: structure(module) for path, module in opaque.items()}
        parameters = _bound_parameters(
            recording, enter(stand_ins(model, to_meta if on_meta else _copied_buffer))
        )
        inputs = _bound_inputs(recording, flat)
        enter(in_mode(model, training=training))
        owners = enter(tagged_integers(model))
        enter(_transparent_functions())
        count = lambda: len(recording.nodes)  # noqa: E731
        enter(recorded_calls(model, recording.modules, recording.calls, count, recording.known_value))
        enter(_comparisons_noted(recording))
        if on_meta:
            enter(torch.device("meta"))
        enter(recorded_as_nodes(copies, model, training, recording.write_opaque))
        enter(OperatorRecorder(recording))
        enter(SizeTagging(recording))
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
    known_inputs = iter(inputs)
    return Trace(
        recording.nodes,
        parameters,
        inputs,
        [recording.value_of(tensor) for tensor in main_outputs(result)],
        input_spec,
        [next(known_inputs) if isinstance(item, torch.Tensor) else item for item in flat],
        output_spec,
        [recording.value_of(item) if isinstance(item, torch.Tensor) else item for item in flat_outputs],
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
