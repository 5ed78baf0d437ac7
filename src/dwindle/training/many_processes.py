"""What a run does so that the processes of a distributed training agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.training.averaging import GradientAveraging, hide_from_data_parallel, show_to_data_parallel
from dwindle.training.processes import alike, is_distributed

__all__ = ["ManyProcesses", "sharding_problem"]


def sharding_problem(compressor: Any) -> str | None:
    """Return why a compressor cannot work on a model that ``fully_shard`` has cut up; None where it can.

    A compressor says so itself, with a method of this name; one without it was not made for that.
    """
    ask = getattr(compressor, "sharding_problem", None)
    if not callable(ask):
        return "it was not made for it (a compressor that was has a sharding_problem() that returns None)"
    found: str | None = ask()
    return found


class ManyProcesses:
    """The part of a run that concerns other processes; with one process it does nothing.

    Args:
        model: The model.
        compressors: Of the run.
    """

    def __init__(self, model: nn.Module, compressors: Sequence[Any]) -> None:
        self._model, self._compressors = model, tuple(compressors)
        self._averaging = GradientAveraging()
        self._hidden = False
        self._ignored: list[str] | None = None
        self._known_shards = False

    def check(self) -> None:
        """See that the processes begin alike, before anything is changed.

        Raises:
            ConfigError: The model is cut up and a compressor cannot work so, or the processes hold other weights.
        """
        self._check_shards()
        self._reshard()
        if not self._known_shards and not alike(self._model.parameters()):
            raise ConfigError(
                "the processes hold models with different weights, so they would find different masks and scales; "
                "load the same weights (or seed alike) in all of them before compress()"
            )

    def _check_shards(self) -> None:
        """Look whether ``fully_shard`` was called, until it was."""
        if self._known_shards or not simulate.has_shards(self._model):
            return
        for position, compressor in enumerate(self._compressors):
            problem = sharding_problem(compressor)
            if problem is not None:
                raise ConfigError(
                    f"compressors[{position}] ({type(compressor).__name__}) cannot work on a model that fully_shard "
                    f"has cut up: {problem}"
                )
        self._known_shards = True

    def _reshard(self) -> None:
        if self._known_shards:
            simulate.reshard(self._model)

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """The compressors are attached, and these are their own parameters."""
        if is_distributed():
            self._ignored, self._hidden = hide_from_data_parallel(self._model), True
        self.follow(parameters)

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """These are the compressors' own parameters from now on; some compressors may have begun."""
        # Calibration leaves whole parameters, which no optimizer and no checkpoint must get.
        self._reshard()
        self._averaging.follow(parameters)

    def before_loss(self) -> None:
        """A forward pass was made, and its backward pass comes."""
        self._check_shards()

    def before_step(self) -> None:
        """The optimizer has made a step: compressors may look at the parameters, which are between two passes."""
        self._check_shards()
        self._reshard()

    def end(self, *, failed: bool) -> None:
        """The compressors are about to be taken off.

        Args:
            failed: An exception is under way, maybe that another process is gone: nobody must wait for one.
        """
        self._averaging.stop()
        if self._hidden:
            show_to_data_parallel(self._model, self._ignored)
            self._hidden = False
        if simulate.has_shards(self._model):
            simulate.reshard(self._model, after_error=failed)
            if failed:  # to leave masked weights at zero, compressors would gather them
                simulate.detach(self._model, keep_values=False)
