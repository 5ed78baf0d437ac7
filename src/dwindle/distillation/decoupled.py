"""Decoupled distillation of logits: the target class and all others apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import same_shape, widened
from dwindle.distillation.losses import as_rows, check_temperature, divergence

__all__ = ["decoupled_divergence"]


def decoupled_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    dim: int = -1,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
    target: Tensor | None = None,
) -> Tensor:
    """Divergence of the target class against the rest, plus that among the rest, weighted apart (DKD).

    ``T**2 * mean of (alpha * KL(b_T || b_S) + beta * KL(r_T || r_S))``, where ``b`` is the pair (probability of the
    target, of all others) and ``r`` the distribution over the others alone. Zhao et al., "Decoupled Knowledge
    Distillation" (https://arxiv.org/abs/2203.08679).

    Args:
        student: Logits with at least 3 classes. Half precision is computed in float32.
        teacher: Logits of the same shape; takes no gradient.
        temperature: Above 0.
        dim: The dimension of the classes.
        target_weight: The paper's alpha.
        other_weight: The paper's beta; the paper uses 0.5 to 8, more for teachers that are surer.
        target: Labels of the positions (the logits' shape without ``dim``). None takes the teacher's first class:
            a compressor is not told the labels.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes differ, there are fewer than 3 classes, or the temperature is not positive.
    """
    same_shape(student, teacher, "logits")
    check_temperature(temperature)
    mine, theirs = as_rows(widened(student), dim), as_rows(widened(teacher.detach()), dim)
    if mine.shape[1] < 3:
        raise ConfigError(f"'dkd' tells a class from several others; there are {mine.shape[1]} classes")
    chosen = theirs.argmax(1) if target is None else target.reshape(-1)
    target_mask = functional.one_hot(chosen, mine.shape[1]).bool()
    pairs = [_target_and_rest(own / temperature, target_mask) for own in (mine, theirs)]
    binary = functional.kl_div(pairs[0], pairs[1], reduction="batchmean", log_target=True) * temperature**2
    others = [own[~target_mask].reshape(own.shape[0], -1) for own in (mine, theirs)]
    return target_weight * binary + other_weight * divergence(others[0], others[1], temperature)


def _target_and_rest(logits: Tensor, target_mask: Tensor) -> Tensor:
    """``(positions, 2)``: logarithms of the probability of the target and of all the others."""
    logarithms = functional.log_softmax(logits, 1)
    rest = logarithms.masked_fill(target_mask, -torch.inf).logsumexp(1)
    return torch.stack([logarithms[target_mask], rest], 1)
