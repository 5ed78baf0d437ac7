"""Low rank: layers as products of smaller ones, chosen, trained and counted.

The verb is :func:`dwindle.factorize`; here are its parts, as functions of tensors, and a compressor that learns ranks.
"""

from dwindle.factorization.allocation import Choices, Chosen, allocate
from dwindle.factorization.canonical import canonical
from dwindle.factorization.factors import factors, lost_shares, spectra
from dwindle.factorization.layers import (
    FactorizedConvolution,
    FactorizedLayer,
    FactorizedLinear,
    composed_kernel,
)
from dwindle.factorization.low_rank_training import LowRankTraining
from dwindle.factorization.ranks import rank_by_energy
from dwindle.factorization.result import FactorizationResult, LayerFactorization
from dwindle.factorization.spatial import spatial_svd
from dwindle.factorization.svd import balanced, truncated_svd, whitened_svd
from dwindle.factorization.tucker import tucker2
from dwindle.factorization.vbmf import evbmf_rank

__all__ = [
    "Choices",
    "Chosen",
    "FactorizationResult",
    "FactorizedConvolution",
    "FactorizedLayer",
    "FactorizedLinear",
    "LayerFactorization",
    "LowRankTraining",
    "allocate",
    "balanced",
    "canonical",
    "composed_kernel",
    "evbmf_rank",
    "factors",
    "lost_shares",
    "rank_by_energy",
    "spatial_svd",
    "spectra",
    "truncated_svd",
    "tucker2",
    "whitened_svd",
]
