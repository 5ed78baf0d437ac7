"""The names that ``apply_method`` and ``logits_loss`` know, and the options that each takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.distillation.attention_maps import attention_map_divergence, attention_map_error
from dwindle.distillation.attention_transfer import attention_transfer
from dwindle.distillation.binary import binary_divergence
from dwindle.distillation.contrastive import contrastive
from dwindle.distillation.correlation import correlation_distance
from dwindle.distillation.decoupled import decoupled_divergence
from dwindle.distillation.losses import (
    class_dimension,
    divergence,
    feature_divergence,
    mean_squared_error,
)
from dwindle.distillation.norm_direction import norm_and_direction
from dwindle.distillation.probabilistic import neighbour_probabilities
from dwindle.distillation.relational import relation_angles, relation_distances
from dwindle.distillation.similarity import similarity
from dwindle.distillation.token_relations import token_relations
from dwindle.training.schedule import Schedule, value_at

__all__ = ["FEATURE_LOSSES", "LOGITS_LOSSES", "METHODS", "Method", "feature_loss", "logits_loss"]

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to compare a student's tensor with a teacher's.

    Attributes:
        loss: ``loss(student, teacher, **options) -> 0-d tensor``.
        adapter: What makes other shapes comparable: ``none``, ``project`` (where they differ) or ``embed`` (always).
        on_logits: Whether ``loss`` takes the dimension of the classes, as ``dim``.
        whole: Options that are whole numbers from 1 on.
    """

    loss: Callable[..., Tensor]
    adapter: Literal["none", "project", "embed"] = "none"
    on_logits: bool = False
    whole: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options."""
        names = list(inspect.signature(self.loss).parameters)[2:]
        own = tuple(name for name in names if name not in ("dim", "target"))
        return (*own, "width") if self.adapter == "embed" else own

    def check(self, options: Options, where: str) -> None:
        """Raise where an option is not one, or has no value that it could have.

        Args:
            options: Numbers or schedules by name.
            where: What they belong to, for the message.

        Raises:
            ConfigError: Naming the option and the nearest one.
        """
        for name, value in options.items():
            if name not in self.options:
                known = f"its options are {', '.join(self.options)}" if self.options else "it has no options"
                raise ConfigError(
                    f"{where}: there is no option {name!r}; {known}{did_you_mean(name, self.options)}"
                )
            if name in (*self.whole, "width"):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ConfigError(
                        f"{where}: option {name!r} must be a whole number from 1 on, got {value!r}"
                    )
            elif not callable(value) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"{where}: option {name!r} must be a number or a schedule, got {value!r}")
            elif not callable(value) and name in ("temperature", "power") and not value > 0:
                raise ConfigError(f"{where}: option {name!r} must be above 0, got {value!r}")

    def __call__(self, student: Tensor, teacher: Tensor, options: Options, step: int = 0) -> Tensor:
        """Return the loss, with options as they stand at a step."""
        values = {
            name: value if name in self.whole else value_at(value, step) for name, value in options.items()
        }
        values.pop("width", None)
        if self.on_logits:
            values.setdefault("dim", class_dimension(student))
        return self.loss(student, teacher, **values)


METHODS: dict[str, Method] = {
    "mse": Method(mean_squared_error),
    "kl": Method(feature_divergence),
    "hint": Method(mean_squared_error, adapter="project"),
    "attention_transfer": Method(attention_transfer),
    "attention_map": Method(attention_map_divergence),
    "attention_map_mse": Method(attention_map_error),
    "token_relations": Method(token_relations, whole=("heads",)),
    "relation_distance": Method(relation_distances),
    "relation_angle": Method(relation_angles),
    "similarity": Method(similarity),
    "pkt": Method(neighbour_probabilities),
    "norm_direction": Method(norm_and_direction, adapter="project"),
    "contrastive": Method(contrastive, adapter="embed"),
    "classes": Method(divergence, on_logits=True),
    "binary": Method(binary_divergence, on_logits=True),
    "dkd": Method(decoupled_divergence, on_logits=True),
    "dist": Method(correlation_distance, on_logits=True),
}
"""What ``apply_method`` names."""

FEATURE_LOSSES: dict[str, Callable[..., Tensor]] = {name: method.loss for name, method in METHODS.items()}
"""The formulas that ``apply_method`` names: ``loss(student, teacher, **options) -> 0-d tensor``."""

LOGITS_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": divergence,
    "binary": binary_divergence,
    "dkd": decoupled_divergence,
    "dist": correlation_distance,
}
"""What ``logits_loss`` of a distiller names: ``loss(student, teacher, temperature, dim, **options)``."""


def feature_loss(method: str, student: Tensor, teacher: Tensor, **options: float) -> Tensor:
    """Compare two intermediate tensors by the loss that ``apply_method`` names, as they are (without a projection).

    Args:
        method: A name of ``apply_method``, such as ``"mse"``.
        student: The student's tensor; gradients flow into it.
        teacher: The teacher's tensor, of a shape that the method compares with it.
        options: The method's own options.

    Returns:
        The loss, a scalar.

    Raises:
        ConfigError: There is no such method or option, or the shapes do not fit.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"apply_method {method!r} is not one of {known}{did_you_mean(method, METHODS)}")
    METHODS[method].check(options, f"apply_method {method!r}")
    return METHODS[method](student, teacher, options)


@dataclass(frozen=True)
class LogitsLoss:
    """How a distiller compares outputs.

    Attributes:
        name: A key of :data:`LOGITS_LOSSES`.
        temperature: Softens both distributions; a number or a schedule.
        options: Further options of the loss.
    """

    name: str
    temperature: float | Schedule
    options: Options

    def __call__(self, student: Tensor, teacher: Tensor, dim: int, step: int) -> Tensor:
        """Return the loss at a step."""
        values = {name: value_at(value, step) for name, value in self.options.items()}
        return LOGITS_LOSSES[self.name](student, teacher, value_at(self.temperature, step), dim, **values)


def logits_loss(name: str, temperature: float | Schedule, options: Options | None) -> LogitsLoss:
    """Return the checked loss of outputs.

    Raises:
        ConfigError: There is no such loss or option.
    """
    if name not in LOGITS_LOSSES:
        known = ", ".join(LOGITS_LOSSES)
        raise ConfigError(
            f"logits_loss {name!r} is not one of {known}{did_you_mean(str(name), LOGITS_LOSSES)}"
        )
    given = dict(options or {})
    if "temperature" in given:
        raise ConfigError("logits_options: the temperature of the outputs is an argument of its own")
    method = Method(LOGITS_LOSSES[name], on_logits=True)
    method.check(given, f"logits_options of {name!r}")
    return LogitsLoss(name, temperature, given)
