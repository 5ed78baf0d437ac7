"""Spatial SVD: a convolution as a vertical and a horizontal one (Jaderberg et al., https://arxiv.org/abs/1405.3866)."""

from __future__ import annotations

from torch import Tensor

from dwindle.factorization.svd import truncated_svd

__all__ = ["spatial_matrix", "spatial_svd"]


def spatial_matrix(kernel: Tensor) -> Tensor:
    """Return a kernel ``[out, in, height, width]`` as ``[out * width, in * height]``; its rank is that of the pair."""
    out, inputs, height, width = kernel.shape
    return kernel.permute(0, 3, 1, 2).reshape(out * width, inputs * height)


def spatial_svd(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest pair of a vertical and a horizontal convolution with so many channels between them.

    Args:
        kernel: ``[out, in, height, width]``.
        rank: Channels between them.

    Returns:
        Kernels ``[rank, in, height, 1]`` and ``[out, rank, 1, width]``.
    """
    out, inputs, height, width = kernel.shape
    left, right = truncated_svd(spatial_matrix(kernel), rank)
    vertical = right.reshape(rank, inputs, height, 1)
    horizontal = left.reshape(out, width, rank).permute(0, 2, 1).reshape(out, rank, 1, width)
    return vertical.contiguous(), horizontal.contiguous()
