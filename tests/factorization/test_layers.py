"""Chains compute what one layer with their product as weight computes, whatever it pads and however it steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dwindle.factorization.factors import factors
from dwindle.factorization.forms import (
    LayerForm,
    Places,
    chain_elements,
    chain_macs,
    form_of,
    kernel_of,
    layer_macs,
    parts_of,
)
from dwindle.factorization.layers import FactorizedLayer, FactorizedLinear, make_layer, reads_seen
from dwindle.graph.macs import count_macs

CONVOLUTIONS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "strided": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}),
    "uneven": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (2, 1)}),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
}
RANKS = {"svd": (4,), "tucker": (4, 3), "cp": (4,), "spatial": (5,)}


def chain_for(layer: nn.Module, method: str, ranks: tuple[int, ...]) -> FactorizedLayer:
    weight: Any = layer.weight
    form = form_of(layer, weight)
    numbers = factors(method, kernel_of(form, weight.detach()), ranks)
    return make_layer(method, form, ranks, numbers, layer.bias, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", list(RANKS))
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_chain_is_one_convolution(name: str, method: str) -> None:
    torch.manual_seed(0)
    kind, options = CONVOLUTIONS[name]
    layer = kind(6, 8, **options).double()
    chain = chain_for(layer, method, RANKS[method])
    x = torch.randn(2, 6, 11, 10, dtype=torch.float64)
    expected = layer._conv_forward(x, chain.weight, layer.bias)
    torch.testing.assert_close(chain(x), expected, rtol=1e-10, atol=1e-12)
    for key in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        assert getattr(chain, key) == getattr(layer, key), key
    if name not in ("valid",):
        assert chain.padding == layer.padding
    assert chain.bias is layer.bias
    assert chain.ranks == RANKS[method]
    form, places = form_of(layer, layer.weight), Places(2, (11, 10), tuple(expected.shape[2:]))
    parts = parts_of(method, form, RANKS[method])
    assert chain_elements(parts, form) == sum(part.weight.numel() for part in chain)
    assert chain_macs(parts, form, [places]) == count_macs(chain, (x,))
    assert layer_macs(form, [places]) == count_macs(layer, (x,))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("method", ["svd", "tucker", "cp"])
def test_one_and_three_dimensions(method: str, dims: int) -> None:
    torch.manual_seed(0)
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dims](4, 5, 3, padding=1, stride=2).double()
    chain = chain_for(layer, method, {"svd": (3,), "tucker": (3, 2), "cp": (3,)}[method])
    x = torch.randn(2, 4, *[7] * dims, dtype=torch.float64)
    torch.testing.assert_close(chain(x), layer._conv_forward(x, chain.weight, layer.bias))


def test_linear_answers_like_a_linear_layer_and_its_product_has_the_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 7).double()
    chain = chain_for(layer, "svd", (3,))
    assert isinstance(chain, FactorizedLinear)
    assert (chain.in_features, chain.out_features, chain.weight.shape) == (9, 7, (7, 9))
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    with reads_seen() as seen:
        first = functional.linear(x, chain.weight, chain.bias)
        assert seen == {id(chain)}
    torch.testing.assert_close(chain(x), first)
    first.square().sum().backward()
    through_product = [part.weight.grad.clone() for part in chain]
    chain.zero_grad()
    chain(x).square().sum().backward()
    for part, gradient in zip(chain, through_product, strict=True):
        torch.testing.assert_close(part.weight.grad, gradient)
    assert "rank 3" in repr(chain)


def test_transposed_weight_of_a_conv1d() -> None:
    form = LayerForm(5, 6, transposed=True)
    weight = torch.randn(6, 5, dtype=torch.float64)
    chain = make_layer("svd", form, (5,), factors("svd", weight.t(), (5,)), None, weight)
    torch.testing.assert_close(chain.weight, weight)
    assert (chain.nx, chain.nf) == (6, 5)  # type: ignore[attr-defined]
