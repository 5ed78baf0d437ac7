"""The rank that evidence supports: the analytic global solution of empirical variational Bayesian matrix factorization.

Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization" (JMLR 14, 2013); names follow the paper (theorem 2, corollaries 1 and 2, section 4). A matrix is seen
as one of low rank plus noise; singular values that noise alone would give are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["evbmf_noise", "evbmf_objective", "evbmf_rank", "evbmf_threshold", "tau_lower"]

#: Places at which the noise is tried before the best one is refined.
_GRID = 2000


def tau_lower(alpha: float) -> float:
    """Return the zero of ``phi(t) + phi(t / alpha)``, ``phi(z) = log(z + 1) / z - 1/2``, found by bisection.

    Args:
        alpha: Rows over columns, at most 1.
    """

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = (
        1e-12,
        3.0,
    )  # phi(z) is zero at 2.5129, and phi falls: the zero lies between there and alpha times there
    for _ in range(200):
        middle = (low + high) / 2
        if phi(middle) + phi(middle / alpha) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def evbmf_threshold(rows: int, columns: int, noise: float) -> float:
    """Return the singular value below which nothing is kept, for a known variance of the noise.

    Args:
        rows: The smaller number.
        columns: The larger number.
        noise: The variance of each entry's noise.
    """
    alpha = rows / columns
    tau = tau_lower(alpha)
    return math.sqrt(noise * columns * (1 + tau) * (1 + alpha / tau))


def evbmf_objective(squares: Tensor, rows: int, columns: int, noise: Tensor) -> Tensor:
    """Return the free energy (up to factor and constant) as a function of the noise's variance (equation 40).

    Args:
        squares: Squared singular values, ``[rows]``.
        rows: The smaller number.
        columns: The larger number.
        noise: Variances to try, any shape.
    """
    alpha = rows / columns
    tau = tau_lower(alpha)
    least = (1 + tau) * (1 + alpha / tau)
    x = squares / (columns * noise.unsqueeze(-1))
    value = x - x.log()
    above = x > least
    inner = torch.where(above, x, least)
    big = 0.5 * (inner - (1 + alpha) + ((inner - (1 + alpha)).square() - 4 * alpha).clamp(min=0).sqrt())
    gain = (big + 1).log() + alpha * (big / alpha + 1).log() - big
    return (value + torch.where(above, gain, 0)).sum(-1) / rows


def evbmf_noise(squares: Tensor, rows: int, columns: int) -> float:
    """Return the variance of the noise under which the free energy is least.

    Args:
        squares: Squared singular values, largest first, ``[rows]``, positive.
        rows: The smaller number.
        columns: The larger number.
    """
    alpha = rows / columns
    tau = tau_lower(alpha)
    least = (1 + tau) * (1 + alpha / tau)
    most_kept = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)
    upper = float(squares.sum()) / (rows * columns)
    tail = squares[most_kept:]
    lower = max(float(squares[most_kept]) / (columns * least), float(tail.mean()) / columns)
    lower = min(lower, upper)
    if lower <= 0 or upper <= lower * (1 + 1e-12):
        return upper
    low, high = math.log(lower), math.log(upper)
    for _ in range(
        4
    ):  # the objective has kinks and valleys: a fine grid, then finer ones round its best place
        places = torch.linspace(low, high, _GRID, dtype=torch.float64, device=squares.device)
        best = float(places[evbmf_objective(squares, rows, columns, places.exp()).argmin()])
        step = (high - low) / (_GRID - 1)
        low, high = max(best - step, math.log(lower)), min(best + step, math.log(upper))
    return math.exp(best)


def evbmf_rank(matrix: Tensor, noise: float | None = None) -> int:
    """Return how many singular values of a matrix are more than noise.

    Args:
        matrix: ``[rows, columns]``, either the larger.
        noise: The variance of the noise where it is known; None estimates it.

    Returns:
        0 when there is nothing but noise.
    """
    rows, columns = sorted(matrix.shape)
    squares = torch.linalg.svdvals(matrix.double()).square()
    if float(squares[0]) == 0:
        return 0
    floor = float(squares[0]) * torch.finfo(torch.float64).eps ** 2
    if noise is None:
        noise = evbmf_noise(squares.clamp(min=floor), rows, columns)
    return int((squares.sqrt() > evbmf_threshold(rows, columns, noise)).sum())
