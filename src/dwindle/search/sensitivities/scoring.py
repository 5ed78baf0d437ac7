"""How good a changed model is: by the user's metric, or by how near its outputs stay to the unchanged model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.graph.modes import in_mode
from dwindle.quantization.layer_errors import ratio_db
from dwindle.realize.packing import floating_outputs
from dwindle.training.inputs import Inputs

__all__ = ["MetricScore", "Score", "SignalToNoise"]

Metric = Callable[[nn.Module], float]


class Score(Protocol):
    """Scores a model.

    Attributes:
        name: ``"metric"`` or ``"sqnr"``.
        baseline: The unchanged model's score.
    """

    name: str
    baseline: float

    def __call__(self, model: nn.Module) -> float:
        """Return the score of a model."""

    def drop(self, score: float) -> float:
        """Return how much worse a score is than the baseline, in a unit that adds up over layers."""


class MetricScore:
    """The user's own number.

    Args:
        metric: From a model to a number; called in evaluation mode, without gradients.
        greater_is_better: False for losses and error rates.
    """

    name = "metric"

    def __init__(self, metric: Metric, greater_is_better: bool = True) -> None:
        self.metric, self.greater_is_better = metric, greater_is_better
        self.baseline = math.nan

    def __call__(self, model: nn.Module) -> float:
        """Return the metric of a model."""
        with torch.no_grad(), in_mode(model, training=False):
            return float(self.metric(model))

    def drop(self, score: float) -> float:
        """Return by how much a score is worse; below zero where it is better."""
        return self.baseline - score if self.greater_is_better else score - self.baseline


class SignalToNoise:
    """The energy of the unchanged model's outputs over that of their change, in decibels; no labels are needed.

    The drop is the inverse of the ratio itself: the noise as a share of the signal, which for small noise adds up over
    layers (20 dB are 0.01, 30 dB are 0.001).

    Args:
        model: The unchanged model.
        batches: Arguments of its forward.

    Raises:
        ConfigError: Its outputs hold no floating numbers, only zeros, or NaN or infinite values.
    """

    name = "sqnr"
    baseline = math.inf

    def __init__(self, model: nn.Module, batches: Sequence[Inputs]) -> None:
        self.batches = batches
        self.reference = list(self._outputs(model))
        self.signal = sum(_energy(tensor) for outputs in self.reference for tensor in outputs)
        if not 0 < self.signal < math.inf:
            raise ConfigError(
                f"the energy of the model's outputs on the data is {self.signal}: there is nothing to compare; give a "
                "metric"
            )

    def __call__(self, model: nn.Module) -> float:
        """Return the signal to noise of a model's outputs."""
        noise = 0.0
        for own, reference in zip(self._outputs(model), self.reference, strict=True):
            for value, wanted in zip(own, reference, strict=True):
                noise += _energy(value.double() - wanted.double())
        return ratio_db(self.signal, noise) if math.isfinite(noise) else -math.inf

    def drop(self, score: float) -> float:
        """Return the noise as a share of the signal."""
        return float(10 ** (-score / 10))

    def _outputs(self, model: nn.Module) -> Iterator[list[Tensor]]:
        for args, kwargs in self.batches:
            with torch.no_grad(), in_mode(model, training=False):
                outputs = list(floating_outputs(model(*args, **kwargs)))
            yield outputs


def _energy(value: Tensor) -> float:
    return float(value.double().square().sum())
