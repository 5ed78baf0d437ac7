"""CP: a convolution as 1x1, one-dimensional depthwise ones, and 1x1 (Lebedev et al., https://arxiv.org/abs/1412.6553).

The best approximation of a rank need not exist: components then grow without bound and cancel each other ("degeneracy",
Phan et al., https://arxiv.org/abs/2008.05441), and nothing can be trained afterwards. What was found is therefore only
accepted when its components are no larger than they need to be; otherwise it is found again with a penalty on them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dwindle.config.errors import DwindleError, require

__all__ = ["cancellation", "canonical", "composed"]

#: Norm of all components over that of the kernel, above which they cancel each other.
MOST_CANCELLATION = 10.0

#: Penalties on components, as a share of the mean energy of one, and starts, in the order in which they are tried.
_PENALTIES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


def composed(factors: Sequence[Tensor]) -> Tensor:
    """Return the tensor of CP factors ``[size, rank]``: the sum over ranks of the products of their columns."""
    result = factors[0]
    for factor in factors[1:]:
        result = result.unsqueeze(-2) * factor
    return result.sum(-1)


def cancellation(factors: Sequence[Tensor], norm: float) -> float:
    """Return the root of the summed squared norms of the components, over the norm of the tensor; 1 when orthogonal.

    Args:
        factors: ``[size, rank]``.
        norm: Of the tensor that they approximate.
    """
    squares = math.prod(factor.square().sum(0) for factor in factors)
    return float(torch.as_tensor(squares).sum().sqrt()) / max(norm, torch.finfo(torch.float64).tiny)


def canonical(kernel: Tensor, rank: int, iterations: int = 200) -> list[Tensor]:
    """Return CP factors of a kernel whose components do not cancel each other (alternating least squares, tensorly).

    Args:
        kernel: Any tensor; dimensions of size 1 count too.
        rank: Number of components.
        iterations: Of the least squares, at most.

    Returns:
        One ``[size, rank]`` for each dimension, components with equal norms in all of them.

    Raises:
        DwindleError: Components cancel each other however they are penalized.
        MissingDependencyError: tensorly is not installed.
    """
    norm = float(torch.linalg.vector_norm(kernel))
    best: list[Tensor] | None = None
    least = math.inf
    for penalty in _PENALTIES:
        for start in ("svd", "random"):
            factors = _least_squares(kernel, rank, iterations, start, penalty * norm**2 / rank)
            if factors is None or cancellation(factors, norm) > MOST_CANCELLATION:
                continue
            error = float(torch.linalg.vector_norm(kernel - composed(factors)))
            if error < least:
                best, least = factors, error
        if best is not None and least < norm:
            return best
    raise DwindleError(
        f"no CP decomposition of rank {rank} whose components do not cancel each other; try a smaller rank or 'tucker'"
    )


def _least_squares(
    kernel: Tensor, rank: int, iterations: int, start: str, penalty: float
) -> list[Tensor] | None:
    """Return evenly scaled factors; None when the least squares failed or did not stay finite."""
    decomposition = require("tensorly.decomposition", "factorization")
    backend = require("tensorly.backend", "factorization")
    try:
        with (
            backend.backend_context("numpy", local_threadsafe=True),
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # a rank above a dimension is nothing to warn of
            weights, found = decomposition.parafac(
                kernel.detach().cpu().double().numpy(),
                rank=rank,
                n_iter_max=iterations,
                init=start,
                tol=1e-9,
                l2_reg=penalty,
                random_state=0,
            )
    except np.linalg.LinAlgError:
        return None
    factors = [torch.from_numpy(np.array(own)).to(kernel) for own in found]
    factors[0] = factors[0] * torch.from_numpy(np.array(weights)).to(kernel)
    if not all(bool(torch.isfinite(own).all()) for own in factors):
        return None
    norms = torch.stack([torch.linalg.vector_norm(own, dim=0) for own in factors])
    whole = norms.prod(0) ** (1 / len(factors))
    return [
        own * torch.where(norm > 0, whole / norm.clamp(min=1e-300), 0)
        for own, norm in zip(factors, norms, strict=True)
    ]
