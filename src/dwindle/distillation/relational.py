"""Relational distillation: distances and angles among the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dwindle.distillation.checks import same_batch, samples

__all__ = ["relation_angles", "relation_distances"]


def relation_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the distances between samples, each divided by the mean distance of its own model.

    ``mean over pairs i != j of huber(d_ij / mean(d) of the student - the same of the teacher)``. Park et al.,
    "Relational Knowledge Distillation" (https://arxiv.org/abs/1904.05068).

    Args:
        student: ``(samples, ...)``, at least 2 samples; what belongs to one sample is taken as one vector.
        teacher: As many samples, any shape else; takes no gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The numbers of samples differ, or there is only one.
    """
    same_batch(student, teacher, least=2)
    mine, theirs = _relative_distances(samples(student)), _relative_distances(samples(teacher.detach()))
    return functional.smooth_l1_loss(mine, theirs)


def relation_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the angles that each three samples make.

    ``mean over triplets of distinct i, j, k of huber(cos of the student's angle at j - that of the teacher)``. Park et
    al., "Relational Knowledge Distillation" (https://arxiv.org/abs/1904.05068).

    Args:
        student: ``(samples, ...)``, at least 3 samples; memory grows with their third power.
        teacher: As many samples, any shape else; takes no gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The numbers of samples differ, or there are fewer than 3.
    """
    same_batch(student, teacher, least=3)
    mine, theirs = _cosines(samples(student)), _cosines(samples(teacher.detach()))
    count = student.shape[0]
    other = ~torch.eye(count, dtype=torch.bool, device=student.device)
    distinct = other[:, :, None] & other[:, None, :] & other[None, :, :]
    return functional.smooth_l1_loss(mine[distinct], theirs[distinct])


def _relative_distances(vectors: Tensor) -> Tensor:
    """Distances of all pairs, over their mean; 0 everywhere when all samples are equal."""
    distances = torch.pdist(vectors)
    return distances / distances.mean().clamp_min(torch.finfo(vectors.dtype).tiny)


def _cosines(vectors: Tensor) -> Tensor:
    """``(j, i, k)``: the cosine of the angle at sample j between the ways to i and to k.

    From products of the centred vectors, which need no differences of all pairs.
    """
    centred = vectors - vectors.mean(0, keepdim=True)
    products = centred @ centred.T
    own = products.diagonal()
    # <x_i - x_j, x_k - x_j> for all j, i, k
    inner = products[None] - products[:, :, None] - products[:, None, :] + own[:, None, None]
    squared = inner.diagonal(dim1=1, dim2=2)  # |x_i - x_j|**2 for all j, i
    floor = torch.finfo(vectors.dtype).eps * own.detach().mean() + torch.finfo(vectors.dtype).tiny
    lengths = squared.clamp_min(floor).sqrt()
    return inner / (lengths[:, :, None] * lengths[:, None, :])
