"""The weights of each chain, and how much of a layer its ranks keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwindle.factorization.canonical import canonical
from dwindle.factorization.spatial import spatial_matrix, spatial_svd
from dwindle.factorization.svd import balanced, energies, truncated_svd, whitened_svd
from dwindle.factorization.tucker import core_energies, mode_energies, tucker2, unfolded

__all__ = ["factors", "lost_shares", "matrices", "spectra"]


def factors(
    method: str, kernel: Tensor, ranks: Sequence[int], covariance: Tensor | None = None
) -> list[Tensor]:
    """Return the weights of the chain's parts, first to last, ``[out, in, ...]`` each.

    Args:
        method: The method.
        kernel: ``[out, in, ...]``.
        ranks: As :func:`dwindle.factorization.forms.full_ranks` orders them.
        covariance: Second moments of the columns that the matrix ``[out, in * places]`` is multiplied with; for
            ``svd`` only.
    """
    ones = (1,) * (kernel.dim() - 2)
    rank = ranks[0]
    if method == "svd":
        matrix = kernel.flatten(1)
        left, right = (
            truncated_svd(matrix, rank) if covariance is None else whitened_svd(matrix, covariance, rank)
        )
        return [right.reshape(rank, *kernel.shape[1:]), left.reshape(*left.shape, *ones)]
    if method == "spatial":
        return list(spatial_svd(kernel, rank))
    if method == "tucker":
        return _tucker(kernel, (ranks[0], ranks[1]), ones)
    outputs, inputs, *middle = canonical(kernel, rank)
    chain = [inputs.t().reshape(rank, -1, *ones)]
    for dim, factor in enumerate(middle):
        shape = [1] * len(ones)
        shape[dim] = -1
        chain.append(factor.t().reshape(rank, 1, *shape))
    return [*chain, outputs.reshape(*outputs.shape, *ones)]


def _tucker(kernel: Tensor, ranks: tuple[int, int], ones: tuple[int, ...]) -> list[Tensor]:
    """Return the three weights, the singular values of the outer ones' products with the core split evenly."""
    outputs, core, inputs = tucker2(kernel, ranks)
    left, scale = balanced(outputs, unfolded(core, 0))
    core = scale.reshape(core.shape)
    right, scale = balanced(inputs, unfolded(core, 1))
    core = scale.reshape(core.shape[1], core.shape[0], *core.shape[2:]).movedim(0, 1)
    return [
        right.t().reshape(*right.t().shape, *ones),
        core.contiguous(),
        left.reshape(*left.shape, *ones),
    ]


def matrices(method: str, kernel: Tensor) -> list[Tensor]:
    """Return the matrices whose ranks a method chooses (none for CP)."""
    if method == "svd":
        return [kernel.flatten(1)]
    if method == "spatial":
        return [spatial_matrix(kernel)]
    if method == "tucker":
        return [unfolded(kernel, 0), unfolded(kernel, 1)]
    return []


def spectra(method: str, kernel: Tensor, covariance: Tensor | None = None) -> list[Tensor]:
    """Return the energies of each rank that a method chooses, largest first (none for CP).

    Args:
        method: The method.
        kernel: ``[out, in, ...]``.
        covariance: As for :func:`factors`; for ``svd`` only.
    """
    if method == "svd":
        return [energies(kernel.flatten(1), covariance)]
    if method == "tucker":
        return [mode_energies(kernel, 0), mode_energies(kernel, 1)]
    return [energies(matrix) for matrix in matrices(method, kernel)]


def lost_shares(method: str, kernel: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Return the share of a layer's energy that is lost at each rank from 1 on (for Tucker-2: each pair).

    For Tucker-2 that of the truncated HOSVD, of which HOOI loses no more.

    Args:
        method: ``"svd"``, ``"tucker"`` or another method of this room.
        kernel: The weight, outputs first.
        covariance: Second moments of the inputs, for what is lost of the layer's outputs and not of its weight.

    Returns:
        ``[ranks]``, or ``[out ranks, in ranks]``; between 0 and 1.
    """
    if method == "tucker":
        core = core_energies(kernel)
        kept = core.cumsum(0).cumsum(1)
    else:
        (spectrum,) = spectra(method, kernel, covariance)
        kept = spectrum.cumsum(0)
    whole = kept.flatten()[-1]
    if float(whole) <= 0:
        return torch.zeros_like(kept)
    return (1 - kept / whole).clamp(min=0)
