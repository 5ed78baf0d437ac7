"""Weights that are not plain: normed, parametrized, shared, computed, frozen, of other types."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from support.architectures.cases.composed import Composed, on_images, on_vectors, parameter
from support.architectures.example import Builder, Example


def _tower(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *layers, nn.ReLU(), nn.Linear(16, 3))


def weight_norm_by_hook() -> Example:
    return on_vectors(_tower(nn.utils.weight_norm(nn.Linear(16, 16))))


def weight_norm_parametrized() -> Example:
    return on_vectors(_tower(parametrizations.weight_norm(nn.Linear(16, 16))))


def weight_norm_of_convolutions() -> Example:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(16, 16, 3, groups=4)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.ConvTranspose2d(16, 8, 2), dim=1),
        nn.Conv2d(8, 4, 1),
    )
    return on_images(model)


def spectral_norm_by_hook() -> Example:
    return on_vectors(_tower(nn.utils.spectral_norm(nn.Linear(16, 16))))


def spectral_norm_parametrized() -> Example:
    return on_vectors(_tower(parametrizations.spectral_norm(nn.Linear(16, 16))))


class _Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class _Bounded(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * torch.tanh(weight / 2)


def parametrized_by_the_user() -> Example:
    layer = nn.Linear(16, 16)
    parametrize.register_parametrization(layer, "weight", _Bounded())
    return on_vectors(_tower(layer))


def parametrized_symmetric() -> Example:
    """Rows and columns of the weight are one axis, in an order that matters."""
    layer = nn.Linear(16, 16)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return on_vectors(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), layer, nn.Linear(16, 3)))


def low_rank() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(F.relu(F.linear(x, m.left @ m.right, m.shift)))

    return on_vectors(
        forward,
        6,
        left=parameter(16, 8),
        right=parameter(8, 6),
        shift=parameter(16),
        head=nn.Linear(16, 3),
    )


def low_rank_adapter() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head((m.frozen(x) + m.up(m.down(x)) * 0.5).relu())

    frozen = nn.Linear(16, 16).requires_grad_(False)
    return on_vectors(
        forward,
        6,
        first=nn.Linear(6, 16),
        frozen=frozen,
        down=nn.Linear(16, 4, bias=False),
        up=nn.Linear(4, 16, bias=False),
        head=nn.Linear(16, 3),
    )


def functional_parameters() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(F.linear(x, m.weight, m.bias), (m.width,), m.gain, m.shift)
        x = x.matmul(m.second.t()).addcmul(m.shift, m.gain)
        return torch.addmm(m.out_bias, x.relu(), m.out)

    return on_vectors(
        forward,
        6,
        width=16,
        weight=parameter(16, 6),
        bias=parameter(16),
        gain=parameter(16),
        shift=parameter(16),
        second=parameter(16, 16),
        out=parameter(16, 3),
        out_bias=parameter(3),
    )


def hypernetwork() -> Example:
    """One network writes the weights of another."""

    def forward(m: Any, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        code = m.code(task).relu()
        weight = m.write(code).view(-1, m.inner, m.lift.out_features)
        hidden = torch.bmm(weight, m.lift(x).unsqueeze(-1)).squeeze(-1)
        return m.head(hidden.relu())

    model = Composed(
        forward,
        inner=16,
        code=nn.Linear(4, 12),
        write=nn.Linear(12, 16 * 8),
        lift=nn.Linear(6, 8),
        head=nn.Linear(16, 3),
    )
    return Example(model, (torch.randn(2, 6), torch.randn(2, 4)))


def feature_wise_modulation() -> Example:
    def forward(m: Any, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        scale, shift = m.modulate(code).chunk(2, dim=-1)
        x = m.conv(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return m.head(x.relu())

    model = Composed(forward, conv=nn.Conv2d(3, 16, 3), modulate=nn.Linear(5, 32), head=nn.Conv2d(16, 4, 1))
    return Example(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 5)))


def one_layer_used_twice() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        return m.head(m.again(F.relu(m.again(x))) + x)

    return on_vectors(forward, 6, first=nn.Linear(6, 16), again=nn.Linear(16, 16), head=nn.Linear(16, 3))


def auto_encoder_with_tied_weights() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        code = torch.sigmoid(m.second(m.first(x).relu()))
        back = F.linear(code, m.second.weight.t(), m.back)
        return F.linear(back.relu(), m.first.weight.transpose(0, 1))

    return on_vectors(forward, 12, first=nn.Linear(12, 24), second=nn.Linear(24, 8), back=parameter(24))


def parameter_containers() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for weight in m.weights:
            x = torch.tanh(x @ weight)
        for name in ("one", "two"):
            x = x + m.shifts[name] * m.layers[name](x)
        return m.head(x)

    return on_vectors(
        forward,
        6,
        weights=nn.ParameterList([parameter(6, 16), parameter(16, 16)]),
        shifts=nn.ParameterDict({"one": parameter(16), "two": parameter(1)}),
        layers=nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)}),
        head=nn.Linear(16, 3),
    )


def frozen_parameters() -> Example:
    model = _tower(nn.Linear(16, 16), nn.BatchNorm1d(16))
    for held in list(model.parameters())[:4]:
        held.requires_grad_(False)
    return on_vectors(model)


def half_precision() -> Example:
    return Example(_tower(nn.Linear(16, 16)).half(), (torch.randn(2, 6).half(),))


def brain_float() -> Example:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return Example(model.bfloat16(), (torch.randn(2, 3, 8, 8).bfloat16(),))


def double_precision() -> Example:
    return Example(_tower(nn.Linear(16, 16), nn.LayerNorm(16)).double(), (torch.randn(2, 6).double(),))


def closure_constants() -> Example:
    """A tensor that belongs to no module is multiplied onto the channels."""
    gain = torch.rand(16)
    return on_vectors(
        lambda m, x: m.head(m.second(m.first(x)).relu() * gain.to(x.dtype)),
        6,
        first=nn.Linear(6, 12),
        second=nn.Linear(12, 16),
        head=nn.Linear(16, 3),
    )


def running_statistics_by_hand() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.first(x)
        if m.training:
            with torch.no_grad():
                m.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                m.count += 1
        return m.head((x - m.mean).relu())

    return on_vectors(
        forward,
        6,
        mean=torch.randn(16),
        count=torch.zeros((), dtype=torch.long),
        first=nn.Linear(6, 16),
        head=nn.Linear(16, 3),
    )


class _NamedLinear(nn.Linear):
    """A linear layer of the user's own, with numbers of its own."""

    def __init__(self, width: int, out: int, title: str) -> None:
        super().__init__(width, out)
        self.title, self.doubled = title, 2 * out
        self.gain = parameter(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def subclassed_linear() -> Example:
    return on_vectors(_tower(_NamedLinear(16, 16, "own")))


def prototypes_by_distance() -> Example:
    """Distances to learned points: a radial basis layer."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        near = torch.exp(-(torch.cdist(m.lift(x), m.centres) ** 2))
        return m.head(near)

    return on_vectors(forward, 6, lift=nn.Linear(6, 8), centres=parameter(16, 8), head=nn.Linear(16, 3))


def pairs_by_bilinear_forms() -> Example:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.pair(m.left(x), m.right(x)).relu())

    return on_vectors(
        forward,
        6,
        left=nn.Linear(6, 8),
        right=nn.Linear(6, 12),
        pair=nn.Bilinear(8, 12, 16),
        head=nn.Linear(16, 3),
    )


MODELS: dict[str, Builder] = {
    case.__name__: case
    for case in (
        weight_norm_by_hook, weight_norm_parametrized, weight_norm_of_convolutions, spectral_norm_by_hook,
        spectral_norm_parametrized, parametrized_by_the_user, parametrized_symmetric, low_rank, low_rank_adapter,
        functional_parameters, hypernetwork, feature_wise_modulation, one_layer_used_twice,
        auto_encoder_with_tied_weights, parameter_containers, frozen_parameters, half_precision, brain_float,
        double_precision, closure_constants, running_statistics_by_hand, subclassed_linear, prototypes_by_distance,
        pairs_by_bilinear_forms,
    )
}  # fmt: skip
