"""Attention transfer: where a layer's activations are strong, whatever channels they stand in."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import mean_over_samples, same_batch, widened
from dwindle.distillation.projection import pooled_to

__all__ = ["activation_attention", "attention_transfer"]


def activation_attention(activations: Tensor, power: float = 2.0) -> Tensor:
    """Sum the powers of the absolute activations over the channels.

    Args:
        activations: ``(batch, channels, *sizes)`` with four dimensions or more, or ``(batch, tokens, channels)``.
        power: Exponent; larger looks more at the strongest channel.

    Returns:
        ``(batch, *sizes)`` or ``(batch, tokens)``, at least in float32.
    """
    return widened(activations).abs().pow(power).sum(-1 if activations.dim() == 3 else 1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Compare the normalized attention maps of two layers.

    ``mean over samples of || Q_S / ||Q_S|| - Q_T / ||Q_T|| ||**2`` with the map ``Q = sum_c |A_c|**power`` as a
    vector. Zagoruyko and Komodakis, "Paying More Attention to Attention"
    (https://arxiv.org/abs/1612.03928, section 3.1; the square of its norm, as the authors train with).

    Args:
        student: See :func:`activation_attention`. The channels of the two need not agree.
        teacher: As many dimensions; where its map is larger or smaller, the larger one is pooled. No gradient.
        power: Exponent of the activations.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The dimensions or the numbers of samples do not fit, or there are no positions.
    """
    same_batch(student, teacher)
    if student.dim() != teacher.dim() or student.dim() < 3:
        raise ConfigError(
            "apply_method 'attention_transfer' compares maps (batch, channels, *sizes) or sequences (batch, tokens, "
            f"channels), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    mine, theirs = activation_attention(student, power), activation_attention(teacher.detach(), power)
    sizes = tuple(min(pair) for pair in zip(mine.shape[1:], theirs.shape[1:], strict=True))
    mine, theirs = (pooled_to(own[:, None], sizes).flatten(1) for own in (mine, theirs))
    difference = functional.normalize(mine, dim=1) - functional.normalize(theirs, dim=1)
    return mean_over_samples(difference.square())
