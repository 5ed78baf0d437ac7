"""Free scales: whatever factors are chosen, the model computes the same; and what must not move does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwindle.quantization.free_scales import find_free_scales
from dwindle.quantization.scale_units import Units
from quantization.models import Encoder


class Gated(nn.Module):
    """RMS norm written by hand, grouped-query attention, a gated feed-forward part, residual sums."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.norm = nn.Parameter(torch.rand(16) + 0.5)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        h = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        batch, length, _ = h.shape
        q, k, v = (m(h).view(batch, length, -1, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 4, length, 4) for t in (k, v))
        attention = torch.softmax(q @ k.transpose(2, 3) * 0.5, -1) @ v
        x = x + self.o(attention.transpose(1, 2).reshape(batch, length, 16))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Convolutions(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, a transposed one, pooling, concatenation, a gate."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped, self.up = nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.squeeze, self.head = nn.Conv2d(8, 8, 1), nn.Linear(14 * 4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.leaky_relu(self.depthwise(x), 0.1)
        y = F.relu(self.grouped(y) * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1))) + x)
        z = F.max_pool2d(F.relu(self.up(y)), 2)
        return self.head(F.adaptive_avg_pool2d(torch.cat([z, y], 1), 2).flatten(1))


def convolutions():
    return Convolutions(), torch.randn(2, 3, 8, 8)


def gated():
    return Gated(), torch.randint(0, 20, (2, 6))


def encoder():
    return Encoder(), torch.randint(0, 50, (2, 6))


@pytest.mark.parametrize(
    ("make", "reading"),
    [
        (convolutions, {"depthwise", "grouped", "squeeze", "up", "head"}),
        (gated, {"q", "k", "v", "o", "down"}),
        (
            encoder,
            {f"layers.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.out_proj", "linear2")} | {"head"},
        ),
    ],
)
def test_any_factors_leave_the_function(make, reading):
    torch.manual_seed(0)
    model, x = make()
    model = model.double().eval()
    scales = find_free_scales(model, (x.double() if x.is_floating_point() else x,), {})
    assert {name.removesuffix(".weight") for name in scales.read} == reading
    factors = torch.rand(scales.count, dtype=torch.float64) * 5 + 0.1
    factors[0] = 1.0
    scaled = copy.deepcopy(model)
    changed = scales.apply(scaled, factors)
    assert changed
    x = x.double() if x.is_floating_point() else x
    first, second = model(x), scaled(x)
    if isinstance(first, dict):
        first, second = first["logits"], second["logits"]
    torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-11)
    for name, own in model.named_parameters():
        expected = own * changed.get(name, torch.ones(()).double())
        torch.testing.assert_close(scaled.get_parameter(name), expected, rtol=1e-12, atol=0)


def test_heads_of_grouped_queries_share_their_units():
    model, x = gated()
    scales = find_free_scales(model, (x,), {})
    made, read = scales.made["v.weight"].reshape(-1), scales.channels["o.weight"].reshape(4, 4)
    assert made.unique().numel() == 8
    assert torch.equal(read[0], made[:4])
    assert torch.equal(read[1], made[:4])
    assert torch.equal(read[3], made[4:])


@pytest.mark.parametrize(
    "between",
    [
        nn.GELU(),
        nn.ReLU6(),
        nn.Hardswish(),
        nn.Sigmoid(),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.Softmax(-1),
    ],
)
def test_what_notices_a_factor_is_left_alone(between):
    model = nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 3)).eval()
    assert find_free_scales(model, (torch.randn(2, 4),), {}).count == 1


def test_shared_and_masked_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.last(F.relu(self.second(F.relu(self.second(x)))))

    model = Shared().double()
    x = torch.randn(3, 6).double()
    scales = find_free_scales(model, (x,), {})
    factors = torch.rand(scales.count, dtype=torch.float64) + 0.5
    factors[0] = 1.0
    expected = model(x)
    scales.apply(model, factors)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(scales.channels["second.weight"], scales.made["first.weight"].reshape(-1))

    nn.utils.parametrizations.weight_norm(model.second)
    assert not any("second" in name for name in find_free_scales(model, (x,), {}).made)


def test_units():
    units = Units()
    own = units.new(6).reshape(2, 3)
    units.unite(own[0], own[1, :1])
    assert torch.equal(units.roots(own), torch.tensor([[1, 1, 1], [1, 5, 6]]))
    units.unite(own[1, 1], torch.tensor(0))
    assert units.frozen(own[1, 1])
    assert not units.frozen(own)
