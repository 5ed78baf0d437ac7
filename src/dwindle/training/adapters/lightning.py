"""Compression inside Lightning's ``Trainer``."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from dwindle import simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.simulate.simulators import RESERVED
from dwindle.training.adapters.state import check_run, optimizer_of
from dwindle.training.run import CompressionRun

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise DwindleError("CompressionCallback needs lightning: pip install 'dwindle[lightning]'") from error

__all__ = ["CompressionCallback"]


class CompressionCallback(Callback):
    """Lets a Lightning ``Trainer`` drive a run: its loss is added, its parameters are trained, steps are counted.

    Accumulation, precision, clipping, strategy and schedulers stay Lightning's; its checkpoints carry the run's state.
    What ``training_step`` returns gets the run's loss added, so optimization must be automatic; with several optimizers
    the run's own parameters go to the one that trains the compressed model.

    Args:
        run: Entered, for the Lightning module or a part of it.
    """

    def __init__(self, run: CompressionRun) -> None:
        super().__init__()
        self.run = run
        self._optimizer_steps = 0
        self._handle: Any = None
        self._passed_over: dict[str, Any] = {}
        self._module: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the run fits, and add its loss to what ``training_step`` returns."""
        if stage != "fit":
            return
        check_run(self.run, pl_module, "the Lightning module")
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"{type(pl_module).__name__} optimizes by hand: write `loss + run.loss()` and `run.step()` there "
                "yourself, and leave the callback out"
            )
        pl_module.training_step = _with_loss(pl_module.training_step, self.run)
        pl_module.configure_optimizers = _without_own(pl_module.configure_optimizers, self.run)
        self._module = pl_module
        self._handle = pl_module.register_load_state_dict_pre_hook(self._pass_over_unknown)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the optimizer train the run's own parameters; the schedulers follow."""
        optimizer = optimizer_of(self.run, trainer.optimizers)
        schedules = [own.scheduler for own in trainer.lr_scheduler_configs]
        own = [schedule for schedule in schedules if getattr(schedule, "optimizer", None) is optimizer]
        self.run.add_parameters_to(optimizer, schedule=own[0] if own else None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count where the trainer stands."""
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the run of a step, if this batch was the last one of an accumulation."""
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self.run.step()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own ``training_step`` back."""
        if stage == "fit":
            vars(pl_module).pop("training_step", None)
            vars(pl_module).pop("configure_optimizers", None)
            if self._handle is not None:
                self._handle.remove()
            self._module = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's state, for the checkpoint."""
        return self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.run.load_state_dict(state_dict)
        passed_over, self._passed_over = self._passed_over, {}
        if passed_over and self._module is not None:
            self._module.load_state_dict(passed_over, strict=False)

    def _pass_over_unknown(self, module: Any, state_dict: dict[str, Any], *given: Any) -> None:
        """Put aside masks of compressors that had begun: Lightning loads the module before the callback."""
        known = module.state_dict().keys()
        for key in [own for own in state_dict if RESERVED in own.split(".") and own not in known]:
            self._passed_over[key] = state_dict.pop(key)


def _without_own(configure_optimizers: Any, run: CompressionRun) -> Any:
    """Return the module's ``configure_optimizers``; what belongs to compressors gets groups of its own later."""

    @functools.wraps(configure_optimizers)
    def without_own(*args: Any, **options: Any) -> Any:
        with simulate.disabled(run.model):
            return configure_optimizers(*args, **options)

    return without_own


def _with_loss(training_step: Any, run: CompressionRun) -> Any:
    @functools.wraps(training_step)
    def with_loss(*args: Any, **options: Any) -> Any:
        found = training_step(*args, **options)
        if isinstance(found, Tensor):
            return found + run.loss()
        if isinstance(found, dict) and "loss" in found:
            return {**found, "loss": found["loss"] + run.loss()}
        if found is None:  # the batch is skipped
            return None
        raise ConfigError(
            f"training_step returned a {type(found).__name__}; a tensor, a dict with 'loss', or None was expected"
        )

    return with_loss
