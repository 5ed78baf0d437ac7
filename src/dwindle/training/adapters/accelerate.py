"""Compression inside a loop of Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.training.adapters.state import check_run, optimizer_of, read_run, write_run
from dwindle.training.run import CompressionRun

try:
    from accelerate import Accelerator
except ImportError as error:
    raise DwindleError("follow_accelerator needs accelerate: pip install 'dwindle[hf]'") from error

__all__ = ["AcceleratedRun", "follow_accelerator"]


class AcceleratedRun:
    """A run whose :meth:`step` may stand behind every batch: it counts only what was a step of the optimizer.

    Made by :func:`follow_accelerator`. Everything else is the run's own.
    """

    def __init__(self, accelerator: Accelerator, run: CompressionRun) -> None:
        self.accelerator, self.run = accelerator, run

    def loss(self) -> Tensor | float:
        """Return what to add to the loss of this batch; ``accelerator.backward`` divides both by the accumulation."""
        return self.run.loss()

    def step(self) -> None:
        """Tell the compressors of a step, unless gradients are still gathered or the step was skipped."""
        if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
            self.run.step()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the compressors' own trainable parameters."""
        return self.run.parameters()

    @property
    def steps(self) -> int:
        """Steps of the optimizer so far."""
        return self.run.steps

    def realize(self, example_inputs: tuple[Any, ...] | None = None, **options: Any) -> Any:
        """As :meth:`CompressionRun.realize`."""
        return self.run.realize(example_inputs, **options)


def follow_accelerator(
    accelerator: Accelerator,
    run: CompressionRun,
    optimizer: torch.optim.Optimizer,
    schedule: Any | None = None,
) -> AcceleratedRun:
    """Let an ``Accelerator`` drive a run. Call it before ``accelerator.prepare``.

    The optimizer gets the run's own parameters, and ``accelerator.save_state`` and ``load_state`` write and read one
    more file. In the loop, ``run.loss()`` is added to the loss and ``run.step()`` stands behind ``optimizer.step()``.

    Args:
        accelerator: The user's.
        run: Entered, for the model that will be prepared.
        optimizer: Of the model, not prepared yet.
        schedule: The learning rate scheduler made for it; the new parameter groups follow it.

    Returns:
        The run as the loop is to use it.

    Raises:
        ConfigError: The run is not entered, or the optimizer trains another model.
    """
    if not isinstance(accelerator, Accelerator):
        raise ConfigError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    if not isinstance(run, CompressionRun):
        raise ConfigError(f"run must be what dw.compress gives, got {type(run).__name__}")
    check_run(run, run.model, "the model")
    run.add_parameters_to(optimizer_of(run, [optimizer]), schedule=schedule)

    def save(models: Any, weights: Any, output_dir: str) -> None:
        if run.active:
            write_run(run, output_dir)

    def load(models: Any, input_dir: str) -> None:
        if run.active:
            read_run(run, input_dir)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return AcceleratedRun(accelerator, run)
