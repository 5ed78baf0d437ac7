"""Norm and direction of features: point where the teacher points, and at least as far."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.distillation.checks import same_shape, samples

__all__ = ["norm_and_direction"]


def norm_and_direction(student: Tensor, teacher: Tensor) -> Tensor:
    """Pull each sample's feature towards the teacher's direction, and to at least the teacher's norm.

    ``mean over samples of 1 - <f_S, e> / max(||f_S||, ||f_T||)`` with the direction ``e = f_T / ||f_T||``: 0 for a
    feature that points like the teacher's and is at least as long. Wang et al., "Improving Knowledge Distillation via
    Regularizing Feature Norm and Direction" (https://arxiv.org/abs/2305.17007). There ``e`` is the
    direction of the mean feature of the sample's class, which needs labels; here it is that of the teacher's feature
    of the same sample.

    Args:
        student: ``(samples, ...)``, such as the features before the last layer.
        teacher: The same shape; takes no gradient.

    Returns:
        0-d tensor, 0 to 2.

    Raises:
        ConfigError: The shapes differ.
    """
    same_shape(student, teacher)
    mine, theirs = samples(student), samples(teacher.detach())
    tiny = torch.finfo(mine.dtype).tiny
    length = theirs.norm(dim=1)
    along = (mine * theirs).sum(1) / length.clamp_min(tiny)
    longest = torch.maximum(mine.norm(dim=1), length).clamp_min(tiny)
    return (1 - along / longest).mean()
