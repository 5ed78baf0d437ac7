"""The proof of a chain: it computes what one layer with the product of its parts as weight computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dwindle.factorization.forms import Places
from dwindle.factorization.layers import FactorizedLayer

__all__ = ["TOLERANCE", "chain_difference"]

#: Largest difference of an output in float64, relative to the largest output.
TOLERANCE = 1e-9

_SAMPLES = 2


def chain_difference(old: nn.Module, chain: FactorizedLayer, places: Places, seed: int = 0) -> float:
    """Return the largest difference of the outputs on random inputs in float64, relative to the largest output.

    Args:
        old: The layer in whose place the chain is to stand: how it pads and steps.
        chain: The chain.
        places: Where the layer computes; large images are cut.
        seed: Of the inputs.
    """
    fresh = copy.deepcopy(chain).double()
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        getattr(fresh, kind).clear()
    device = fresh[0].weight.device
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight: Any = fresh.weight
        bias = fresh.bias
        if isinstance(old, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            sizes = [min(size, _enough(old, dim)) for dim, size in enumerate(places.before)]
            inputs = torch.randn(_SAMPLES, old.in_channels, *sizes, generator=generator, dtype=torch.float64)
            inputs = inputs.to(device)
            convolve: Any = old._conv_forward
            expected = convolve(inputs, weight, bias)
        else:
            matrix = weight.t() if chain.transposed else weight
            inputs = torch.randn(_SAMPLES + 1, matrix.shape[1], generator=generator, dtype=torch.float64)
            inputs = inputs.to(device)
            expected = functional.linear(inputs, matrix, bias)
        found = fresh(inputs)
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _enough(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, dim: int) -> int:
    """Return a size on which every place of the kernel and the edges are met."""
    span = (layer.kernel_size[dim] - 1) * layer.dilation[dim] + 1
    return 2 * span + 3 * layer.stride[dim]
