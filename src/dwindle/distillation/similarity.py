"""Similarity-preserving distillation: which samples of a batch activate a layer alike."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dwindle.distillation.checks import same_batch, samples

__all__ = ["similarity"]


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the matrices of products among the samples of a batch.

    ``|| G_T - G_S ||_F**2 / b**2`` where ``G`` is ``Q Q^t`` with rows of length 1, and ``Q`` the activations of the
    ``b`` samples as rows. Tung and Mori, "Similarity-Preserving Knowledge Distillation"
    (https://arxiv.org/abs/1907.09682).

    Args:
        student: ``(samples, ...)``.
        teacher: As many samples, any shape else; takes no gradient.

    Returns:
        0-d tensor.

    Raises:
        ConfigError: The numbers of samples differ.
    """
    same_batch(student, teacher)
    return functional.mse_loss(_products(samples(student)), _products(samples(teacher.detach())))


def _products(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors @ vectors.T, dim=1)
