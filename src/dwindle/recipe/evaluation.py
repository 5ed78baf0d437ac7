"""What a model says about the test data, and how good that is: accuracy, or agreement with the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.graph.modes import in_mode
from dwindle.recipe.data_source import Data
from dwindle.training import logits_of

__all__ = ["Evaluation", "agreement_of", "evaluate", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """How a model does on the test data.

    Attributes:
        accuracy: Share of right answers (0 to 1); None without labels.
        agreement: Share of answers equal to the original model's; None where there is no original yet.
        samples: How many answers were compared.
    """

    accuracy: float | None
    agreement: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"accuracy": self.accuracy, "agreement": self.agreement, "samples": self.samples}


def predict(model: nn.Module | Callable[..., Any], data: Data) -> tuple[Tensor, Tensor | None]:
    """Run a classifier over the test data.

    Args:
        model: A module (run in evaluation mode; its training flags are as before afterwards), or anything
            called like one, such as a session of a runtime.
        data: The data.

    Returns:
        The classes with the largest logit and the labels (or None), int64 on the CPU.

    Raises:
        ConfigError: The model gives no logits, or there is nothing to test with.
    """
    predicted: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(in_mode(model, training=False))
        for batch in data.test_batches():
            logits = logits_of(model(*batch.args, **batch.kwargs))
            if not isinstance(logits, Tensor) or logits.dim() < 2:
                raise ConfigError(
                    f"the model gives a {type(logits).__name__}, in which there are no logits to compare"
                )
            # Segmentation models give (batch, classes, height, width); all others have classes last.
            predicted.append(logits.argmax(1 if logits.dim() == 4 else -1).cpu())
            if batch.target is not None:
                targets.append(torch.as_tensor(batch.target).cpu())
    if not predicted:
        raise ConfigError(f"the data {data.part.name!r} hold nothing to test with")
    return torch.cat(predicted), torch.cat(targets) if targets else None


def evaluate(
    model: nn.Module | Callable[..., Any], data: Data, original: Tensor | None
) -> tuple[Evaluation, Tensor]:
    """Run a model over the test data and compare with labels and with the original's predictions.

    Returns:
        The evaluation, and the predictions.
    """
    predicted, targets = predict(model, data)
    accuracy = None if targets is None else agreement_of(predicted, targets)
    agreement = None if original is None else agreement_of(predicted, original)
    return Evaluation(accuracy, agreement, predicted.numel()), predicted


def agreement_of(first: Tensor, second: Tensor) -> float:
    """Share (0 to 1) of equal entries."""
    if first.shape != second.shape:
        raise ConfigError(
            f"predictions of shape {tuple(first.shape)} cannot be compared with {tuple(second.shape)}"
        )
    return float((first == second).double().mean())
