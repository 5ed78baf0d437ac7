"""The best matrix of a rank: of the weights themselves (Eckart and Young), or of what they give on data.

For outputs ``W x`` of inputs with second moments ``C = E[x x']`` the error of ``W'`` is
``trace((W - W') C (W - W')')``, which is ``||(W - W') L||**2`` for any root ``C = L L'``. The best ``W'`` of rank r is
``U U' W`` with the first r left singular vectors U of ``W L``: the truncation of ``W L`` multiplied with the inverse of
L (whitening, as in SVD-LLM, https://arxiv.org/abs/2403.07378), but nothing is inverted, so that C may be singular.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "balanced",
    "covariance_root",
    "energies",
    "output_energy",
    "truncated_svd",
    "whitened_svd",
    "widened",
]

#: Weights with at most so many entries are worked on in float64.
_FLOAT64_ENTRIES = 1 << 24


def widened(weight: Tensor) -> Tensor:
    """Return a weight, without gradient, in float64 where that is affordable, else in float32 at least."""
    weight = weight.detach()
    if weight.numel() <= _FLOAT64_ENTRIES:
        return weight.double()
    return weight if weight.dtype.itemsize >= 4 else weight.float()


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest product of this rank (in the Frobenius and spectral norms; Eckart and Young 1936).

    Args:
        matrix: ``[rows, columns]``.
        rank: From 1 to the smaller of both.

    Returns:
        ``left`` ``[rows, rank]`` and ``right`` ``[rank, columns]``, each with the roots of the singular values.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def covariance_root(covariance: Tensor) -> Tensor:
    """Return a matrix L with ``L L' = C``: the Cholesky factor, or ``Q sqrt(D)`` of ``C = Q D Q'`` where C has none.

    Args:
        covariance: Symmetric, without negative eigenvalues but for rounding, ``[columns, columns]``.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not int(failed):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def whitened_svd(matrix: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the product of this rank whose outputs are nearest to the matrix's on the data.

    Args:
        matrix: ``[rows, columns]``.
        covariance: Second moments of the inputs, ``[columns, columns]``, on any scale.
        rank: From 1 to the smaller of both.

    Returns:
        ``left`` ``[rows, rank]`` and ``right`` ``[rank, columns]``, balanced.
    """
    directions = torch.linalg.svd(matrix @ covariance_root(covariance), full_matrices=False)[0][:, :rank]
    return balanced(directions, directions.t() @ matrix)


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product with its singular values split evenly: ``left' left = right right'``, diagonal.

    Args:
        left: ``[rows, rank]``.
        right: ``[rank, columns]``.
    """
    rank = left.shape[1]
    first, inner = torch.linalg.qr(left)
    second, outer = torch.linalg.qr(right.t())
    narrow_left, narrow_right = truncated_svd(inner @ outer.t(), min(rank, *inner.shape, *outer.shape))
    left, right = first @ narrow_left, narrow_right @ second.t()
    missing = rank - left.shape[1]  # more ranks than rows or columns: the rest is zero
    if missing:
        left = torch.cat([left, left.new_zeros(left.shape[0], missing)], 1)
        right = torch.cat([right, right.new_zeros(missing, right.shape[1])], 0)
    return left, right


def energies(matrix: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Return the squared singular values, largest first: what each further rank adds to the energy kept.

    Args:
        matrix: ``[rows, columns]``.
        covariance: Of the inputs: then those of the outputs on the data.

    Returns:
        As many as the smaller of both numbers.
    """
    seen = matrix if covariance is None else matrix @ covariance_root(covariance)
    return torch.linalg.svdvals(seen).square()


def output_energy(matrix: Tensor, covariance: Tensor) -> float:
    """Return ``trace(W C W')``, the mean energy of the outputs (or of the errors, for a difference of weights)."""
    return float(torch.einsum("rc,cd,rd->", matrix, covariance.to(matrix), matrix).clamp(min=0))
