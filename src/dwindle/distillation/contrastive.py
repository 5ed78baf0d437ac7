"""Contrastive distillation: a sample's features are told from those of all other samples of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.config.errors import ConfigError
from dwindle.distillation.checks import same_batch, widened
from dwindle.distillation.losses import check_temperature

__all__ = ["contrastive"]


def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE between student and teacher embeddings of a batch, in both directions.

    ``mean over i of -log softmax_j(<s_i, t_j> / T)[i] - log softmax_j(<s_j, t_i> / T)[i]`` with embeddings of length
    1. Tian, Krishnan and Isola, "Contrastive Representation Distillation" (https://arxiv.org/abs/1910.10699)
    contrasts the same pairs, of learned embeddings of both models; their
    negatives come from a memory bank that needs the numbers of the samples. Here they are the other samples of the
    batch (van den Oord et al., https://arxiv.org/abs/1807.03748), so nothing is asked of the data, and large batches
    are better.

    Args:
        student: Embeddings ``(samples, width)``, at least 2 samples; they are normalized here.
        teacher: Embeddings of the same shape. They take gradients where they have any: the embedding of the
            teacher's features is learned too.
        temperature: Above 0.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The shapes do not fit, or the temperature is not positive.
    """
    same_batch(student, teacher, least=2)
    check_temperature(temperature)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ConfigError(
            "apply_method 'contrastive' compares embeddings (samples, width), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    mine, theirs = (functional.normalize(widened(own), dim=1) for own in (student, teacher))
    products = mine @ theirs.T / temperature
    own = torch.arange(student.shape[0], device=student.device)
    return functional.cross_entropy(products, own) + functional.cross_entropy(products.T, own)
