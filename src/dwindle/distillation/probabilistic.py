"""Probabilistic knowledge transfer: how probable each sample is as another one's neighbour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.distillation.checks import same_batch, samples

__all__ = ["neighbour_probabilities"]


def neighbour_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the probabilities with which samples choose each other as neighbours (PKT).

    ``mean over i of sum over j != i of p_ij * log(p_ij / q_ij)``, where ``p_ij`` is ``K(x_i, x_j)`` over its sum over
    ``j != i``, with the kernel ``K(a, b) = (cos(a, b) + 1) / 2``; ``p`` of the teacher, ``q`` of the student. Passalis
    and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer"
    (https://arxiv.org/abs/1803.10837).

    Args:
        student: ``(samples, ...)``, at least 3 samples.
        teacher: As many samples, any shape else; takes no gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The numbers of samples differ, or there are fewer than 3.
    """
    same_batch(student, teacher, least=3)
    p, q = _probabilities(samples(teacher.detach())), _probabilities(samples(student))
    return (p * (p / q).log()).sum(1).mean()


def _probabilities(vectors: Tensor) -> Tensor:
    """``(samples, samples - 1)``: the diagonal is left out."""
    count = vectors.shape[0]
    unit = functional.normalize(vectors, dim=1)
    other = ~torch.eye(count, dtype=torch.bool, device=vectors.device)
    kernel = ((unit @ unit.T + 1) / 2)[other].reshape(count, count - 1)
    kernel = kernel.clamp_min(torch.finfo(vectors.dtype).eps)  # opposite vectors
    return kernel / kernel.sum(1, keepdim=True)
