"""Tucker-2: a convolution as 1x1, a smaller one, and 1x1 (Kim et al., https://arxiv.org/abs/1511.06530)."""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.config.errors import require

__all__ = ["core_energies", "mode_energies", "tucker2", "unfolded"]


def unfolded(kernel: Tensor, mode: int) -> Tensor:
    """Return a tensor as a matrix with one row for each index of a mode."""
    return kernel.movedim(mode, 0).reshape(kernel.shape[mode], -1)


def mode_energies(kernel: Tensor, mode: int) -> Tensor:
    """Return the squared singular values of an unfolding, largest first, one for each index of the mode."""
    matrix = unfolded(kernel, mode)
    return torch.linalg.eigvalsh(matrix @ matrix.t()).flip(0).clamp(min=0)


def core_energies(kernel: Tensor) -> Tensor:
    """Return the energy in each entry of the HOSVD's core, summed over places of the kernel.

    The sum of the first ``[out rank, in rank]`` entries is exactly what the truncated HOSVD of these ranks keeps of
    ``||kernel||**2``; HOOI keeps no less.

    Args:
        kernel: ``[out, in, ...]``.

    Returns:
        ``[out, in]``.
    """
    directions = []
    for mode in (0, 1):
        matrix = unfolded(kernel, mode)
        directions.append(torch.linalg.eigh(matrix @ matrix.t())[1].flip(1))
    core = torch.einsum("oi...,oa,ib->ab...", kernel, *directions)
    return core.square().flatten(2).sum(2) if core.dim() > 2 else core.square()


def tucker2(kernel: Tensor, ranks: tuple[int, int], iterations: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Tucker decomposition along output and input channels: HOSVD, then HOOI (tensorly).

    Args:
        kernel: ``[out, in, ...]``.
        ranks: Of outputs and of inputs.
        iterations: Of HOOI, at most.

    Returns:
        ``outputs`` ``[out, out rank]``, ``core`` ``[out rank, in rank, ...]`` and ``inputs`` ``[in, in rank]``; the
        outer two have orthonormal columns.

    Raises:
        MissingDependencyError: tensorly is not installed.
    """
    decomposition = require("tensorly.decomposition", "factorization")
    backend = require("tensorly.backend", "factorization")
    with backend.backend_context("numpy", local_threadsafe=True):
        (core, (outputs, inputs)), _ = decomposition.partial_tucker(
            kernel.detach().cpu().double().numpy(),
            rank=list(ranks),
            modes=[0, 1],
            n_iter_max=iterations,
            tol=1e-6,
            random_state=0,
        )
    found = (torch.from_numpy(part.copy()).to(kernel) for part in (outputs, core, inputs))
    first, middle, last = found
    return first, middle, last
