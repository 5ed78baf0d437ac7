"""The decompositions against NumPy, against brute force, and on tensors that are of low rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dwindle.config.errors import DwindleError
from dwindle.factorization import (
    balanced,
    canonical,
    factors,
    lost_shares,
    spatial_svd,
    truncated_svd,
    tucker2,
)
from dwindle.factorization.canonical import cancellation, composed
from dwindle.factorization.svd import covariance_root, energies, output_energy, whitened_svd


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(columns: int, samples: int, seed: int = 1) -> Tensor:
    rows = noise(samples, columns, seed=seed) * torch.logspace(0, 2, columns, dtype=torch.float64)
    return rows.t() @ rows / samples


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
def test_truncation_is_the_nearest_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = noise(*shape)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    for rank in (1, 3, 5):
        left, right = truncated_svd(matrix, rank)
        error = torch.linalg.vector_norm(matrix - left @ right)
        assert float(error) == pytest.approx(
            np.sqrt((values[rank:] ** 2).sum()), abs=1e-10
        )  # Eckart and Young
        torch.testing.assert_close(left.t() @ left, right @ right.t())  # evenly split
    np.testing.assert_allclose(energies(matrix).numpy(), values**2, rtol=1e-10)


def test_balancing_keeps_the_product() -> None:
    left, right = noise(6, 4), 100 * noise(4, 9, seed=2)
    first, second = balanced(left, right)
    torch.testing.assert_close(first @ second, left @ right)
    torch.testing.assert_close(first.t() @ first, second @ second.t())
    wide = balanced(noise(2, 3), noise(3, 5, seed=3))  # a rank above the rows
    assert wide[0].shape == (2, 3)
    torch.testing.assert_close(wide[0] @ wide[1], noise(2, 3) @ noise(3, 5, seed=3))


def least_by_alternation(matrix: Tensor, covariance: Tensor, rank: int) -> float:
    """The least output error that alternating least squares finds from several starts (no SVD in it)."""
    best = float("inf")
    for seed in range(4):
        right = noise(rank, matrix.shape[1], seed=10 + seed)
        for _ in range(300):
            gram = right @ covariance @ right.t()
            left = matrix @ covariance @ right.t() @ torch.linalg.inv(gram)
            right = torch.linalg.inv(left.t() @ left) @ left.t() @ matrix
        best = min(best, output_energy(matrix - left @ right, covariance))
    return best


@pytest.mark.parametrize("rank", [1, 3])
def test_whitening_gives_the_least_output_error(rank: int) -> None:
    matrix, covariance = noise(6, 8), covariance_of(8, 40)
    left, right = whitened_svd(matrix, covariance, rank)
    error = output_energy(matrix - left @ right, covariance)
    assert error == pytest.approx(least_by_alternation(matrix, covariance, rank), rel=1e-6)
    plain = truncated_svd(matrix, rank)
    assert error < 0.8 * output_energy(matrix - plain[0] @ plain[1], covariance)
    assert error == pytest.approx(float(energies(matrix, covariance)[rank:].sum()), rel=1e-9)
    # SVD-LLM's own form: the truncation of W L times the inverse of the Cholesky factor
    lower = np.linalg.cholesky(covariance.numpy())
    u, s, v = np.linalg.svd(matrix.numpy() @ lower)
    published = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(lower)
    np.testing.assert_allclose((left @ right).numpy(), published, atol=1e-9)


def test_whitening_takes_data_that_do_not_span_the_inputs() -> None:
    matrix, covariance = noise(6, 8), covariance_of(8, 3)  # rank 3: no Cholesky factor, no inverse
    root = covariance_root(covariance)
    torch.testing.assert_close(root @ root.t(), covariance)
    left, right = whitened_svd(matrix, covariance, 3)
    assert output_energy(matrix - left @ right, covariance) < 1e-9 * output_energy(matrix, covariance)


def test_tucker_finds_what_is_of_low_rank_and_never_loses_more_than_the_truncated_hosvd() -> None:
    kernel = torch.einsum("ab...,oa,ib->oi...", noise(3, 2, 3, 3), noise(9, 3, seed=1), noise(7, 2, seed=2))
    outputs, core, inputs = tucker2(kernel, (3, 2))
    torch.testing.assert_close(torch.einsum("ab...,oa,ib->oi...", core, outputs, inputs), kernel)
    torch.testing.assert_close(outputs.t() @ outputs, torch.eye(3, dtype=torch.float64))
    assert float(lost_shares("tucker", kernel)[2, 1]) < 1e-12

    kernel = noise(8, 6, 3, 3, seed=5)
    u = np.linalg.svd(kernel.numpy().reshape(8, -1))[0]
    v = np.linalg.svd(kernel.numpy().transpose(1, 0, 2, 3).reshape(6, -1))[0]
    for ranks in ((4, 3), (2, 5), (8, 6)):
        projected = np.einsum("oi...,oa,ib->ab...", kernel.numpy(), u[:, : ranks[0]], v[:, : ranks[1]])
        share = 1 - (projected**2).sum() / float(kernel.square().sum())
        assert float(lost_shares("tucker", kernel)[ranks[0] - 1, ranks[1] - 1]) == pytest.approx(
            share, abs=1e-12
        )
        outputs, core, inputs = tucker2(kernel, ranks)
        left = kernel - torch.einsum("ab...,oa,ib->oi...", core, outputs, inputs)
        assert float(left.square().sum() / kernel.square().sum()) <= share + 1e-12


def test_canonical_finds_components_and_refuses_those_that_cancel() -> None:
    known = [noise(6, 2), noise(5, 2, seed=1), noise(3, 2, seed=2), noise(3, 2, seed=3)]
    kernel = composed(known)
    np.testing.assert_allclose(
        kernel.numpy(), np.einsum("ar,br,cr,dr->abcd", *(own.numpy() for own in known))
    )
    found = canonical(kernel, 2)
    torch.testing.assert_close(composed(found), kernel, atol=1e-5, rtol=1e-4)
    norms = [torch.linalg.vector_norm(own, dim=0) for own in found]
    assert all(torch.allclose(own, norms[0]) for own in norms)

    # rank 3, and as near as one likes to tensors of rank 2, whose components then grow without bound
    a, b = torch.eye(2, dtype=torch.float64)
    border = sum(torch.einsum("i,j,k->ijk", *own) for own in ((a, a, b), (a, b, a), (b, a, a)))
    found = canonical(border, 2, iterations=400)
    assert cancellation(found, float(torch.linalg.vector_norm(border))) <= 10
    assert float(torch.linalg.vector_norm(composed(found) - border)) < 0.9 * 3**0.5


def test_nothing_is_better_than_components_that_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(canonical.__globals__, "MOST_CANCELLATION", 0.0)
    with pytest.raises(DwindleError, match="cancel each other"):
        canonical(noise(4, 4, 3), 2, iterations=5)


def test_spatial_pair_is_exact_at_its_rank() -> None:
    vertical, horizontal = noise(2, 5, 3, 1), noise(6, 2, 1, 3, seed=1)
    kernel = torch.einsum("rihx,orxw->oihw", vertical, horizontal)
    first, second = spatial_svd(kernel, 2)
    torch.testing.assert_close(torch.einsum("rihx,orxw->oihw", first, second), kernel)
    assert float(lost_shares("spatial", kernel)[1]) < 1e-12 < float(lost_shares("spatial", kernel)[0])


def test_factors_at_full_rank_lose_nothing() -> None:
    kernel = noise(4, 3, 3, 3)
    first, second = factors("svd", kernel, (4,), covariance_of(27, 60))
    torch.testing.assert_close(torch.einsum("or...,ri...->oi...", second, first), kernel)
    inner, core, outer = factors("tucker", kernel, (4, 3))
    product = torch.einsum("oaxy,abhw,bixy->oihw", outer, core, inner)
    torch.testing.assert_close(product, kernel)
