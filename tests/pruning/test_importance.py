"""Importance of weights against NumPy in float64 and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dwindle.config.errors import ConfigError
from dwindle.pruning.importance import IMPORTANCES, fpgm, l1, l2, random, row_distances


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_sums_over_all_other_dimensions(dim: int) -> None:
    weight = torch.randn(4, 5, 3, dtype=torch.float64)
    rows = np.moveaxis(weight.numpy(), dim, 0).reshape(weight.shape[dim], -1)
    np.testing.assert_allclose(l1(weight, dim), np.abs(rows).sum(1), rtol=1e-12)
    np.testing.assert_allclose(l2(weight, dim), (rows**2).sum(1), rtol=1e-12)
    distances = np.array([sum(np.linalg.norm(a - b) for b in rows) for a in rows])
    np.testing.assert_allclose(fpgm(weight, dim), distances, rtol=1e-12)


def test_elements() -> None:
    weight = torch.tensor([[-2.0, 1.0], [0.0, 3.0]])
    assert torch.equal(l1(weight, None), torch.tensor([[2.0, 1], [0, 3]]))
    assert torch.equal(l2(weight, None), torch.tensor([[4.0, 1], [0, 9]]))
    assert random(weight, None).shape == (2, 2)
    with pytest.raises(ConfigError, match="single elements"):
        fpgm(weight, None)


def test_distances_stay_exact_for_near_filters_far_from_zero() -> None:
    # a Gram matrix in float32 would give 0 or noise here
    matrix = 1000 + torch.tensor([[0.0, 0.001], [0.0, 0.0], [0.002, 0.0]], dtype=torch.float64)
    expected = [sum(float(np.linalg.norm(a - b)) for b in matrix.numpy()) for a in matrix.numpy()]
    np.testing.assert_allclose(row_distances(matrix), expected, rtol=1e-6)


def test_more_rows_than_one_block() -> None:
    matrix = torch.randn(1500, 2)
    expected = torch.cdist(matrix.double(), matrix.double(), compute_mode="donot_use_mm_for_euclid_dist").sum(
        1
    )
    torch.testing.assert_close(row_distances(matrix), expected, rtol=1e-9, atol=1e-9)


def test_random_repeats_with_a_generator() -> None:
    weight = torch.zeros(6, 2)
    first, second = (random(weight, 0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert set(IMPORTANCES) == {"l1", "l2", "fpgm", "random"}
