"""The two formulas that most distillation needs: divergence of distributions, squared differences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import same_shape, widened

__all__ = ["as_rows", "class_dimension", "divergence", "feature_divergence", "mean_squared_error"]


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Kullback-Leibler divergence of softened distributions, times the squared temperature.

    ``T**2 * mean over positions of sum_c p_c * log(p_c / q_c)`` with ``p = softmax(teacher / T)`` and
    ``q = softmax(student / T)``. The factor keeps the gradients' size independent of the temperature.
    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
    (https://arxiv.org/abs/1503.02531, section 2).

    Args:
        student: Logits, any shape, floating. Half precision is computed in float32.
        teacher: Logits of the same shape; takes no gradient.
        temperature: Above 0; larger is softer.
        dim: The dimension of the classes. All other dimensions together are the positions.

    Returns:
        0-d tensor. With logits of shape ``(batch, classes)`` this is the reduction ``batchmean``.

    Raises:
        ConfigError: The shapes differ, there is one class only, or the temperature is not positive.
    """
    same_shape(student, teacher, "logits")
    check_temperature(temperature)
    if student.dim() and student.shape[dim] == 1:
        raise ConfigError(
            f"logits of shape {tuple(student.shape)} have one class in dimension {dim}: its probability is always 1, "
            "and nothing can be learned; for yes and no there is the loss 'binary'"
        )
    student, teacher = widened(student), widened(teacher.detach())
    log_q = functional.log_softmax(student / temperature, dim)
    log_p = functional.log_softmax(teacher / temperature, dim)
    total = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    positions = max(student.numel() // max(student.shape[dim], 1), 1)
    return total * (temperature**2 / positions)


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared differences of two tensors of the same shape, as a 0-d tensor.

    Raises:
        ConfigError: The shapes differ.
    """
    same_shape(student, teacher)
    return functional.mse_loss(widened(student), widened(teacher.detach()))


def feature_divergence(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """The ``kl`` of a config_list: over the last dimension, a mean over the first, by default softened by 2.

    These are the constants of NNI's distillers, so that a list gives the same losses here.

    Raises:
        ConfigError: The shapes differ, or there is no dimension.
    """
    same_shape(student, teacher)
    if student.dim() == 0:
        raise ConfigError("apply_method 'kl' needs a tensor with at least one dimension")
    positions = student.numel() // max(student.shape[-1], 1)
    return divergence(student, teacher, temperature) * (positions / max(student.shape[0], 1))


def class_dimension(logits: Tensor) -> int:
    """Where the classes stand: dimension 1 of images (four dimensions or more), else the last."""
    return 1 if logits.dim() >= 4 else -1


def as_rows(logits: Tensor, dim: int) -> Tensor:
    """Return ``(positions, classes)`` of logits whose classes stand in dimension ``dim``."""
    return logits.movedim(dim, -1).reshape(-1, logits.shape[dim])


def check_temperature(temperature: float) -> None:
    """Raise where a temperature is not above 0.

    Raises:
        ConfigError: With the temperature.
    """
    if not temperature > 0 or not torch.isfinite(torch.tensor(temperature)):
        raise ConfigError(f"temperature must be above 0, got {temperature}")
