"""How a teacher is asked: in evaluation mode, in inference mode, on the very inputs that the student saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.distillation.recording import CallRecorder, TargetRecorder, plain_copy
from dwindle.graph.modes import modes_kept

__all__ = ["Taught", "ask_teacher", "shares_tensors"]

Predict = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Taught:
    """What a teacher said to one batch.

    Attributes:
        logits: Of its output; None where nobody asked, or the output itself where it holds none.
        features: Every call's tensor of each linked module, by module and target.
    """

    logits: Any
    features: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)


def shares_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have a parameter or buffer in common."""
    own = {id(tensor) for tensor in (*first.parameters(), *first.buffers())}
    return any(id(tensor) in own for tensor in (*second.parameters(), *second.buffers()))


def ask_teacher(
    teacher: nn.Module,
    recorder: TargetRecorder,
    predict: Predict,
    logits: Callable[[Any], Any] | None,
    call: CallRecorder,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    inference: bool,
) -> Taught:
    """Run the teacher once, under the autocast setting that the student ran under, and leave it as it was.

    What comes back are normal tensors: they are copied out of inference mode, which the features needed anyhow
    (operators behind a module may change its output in place).

    Args:
        teacher: Put in evaluation mode for the time.
        recorder: Keeps the linked tensors.
        predict: ``predict(args, kwargs)`` runs the teacher and returns its output.
        logits: Finds the logits in the output; None when nobody asks for them.
        call: What the student was called with.
        inputs: Positional and keyword inputs, ``call``'s or a part of them.
        inference: Run under ``torch.inference_mode``; otherwise under ``torch.no_grad``, which a teacher needs that
            has tensors in common with the student.
    """
    handles = recorder.attach(teacher, only_with_gradients=False)
    try:
        with modes_kept(teacher), _without_gradients(inference), contextlib.ExitStack() as stack:
            teacher.eval()
            for device, dtype in call.autocast.items():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
            output = predict(*inputs)
        found = None if logits is None else logits(output)
        if isinstance(found, Tensor) and found.is_inference():
            found = plain_copy(found)
        return Taught(found, dict(recorder.values))
    finally:
        for handle in handles:
            handle.remove()
        recorder.clear()


@contextlib.contextmanager
def _without_gradients(inference: bool) -> Iterator[None]:
    with torch.inference_mode() if inference else torch.no_grad():
        yield
