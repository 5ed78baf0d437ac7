"""Captures a model with ``torch.export``, with a dynamic batch where the model allows it."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dwindle.config.errors import ExportError
from dwindle.graph.modes import in_mode
from dwindle.measure.macs import counting_kernels
from dwindle.measure.structure import (
    InputStructure,
    batched_inputs,
    flatten,
    output_names,
    with_batch,
)


class FlatModel(nn.Module):
    """A model with flat tensors in and a flat tuple of tensors out, as runtimes want it.

    Args:
        model: The model.
        structure: How the flat tensors become the model's arguments; its non-tensor arguments stay as in
            the example.
    """

    def __init__(self, model: nn.Module, structure: InputStructure) -> None:
        super().__init__()
        self.model = model
        self._structure = structure
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model on the flat tensors, in the order of ``structure.names``."""
        args, kwargs = self._structure.unflatten(tensors)
        return tuple(tensor for _, tensor in flatten(self.model(*args, **kwargs))[0])


@dataclass
class Capture:
    """A captured program with what is needed to run it by name.

    Attributes:
        program: Takes the flat tensors, gives a flat tuple.
        input_names: Names of the flat inputs.
        output_names: Names of the flat outputs.
        batched: Which inputs have the batch in dimension 0.
        dynamic_batch: Whether the batch may have any size.
        notes: What the user should know, such as why the batch is fixed.
    """

    program: ExportedProgram
    input_names: list[str]
    output_names: list[str]
    batched: list[bool]
    dynamic_batch: bool
    notes: list[str]


def capture(model: nn.Module, structure: InputStructure, *, dynamic_batch: bool | None = None) -> Capture:
    """Capture a model in evaluation mode, flat tensors in and out.

    Args:
        model: The model; it is left as it was.
        structure: Its example inputs.
        dynamic_batch: True: the batch must be dynamic. False: the batch of the example is fixed. None:
            dynamic if the model allows it, and otherwise fixed with a note that says why.

    Raises:
        ExportError: ``torch.export`` refuses the model.
    """
    with in_mode(model, training=False), torch.no_grad():
        names = output_names(model(*structure.args, **structure.kwargs))
    if not names:
        raise ExportError("the model's output holds no tensor, so there is nothing to export")
    flat = FlatModel(model, structure)

    def call(tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(tensors), {}

    with in_mode(model, training=False):
        program, is_dynamic, notes = _capture(
            flat, structure.example, call, dynamic_batch, shapes_inside="tensors"
        )
    return Capture(program, structure.names, names, batched_inputs(structure.example), is_dynamic, notes)


def capture_program(
    model: nn.Module, structure: InputStructure, dynamic_batch: bool | None = None
) -> tuple[ExportedProgram, bool, list[str]]:
    """Capture a model in evaluation mode with its own call signature.

    Args:
        model: The model; it is left as it was.
        structure: Its example inputs.
        dynamic_batch: See :func:`capture`.

    Returns:
        The program, whether its batch is dynamic, and notes.

    Raises:
        ExportError: ``torch.export`` refuses the model.
    """
    with in_mode(model, training=False):
        return _capture(model, structure.example, structure.unflatten, dynamic_batch, shapes_inside=None)


def _capture(
    module: nn.Module,
    example: Sequence[Tensor],
    call: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]],
    dynamic_batch: bool | None,
    shapes_inside: str | None,
) -> tuple[ExportedProgram, bool, list[str]]:
    """Try a dynamic batch, then a fixed one.

    The sample batch is doubled when it is 1, because a capture at batch 1 is good for no other size. A
    named dimension gives the file a readable name; ``Dim.DYNAMIC`` accepts relations between inputs that
    one name does not.
    """
    batched = batched_inputs(example)
    notes: list[str] = []
    if dynamic_batch is not False and any(batched):
        sample = with_batch(example, 2) if _is_single(example, batched) else list(example)
        refusal: Exception | None = None
        for dimension in (Dim("batch", min=1), Dim.DYNAMIC):
            marks = [{0: dimension} if is_batched else None for is_batched in batched]
            args, kwargs = call(_unmarked(sample))
            shapes: Any = {shapes_inside: tuple(marks)} if shapes_inside else _shapes(module, call(marks))
            try:
                with quiet(), torch.no_grad():
                    return (
                        torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False),
                        True,
                        notes,
                    )
            except Exception as error:  # torch.export raises a great many classes
                refusal = error
        notes.append(f"the batch is fixed, because torch.export refuses a dynamic one: {first_line(refusal)}")
        if dynamic_batch:
            raise ExportError(f"the model cannot be exported with a dynamic batch: {first_line(refusal)}")
    args, kwargs = call(_unmarked(example))
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, strict=False), False, notes
    except Exception as error:  # torch.export raises a great many classes
        raise ExportError(
            f"torch.export refuses the model: {first_line(error)}. Data-dependent Python code (an `if` on a "
            "tensor's value, boxes after non-maximum suppression) has no static graph; export the part before"
        ) from error


def _unmarked(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return fresh tensor objects: torch.export leaves its marks of dynamic dimensions on those it is
    given.
    """
    return [tensor.detach() for tensor in tensors]


def _shapes(module: nn.Module, marked: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Return ``dynamic_shapes`` by argument name; arguments without tensors have None."""
    bound = inspect.signature(module.forward).bind(*marked[0], **marked[1]).arguments
    return {name: _only_shapes(value) for name, value in bound.items()}


def _only_shapes(value: Any) -> Any:
    if isinstance(value, dict):
        if value and all(isinstance(key, int) for key in value):
            return value
        return {key: _only_shapes(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_only_shapes(child) for child in value)
    return None


def _is_single(example: Sequence[Tensor], batched: Sequence[bool]) -> bool:
    return any(
        is_batched and tensor.shape[0] == 1 for tensor, is_batched in zip(example, batched, strict=True)
    )


def first_line(error: Exception | None) -> str:
    """Return the class and the first line of an error: exporters put whole graphs into theirs."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what exporters print and warn about; errors still come as exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            counting_kernels(),  # the fused transformer encoder kernel has no counterpart in other runtimes
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def structure_of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> InputStructure:
    """Return the input structure of a call, with tensors detached from any gradient graph."""
    leaves, rebuild = flatten({"args": tuple(args), "kwargs": kwargs})
    call = rebuild([tensor.detach() for _, tensor in leaves])
    return InputStructure(model, call["args"], call["kwargs"])
