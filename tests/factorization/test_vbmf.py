"""Variational Bayes: the analytic solution against the minimum of the free energy that it solves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dwindle.factorization import evbmf_rank
from dwindle.factorization.vbmf import evbmf_noise, evbmf_objective, evbmf_threshold, tau_lower


def least_free_energy(value: float, rows: int, columns: int, noise: float) -> float:
    """Twice the free energy of one component (its null solution has 0), minimized by brute force.

    Over means and variances of both factors' posteriors and the variances of their priors: the variational problem
    itself (JMLR 14, equations 9 to 13), without any of the paper's solution.
    """

    def energy(logs: np.ndarray) -> float:
        a, b, var_a, var_b, prior_a, prior_b = np.exp(np.clip(logs, -60, 60))
        return (
            columns * math.log(prior_a / var_a)
            + rows * math.log(prior_b / var_b)
            + (a**2 + columns * var_a) / prior_a
            + (b**2 + rows * var_b) / prior_b
            - (rows + columns)
            + ((a**2 + columns * var_a) * (b**2 + rows * var_b) - 2 * a * b * value) / noise
        )

    best = math.inf
    size = math.log(value) / 2
    for start in (size, size - 1.0):
        first = np.array([start, start, math.log(noise / value), math.log(noise / value), 0.0, 0.0])
        found = minimize(energy, first, method="L-BFGS-B", bounds=[(-40, 20)] * 6, options={"maxiter": 3000})
        best = min(best, float(found.fun))
    return best


@pytest.mark.parametrize(("rows", "columns"), [(10, 30), (20, 20)])
def test_threshold_and_objective_are_those_of_the_free_energy(rows: int, columns: int) -> None:
    noise = 0.5
    threshold = evbmf_threshold(rows, columns, noise)
    assert least_free_energy(threshold * 0.97, rows, columns, noise) > -1e-6
    assert least_free_energy(threshold * 1.05, rows, columns, noise) < -1e-3
    # what a component above the threshold adds to the objective is the depth of its minimum
    value = threshold * 1.5
    alpha, x = rows / columns, value**2 / (columns * noise)
    squares = torch.tensor([value**2], dtype=torch.float64)
    own = float(evbmf_objective(squares, rows, columns, torch.tensor(noise, dtype=torch.float64))) * rows
    gain = own - (x - math.log(x))
    assert columns * gain == pytest.approx(least_free_energy(value, rows, columns, noise), rel=1e-3)
    assert alpha <= 1


def test_tau_is_the_zero_of_its_equation() -> None:
    def phi(z: float) -> float:
        return math.log(z + 1) / z - 0.5

    for alpha in (0.05, 0.3, 1.0):
        tau = tau_lower(alpha)
        assert phi(tau) + phi(tau / alpha) == pytest.approx(0, abs=1e-10)
        assert tau == pytest.approx(2.5129 * math.sqrt(alpha), rel=0.1)  # the paper's approximation
    assert tau_lower(1.0) == pytest.approx(2.5129, rel=1e-4)  # where it is exact


@pytest.mark.parametrize(("rank", "noise"), [(0, 1.0), (3, 0.1), (6, 0.5)])
def test_planted_rank_is_found(rank: int, noise: float) -> None:
    generator = np.random.default_rng(rank)
    matrix = noise * generator.standard_normal((40, 90))
    matrix += generator.standard_normal((40, rank)) @ generator.standard_normal((rank, 90))
    assert evbmf_rank(torch.from_numpy(matrix)) == rank
    assert evbmf_rank(torch.from_numpy(matrix.T)) == rank
    squares = torch.linalg.svdvals(torch.from_numpy(matrix)).square()
    assert evbmf_noise(squares, 40, 90) == pytest.approx(noise**2, rel=0.1)


def test_exactly_low_rank_and_nothing() -> None:
    generator = np.random.default_rng(0)
    exact = generator.standard_normal((12, 4)) @ generator.standard_normal((4, 20))
    assert evbmf_rank(torch.from_numpy(exact)) == 4
    assert evbmf_rank(torch.zeros(5, 6)) == 0
