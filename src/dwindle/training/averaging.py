"""Gradients of parameters that no data parallel wrapper takes care of, averaged over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from dwindle.simulate import RESERVED
from dwindle.training.processes import is_distributed, mean_over_processes, share_from_first

__all__ = ["GradientAveraging", "average_gradients", "hide_from_data_parallel", "show_to_data_parallel"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class GradientAveraging:
    """Averages gradients over processes at the end of each backward pass, before anyone clips or uses them.

    ``DistributedDataParallel`` knows the parameters that a model had when it was wrapped, and ``fully_shard`` those
    that are the model's own. Scores, learned scales, gates and projections are averaged here, whatever the model is
    wrapped in. A mean of what is the same everywhere is that, so accumulated gradients may be averaged after every
    batch, and a wrapper that averages them too does no harm.

    Every process must follow the same parameters in the same order, and use at least one of them in each backward pass.
    """

    def __init__(self) -> None:
        self._followed: dict[int, nn.Parameter] = {}
        self._handles: dict[int, Any] = {}
        self._task: int | None = None

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of these parameters from now on, and of no others.

        New ones take the value that they have in the first process. With one process nothing happens.
        """
        if not is_distributed():
            return
        wanted = {id(own): own for own in parameters if own.requires_grad}
        for gone in self._followed.keys() - wanted.keys():
            self._handles.pop(gone).remove()
        fresh = [own for key, own in wanted.items() if key not in self._followed]
        share_from_first([own.data for own in fresh])
        for own in fresh:
            self._handles[id(own)] = own.register_post_accumulate_grad_hook(self._wait)
        self._followed = wanted

    def stop(self) -> None:
        """Average nothing more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._followed.clear()

    def _wait(self, parameter: Tensor) -> None:
        """A gradient is there: ask to be called when all are."""
        task = (
            torch._C._current_graph_task_id()
        )  # one that failed calls nobody, so each backward pass asks anew
        if task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self._wait_again)  # type: ignore[attr-defined]

    def _wait_again(self) -> None:
        """Go behind what data parallel wrappers have asked for, which may still write gradients."""
        Variable._execution_engine.queue_callback(self._average)  # type: ignore[attr-defined]

    def _average(self) -> None:
        self._task = None
        average_gradients(self._followed.values())


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter the mean of its gradients in all processes, in one exchange for each dtype.

    Where a process has no gradient it counts as zero; where none has one there is none afterwards. All processes must
    give the same parameters in the same order.
    """
    if is_distributed():
        wanted = list(parameters)
        means = mean_over_processes([own.grad for own in wanted], wanted)
        for parameter, mean in zip(wanted, means, strict=True):
            if mean is not None:
                parameter.grad = mean


def hide_from_data_parallel(model: nn.Module) -> list[str] | None:
    """Let a ``DistributedDataParallel`` that is made from now on leave simulators alone; return what was so before.

    Their parameters are averaged here, and their buffers (masks as large as the weights) are the same in all processes
    without being sent in every forward pass.
    """
    before: list[str] | None = getattr(model, _IGNORED, None)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    own = [name for name, _ in tensors if RESERVED in name.split(".")]
    vars(model)[_IGNORED] = [*(before or ()), *own]
    return before


def show_to_data_parallel(model: nn.Module, before: list[str] | None) -> None:
    """Take back what :func:`hide_from_data_parallel` did."""
    if before is None:
        vars(model).pop(_IGNORED, None)
    else:
        vars(model)[_IGNORED] = before
