"""Distillation of yes and no: each logit is a question of its own, such as a label among many or a place of a map."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dwindle.distillation.checks import same_shape, widened
from dwindle.distillation.losses import check_temperature

__all__ = ["binary_divergence"]


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Kullback-Leibler divergence of softened Bernoulli distributions, times the squared temperature.

    ``T**2 * mean over positions of sum_c (p_c * log(p_c / q_c) + (1 - p_c) * log((1 - p_c) / (1 - q_c)))`` with
    ``p = sigmoid(teacher / T)`` and ``q = sigmoid(student / T)``: what Hinton et al.
    (https://arxiv.org/abs/1503.02531) do with classes that exclude each other, for those that do not. Its gradient
    is ``T * (q - p) / positions``, as there.

    Args:
        student: Logits, any shape, floating. Half precision is computed in float32.
        teacher: Logits of the same shape; takes no gradient.
        temperature: Above 0; larger is softer.
        dim: The dimension of the labels. All other dimensions together are the positions.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes differ, or the temperature is not positive.
    """
    same_shape(student, teacher, "logits")
    check_temperature(temperature)
    mine, theirs = widened(student) / temperature, widened(teacher.detach()) / temperature
    yes = theirs.sigmoid() * (functional.logsigmoid(theirs) - functional.logsigmoid(mine))
    no = (-theirs).sigmoid() * (functional.logsigmoid(-theirs) - functional.logsigmoid(-mine))
    positions = max(mine.numel() // max(mine.shape[dim] if mine.dim() else 1, 1), 1)
    return (yes + no).sum() * (temperature**2 / positions)
