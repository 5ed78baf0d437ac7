"""The formulas of distillation, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError

__all__ = ["FEATURE_LOSSES", "class_dimension", "divergence", "feature_loss", "mean_squared_error"]


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
        ConfigError: The shapes differ, or the temperature is not positive.
    """
    _same_shape(student, teacher, "logits")
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}")
    student, teacher = _widen(student), _widen(teacher.detach())
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
    _same_shape(student, teacher, "tensors")
    return functional.mse_loss(_widen(student), _widen(teacher.detach()))


def _feature_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The ``kl`` of a config_list: softened by 2, over the last dimension, a mean over the first.

    These are the constants of NNI's distillers, so that a list gives the same losses here.
    """
    _same_shape(student, teacher, "tensors")
    if student.dim() == 0:
        raise ConfigError("apply_method 'kl' needs a tensor with at least one dimension")
    positions = student.numel() // max(student.shape[-1], 1)
    return divergence(student, teacher, temperature=2.0) * (positions / max(student.shape[0], 1))


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "kl": _feature_divergence,
}
"""The losses that ``apply_method`` names: ``loss(student, teacher) -> 0-d tensor``."""


def feature_loss(method: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Compare two intermediate tensors by the loss that ``apply_method`` names.

    Raises:
        ConfigError: There is no such method, or the shapes differ.
    """
    if method not in FEATURE_LOSSES:
        raise ConfigError(f"apply_method {method!r} is not one of {', '.join(FEATURE_LOSSES)}")
    return FEATURE_LOSSES[method](student, teacher)


def class_dimension(logits: Tensor) -> int:
    """Where the classes stand: dimension 1 of images (four dimensions or more), else the last."""
    return 1 if logits.dim() >= 4 else -1


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student and teacher {what} differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
