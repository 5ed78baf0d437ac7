"""Compression inside Hugging Face's ``Trainer``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.training.adapters.state import check_run, read_run, write_run
from dwindle.training.run import CompressionRun

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise DwindleError(
        "follow_trainer needs transformers and accelerate: pip install 'dwindle[hf]'"
    ) from error

__all__ = ["follow_trainer"]


def follow_trainer(trainer: Trainer, run: CompressionRun) -> None:
    """Let a ``Trainer`` drive a run: its loss is added, its parameters are trained, and it counts the steps.

    Gradient accumulation, precision, clipping, distribution and schedulers stay the ``Trainer``'s. Its checkpoints
    get one more file, and ``trainer.train(resume_from_checkpoint=...)`` goes on with the compressors where they stood.

    Args:
        trainer: Not trained yet; a subclass with a ``compute_loss`` of its own will do.
        run: Entered, for the trainer's model or a part of it.

    Raises:
        ConfigError: The run is not entered, compresses another model, or the trainer follows a run already.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if trainer.model is None or trainer.model_init is not None:
        raise ConfigError("give the Trainer its model itself, not a model_init that makes it later")
    check_run(run, trainer.model, "the trainer's model")
    if any(isinstance(own, _RunCallback) and own.run.active for own in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer follows a run already")
    trainer.compute_loss = _with_loss(trainer, run)  # type: ignore[method-assign]
    if trainer.optimizer is None:
        trainer.create_optimizer = _with_parameters(trainer, run)  # type: ignore[method-assign]
    else:
        run.add_parameters_to(trainer.optimizer, schedule=trainer.lr_scheduler)
    if hasattr(trainer, "_load_from_checkpoint"):
        trainer._load_from_checkpoint = _with_run(trainer, run)  # type: ignore[method-assign]
    trainer.add_callback(_RunCallback(run, trainer))


def _with_loss(trainer: Trainer, run: CompressionRun) -> Any:
    """Return the trainer's ``compute_loss`` with the run's loss added while the model is trained."""
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def with_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        loss, outputs = compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **options
        )
        if run.active and model.training and torch.is_grad_enabled():
            loss = loss + _share(trainer, num_items_in_batch) * run.loss()
        return (loss, outputs) if return_outputs else loss

    return with_loss


def _share(trainer: Trainer, num_items_in_batch: Any) -> float:
    """What one batch's loss weighs in a step: a loss per item is divided by the items of all batches already."""
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
            trainer.compute_loss_func is not None
        )
    return 1.0 / trainer.current_gradient_accumulation_steps if scaled else 1.0


def _with_parameters(trainer: Trainer, run: CompressionRun) -> Any:
    """Return the trainer's ``create_optimizer``; the optimizer then trains the run's parameters too."""
    create_optimizer = trainer.create_optimizer

    @functools.wraps(create_optimizer)
    def with_parameters(*args: Any, **options: Any) -> Any:
        if not run.active:
            return create_optimizer(*args, **options)
        with simulate.disabled(run.model):  # what belongs to compressors gets groups of its own
            optimizer = create_optimizer(*args, **options)
        run.add_parameters_to(optimizer)
        return optimizer

    return with_parameters


def _with_run(trainer: Trainer, run: CompressionRun) -> Any:
    """Return the trainer's ``_load_from_checkpoint`` with the run's state read first.

    Compressors that had begun by then are on the model before its own state, which holds their masks, is loaded.
    """
    load = trainer._load_from_checkpoint

    @functools.wraps(load)
    def with_run(checkpoint: Any, *args: Any, **options: Any) -> Any:
        if run.active:
            read_run(run, checkpoint)
        return load(checkpoint, *args, **options)

    return with_run


class _RunCallback(TrainerCallback):
    """Tells a run of optimizer steps, and keeps its state in checkpoints."""

    def __init__(self, run: CompressionRun, trainer: Trainer) -> None:
        self.run, self.trainer = run, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.run.active:
            return
        optimizer: Any = self.trainer.optimizer
        schedule: Any = self.trainer.lr_scheduler
        optimizer = getattr(optimizer, "optimizer", optimizer)  # what accelerate wrapped
        # The schedule was made after the optimizer: from here on it takes in those that begin later.
        self.run.add_parameters_to(optimizer, schedule=getattr(schedule, "scheduler", schedule))
        if state.global_step > self.run.steps:
            read_run(self.run, _folder(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.run.active and not self.trainer.accelerator.optimizer_step_was_skipped:
            self.run.step()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.run.active:
            write_run(self.run, _folder(args, state))


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
