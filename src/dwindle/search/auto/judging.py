"""How good a model is, in torch or in a runtime: the user's metric, accuracy, or agreement with the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.graph.modes import in_mode
from dwindle.training.batches import logits_of, split_batch
from dwindle.training.inputs import Inputs, forward_inputs

__all__ = ["METRICS", "Judge"]

METRICS = ("accuracy", "agreement")

Predict = Callable[..., Any]
Metric = Callable[[Predict], float]


class Judge:
    """Gives models a score; higher is better.

    Args:
        metric: ``"accuracy"`` (share of the validation samples whose largest logit is their label), ``"agreement"``
            (share whose largest logit is the original's; no labels needed), or a function of something that is called
            like the model: the model itself in evaluation mode, or its file in a runtime.
        original: The original model.
        validation: Batches, for the metrics with a name; kept in memory.
        greater_is_better: False for metrics that are losses; scores are then their negatives.

    Raises:
        ConfigError: The metric is not known, or there are no batches for it.
    """

    def __init__(
        self,
        metric: str | Metric,
        original: nn.Module,
        validation: Iterable[Any] | None,
        greater_is_better: bool = True,
    ) -> None:
        self._sign = 1.0 if greater_is_better else -1.0
        self._metric = metric
        self._batches: list[tuple[Inputs, Tensor]] = []
        if callable(metric):
            return
        if metric not in METRICS:
            raise ConfigError(
                f"metric: {metric!r} is not one of {', '.join(METRICS)}, or a function{did_you_mean(metric, METRICS)}"
            )
        if validation is None:
            raise ConfigError(f"metric: {metric!r} needs validation=, batches that the training does not see")
        for batch in validation:
            if metric == "accuracy":
                args, kwargs, target = split_batch(batch)
                self._batches.append(((args, kwargs), torch.as_tensor(target)))
            else:
                inputs = forward_inputs(original, batch)
                with torch.no_grad(), in_mode(original, training=False):
                    answer = logits_of(original(*inputs[0], **inputs[1])).argmax(-1)
                self._batches.append((inputs, answer))
        if not self._batches:
            raise ConfigError("validation: it gave no batch")

    def __call__(self, model: Predict) -> float:
        """Return the score of a model, or of its file opened in a runtime.

        Args:
            model: A module (judged in evaluation mode, without gradients), or anything called like one.
        """
        if isinstance(model, nn.Module):
            with torch.no_grad(), in_mode(model, training=False):
                return self._score(model)
        return self._score(model)

    def _score(self, model: Predict) -> float:
        if callable(self._metric):
            return self._sign * float(self._metric(model)) + 0.0  # no negative zero
        right = total = 0
        for (args, kwargs), target in self._batches:
            said = logits_of(model(*args, **kwargs)).argmax(-1)
            right += int((said == target).sum())
            total += target.numel()
        return self._sign * right / total
