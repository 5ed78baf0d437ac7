"""Distillation from a stronger teacher: what correlates, not what is equal."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.distillation.checks import same_shape, widened
from dwindle.distillation.losses import as_rows, check_temperature

__all__ = ["correlation_distance"]


def correlation_distance(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    dim: int = -1,
    class_weight: float = 1.0,
    sample_weight: float = 1.0,
) -> Tensor:
    """One minus Pearson's correlation of the predictions, within each sample and within each class (DIST).

    ``T**2 * (beta * mean over samples of (1 - r(p_S, p_T)) + gamma * mean over classes of (1 - r(c_S, c_T)))``, where
    ``p`` is a sample's distribution over classes and ``c`` a class's probabilities over the samples. Huang et al.,
    "Knowledge Distillation from A Stronger Teacher" (https://arxiv.org/abs/2205.10536).

    Args:
        student: Logits. Half precision is computed in float32.
        teacher: Logits of the same shape; takes no gradient.
        temperature: Above 0.
        dim: The dimension of the classes; all others together are the samples.
        class_weight: The paper's beta, for relations between classes.
        sample_weight: The paper's gamma, for relations between samples; with one sample it says nothing.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes differ, or the temperature is not positive.
    """
    same_shape(student, teacher, "logits")
    check_temperature(temperature)
    mine = (as_rows(widened(student), dim) / temperature).softmax(1)
    theirs = (as_rows(widened(teacher.detach()), dim) / temperature).softmax(1)
    total = class_weight * _uncorrelated(mine, theirs)
    if mine.shape[0] > 1:
        total = total + sample_weight * _uncorrelated(mine.T, theirs.T)
    return total * temperature**2


def _uncorrelated(first: Tensor, second: Tensor) -> Tensor:
    """Mean over the rows of one minus Pearson's correlation; a constant row correlates with nothing."""
    first, second = (own - own.mean(1, keepdim=True) for own in (first, second))
    tiny = torch.finfo(first.dtype).eps
    lengths = first.norm(dim=1).clamp_min(tiny) * second.norm(dim=1).clamp_min(tiny)
    return (1 - (first * second).sum(1) / lengths).mean()
