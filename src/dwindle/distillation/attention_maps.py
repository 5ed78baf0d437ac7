"""Attention maps of transformers: what each token looks at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import widened

__all__ = ["attention_map_divergence", "attention_map_error"]


def attention_map_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of attention probabilities.

    ``mean over samples, heads and tokens of sum_j p_j * log(p_j / q_j)`` with the teacher's ``p`` and the student's
    ``q``, both as they stand behind the softmax. Wang et al., "MiniLM: Deep Self-Attention Distillation"
    (https://arxiv.org/abs/2002.10957).

    Args:
        student: Probabilities ``(batch, heads, tokens, tokens)`` or ``(batch, tokens, tokens)``.
        teacher: The same; where the numbers of heads differ both are averaged over their heads. No gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes do not fit.
    """
    student, teacher = _averaged(student, teacher)
    smallest = torch.finfo(student.dtype).tiny
    # Tokens that nobody may look at have probability 0 on both sides, and count nothing.
    each = torch.xlogy(teacher, teacher) - teacher * student.clamp_min(smallest).log()
    return each.sum(-1).mean()


def attention_map_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps, probabilities or scores before the softmax.

    Jiao et al., "TinyBERT" (https://arxiv.org/abs/1909.10351).

    Args:
        student: ``(batch, heads, tokens, tokens)`` or ``(batch, tokens, tokens)``.
        teacher: The same; where the numbers of heads differ both are averaged over their heads. No gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes do not fit.
    """
    return functional.mse_loss(*_averaged(student, teacher))


def _averaged(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = widened(student), widened(teacher.detach())
    if student.shape != teacher.shape:
        student, teacher = (own.mean(1) if own.dim() == 4 else own for own in (student, teacher))
    if student.shape != teacher.shape or student.dim() not in (3, 4):
        raise ConfigError(
            "attention maps are (batch, heads, tokens, tokens) or (batch, tokens, tokens) with the same tokens; "
            f"without heads they are {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return student, teacher
