"""What the formulas of distillation ask of their tensors, and the precision they compute in."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.config.errors import ConfigError

__all__ = ["mean_over_samples", "same_batch", "same_shape", "samples", "widened"]


def widened(tensor: Tensor) -> Tensor:
    """Return half precision as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def same_shape(student: Tensor, teacher: Tensor, what: str = "tensors") -> None:
    """Raise where the shapes differ.

    Raises:
        ConfigError: With both shapes.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student and teacher {what} differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def same_batch(student: Tensor, teacher: Tensor, least: int = 1) -> None:
    """Raise where the tensors do not hold the same number of samples, or too few.

    Args:
        student: Any shape; dimension 0 counts the samples.
        teacher: The same number of samples.
        least: So many are needed.

    Raises:
        ConfigError: With both shapes, or the number that is needed.
    """
    if student.dim() == 0 or teacher.dim() == 0 or student.shape[0] != teacher.shape[0]:
        raise ConfigError(
            "student and teacher tensors differ in the number of samples (dimension 0): "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[0] < least:
        raise ConfigError(
            f"relations between samples need at least {least} in a batch, got {student.shape[0]}"
        )


def samples(tensor: Tensor) -> Tensor:
    """Return ``(samples, values)`` of any tensor with at least one dimension, at least in float32."""
    return widened(tensor).reshape(tensor.shape[0], -1)


def mean_over_samples(values: Tensor) -> Tensor:
    """Return the sum of all values divided by the size of dimension 0."""
    return values.sum() / max(values.shape[0], 1)
