"""How :func:`dwindle.training.fit` goes about it, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from dwindle.config.errors import ConfigError, did_you_mean

__all__ = ["PRECISIONS", "EpochRecord", "TrainingOptions", "TrainingResult"]

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What autocast is told for each precision."""


@dataclass(frozen=True)
class TrainingOptions:
    """How :func:`fit` goes about it; the defaults suit a small model on a CPU.

    Attributes:
        device: Where model and batches go; None leaves the model where it is.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"`` (with loss scaling). On a
            CPU without bfloat16 instructions autocast is many times slower than float32.
        channels_last: Hold model and images in channels-last memory, faster for convolutions.
        schedule_every: Whether the learning rate schedule steps after each ``"step"`` or ``"epoch"``.
        accumulate: Batches whose gradients are summed (as a mean) before the optimizer steps.
        clip_norm: Largest norm of all gradients together, or None.
        task_weight: Weight of the task's own loss beside the compressors' losses.
        compressor_rate: Factor for the learning rates of the compressors' own parameters.
        adapt_normalization: After each epoch, before it is evaluated, running statistics of batch normalizations are
            estimated anew from so many batches of the loader (:func:`dwindle.training.adapt_normalization`); 0 leaves
            them as training has moved them.
        seed: Seeds every random generator before the first epoch; None leaves them alone.
        progress: Show a progress bar; None means only when the error output is a terminal.
    """

    device: str | torch.device | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    schedule_every: Literal["step", "epoch"] = "step"
    accumulate: int = 1
    clip_norm: float | None = None
    task_weight: float = 1.0
    compressor_rate: float = 1.0
    adapt_normalization: int = 0
    seed: int | None = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"
                + did_you_mean(str(self.precision), PRECISIONS)
            )
        if self.schedule_every not in ("step", "epoch"):
            raise ConfigError(f"schedule_every must be 'step' or 'epoch', got {self.schedule_every!r}")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate must be at least 1, got {self.accumulate}")
        if not self.compressor_rate > 0:
            raise ConfigError(f"compressor_rate must be above 0, got {self.compressor_rate}")
        if self.adapt_normalization < 0:
            raise ConfigError(
                f"adapt_normalization must be a number of batches, got {self.adapt_normalization}"
            )


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: Its number, from 1.
        loss: Mean loss of its batches, compressors' losses included.
        metric: What the ``evaluate`` function returned after it, or None.
        learning_rate: Of the first parameter group, at its end.
        seconds: How long it took, evaluation included.
    """

    epoch: int
    loss: float
    metric: float | None
    learning_rate: float
    seconds: float


@dataclass
class TrainingResult:
    """The epochs of a run, those before a resumption included.

    Attributes:
        history: One record an epoch.
        resumed_from: The epoch behind which the run was taken up again (0: it began anew).
        losses: Loss of every batch, compressors' losses included.
        stopped: Why it was stopped early: ``"target"`` or ``"patience"``; None when it was not.
    """

    history: list[EpochRecord] = field(default_factory=list)
    resumed_from: int = 0
    losses: list[float] = field(default_factory=list)
    stopped: str | None = None

    @property
    def metric(self) -> float | None:
        """The metric after the last epoch."""
        return self.history[-1].metric if self.history else None
