"""Repair after pruning: what can be recovered exactly is, zeros stay zero, and nothing gets worse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dwindle as dw
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.realize.repairing.collecting import collect
from dwindle.realize.repairing.correspondence import correspondence, cut_as
from dwindle.realize.repairing.layers import pair_layers, passes_of
from dwindle.realize.repairing.least_squares import Moments, ridge
from dwindle.realize.repairing.recording import record


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model.eval()


class Images(nn.Module):
    """Convolutions with and without bias, depthwise, a sum, norms, a linear head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 24, 3, stride=2)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = x + torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.last(x))
        return self.head(self.norm(x.mean((2, 3))))


def images(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, 1, 1) + 0.5 * torch.randn(count, 3, 10, 10)


def first_ones(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.arange(weight.shape[dim], 0, -1.0)


def error(model: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = original(x)
        return float((model(x) - wanted).square().sum() / wanted.square().sum())


def test_a_channel_that_another_one_doubles_is_recovered():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[8:] = 0.5 * layer.weight[:8]
            if layer.bias is not None:
                layer.bias[8:] = 0.5 * layer.bias[:8]
    original = copy.deepcopy(model)
    result = dw.prune(model, torch.randn(2, 6), ratio=0.5, importance=first_ones, verify=False)
    assert model[0].out_features == model[2].out_features == 8
    x, fresh = torch.randn(256, 6), torch.randn(32, 6)
    before = error(model, original, fresh)
    report = dw.repair(result, original, x)
    assert before > 0.05
    assert error(model, original, fresh) < 1e-4
    assert report.output_after < 1e-4 < report.output_before
    assert result.repair is report
    assert "repaired" in result.summary()


def test_prune_repairs_when_it_is_given_inputs():
    model = with_statistics(Images())
    original, plain, x = copy.deepcopy(model), copy.deepcopy(model), images(64)
    dw.prune(plain, x[:2], ratio=0.4, verify=False)
    result = dw.prune(model, x[:2], ratio=0.4, verify=False, repair=x)
    assert result.repair.accepted
    assert result.to_json()["repair"]["accepted"]
    assert error(model, original, x) < 0.3 * error(plain, original, x)
    again = copy.deepcopy(original)
    with pytest.raises(ConfigError, match="ended"):
        dw.prune(again, x[:2], ratio=0.4, verify=False, repair=[x])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), original.parameters(), strict=True))


def test_constants_of_removed_channels_go_into_biases_and_running_means():
    model = with_statistics(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 16, 4),
        )
    )
    with torch.no_grad():
        model[0].weight[4:] = 0  # four channels emit nothing but their bias
        model[0].bias[4:] = torch.tensor([1.0, 2.0, 0.5, 3.0])
    original, x = copy.deepcopy(model), torch.randn(64, 3, 6, 6)
    dw.prune(model, x[:2], ratio=0.0, ratios={"0": 0.5}, importance=first_ones, verify=False)
    assert model[0].out_channels == 4
    weight, mean = model[2].weight.clone(), model[3].running_mean.clone()
    assert error(model, original, x) > 0.01
    report = dw.repair(model, original, x, parts=["biases"])
    assert error(model, original, x) < 1e-6
    assert torch.equal(model[2].weight, weight)
    removed = original[2].weight.sum((2, 3))[:, 4:] @ original[0].bias[4:].detach()
    torch.testing.assert_close(model[3].running_mean, mean - removed.detach(), rtol=1e-3, atol=1e-3)
    assert {layer.name: layer.repaired for layer in report.layers}["2.weight"]
    assert not {layer.name: layer.repaired for layer in report.layers}["0.weight"]  # lacked nothing


def test_structured_pruning_of_a_convolutional_network():
    model = with_statistics(Images())
    original = copy.deepcopy(model)
    dw.prune(model, images(2), ratio=0.4, verify=False)
    state = {name: tuple(held.shape) for name, held in model.state_dict().items()}
    held_out = images(64)
    before = error(model, original, held_out)
    model.train()
    parameters = list(model.parameters())
    report = dw.repair(model, original, images(128))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.training
    assert {name: tuple(held.shape) for name, held in model.state_dict().items()} == state
    model.eval()
    assert error(model, original, held_out) < 0.3 * before
    assert all(layer.error_after <= layer.error_before for layer in report.layers)
    assert report.inputs == (6, 2)
    assert "head.weight" in report.summary()
    assert report.to_json()["layers"][0]["name"] == "first.weight"


@pytest.mark.parametrize("attached", [True, False])
def test_unstructured_pruning_keeps_its_zeros(attached):
    model = with_statistics(Images())
    original = copy.deepcopy(model)
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    pruner = dw.pruning.LevelPruner(model, config)
    _, masks = pruner.compress()
    hidden = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if not attached:
        pruner.detach()
    held_out = images(64)
    before = error(model, original, held_out)
    dw.repair(model, original, images(128))
    assert error(model, original, held_out) < 0.5 * before
    for module, own in masks.items():
        gone = own["weight"] == 0
        assert int(gone.sum()) > 0
        values = dict(model.named_parameters())[f"{module}.weight"]
        if attached:
            assert torch.equal(values[gone], hidden[f"{module}.weight"][gone])
            assert bool((model.get_submodule(module).weight[gone] == 0).all())
        else:
            assert bool((values[gone] == 0).all())


def test_one_masked_layer_is_the_constrained_ridge_solution():
    layer = nn.Linear(6, 4).double()
    model, original = nn.Sequential(layer), copy.deepcopy(nn.Sequential(layer))
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    with torch.no_grad():
        layer.weight *= keep
        layer.bias += 1.0
    x = torch.randn(60, 6, dtype=torch.float64)
    x[:, 3] = x[:, 0] + 0.1 * x[:, 3]
    start, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    report = dw.repair(model, original, x)
    fitted = torch.cat([part for number, part in enumerate(x.split(15)) if number != 3])
    features = torch.cat([fitted, torch.ones(len(fitted), 1, dtype=torch.float64)], 1)[None]
    residual = (original(fitted) - (fitted @ start.t() + bias)).detach()[None]
    support = torch.cat([keep, torch.ones(4, 1, dtype=torch.bool)], 1).t()[None]
    wanted = ridge(Moments.of(features, residual, residual), report.layers[0].strength, support)[0].t()
    torch.testing.assert_close(layer.weight.detach(), start + wanted[:, :6])
    torch.testing.assert_close(layer.bias.detach(), bias + wanted[:, 6])


class Encoder(nn.Module):
    """One post-norm encoder block, its attention written out."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, 32), nn.Linear(32, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, self.heads, self.head_width).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = self.first(x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1)))
        return self.second(self.outer(torch.relu(self.inner(x))) + x)


def test_transformer_heads_and_feed_forward():
    model = nn.Sequential(Encoder(), Encoder()).eval()
    original, mixing = copy.deepcopy(model), torch.randn(16, 16)
    dw.prune(model, torch.randn(2, 6, 16), ratio=0.5, axes=["heads", "feed_forward"], verify=False)
    held_out = torch.randn(32, 6, 16) @ mixing
    before = error(model, original, held_out)
    report = dw.repair(model, original, torch.randn(128, 6, 16) @ mixing)
    assert before > 0.01
    assert error(model, original, held_out) < 0.8 * before
    assert "0.out.weight" in [layer.name for layer in report.layers if layer.repaired]


def test_branches_aim_at_the_sum_of_the_original():
    model = nn.Sequential(nn.Linear(4, 12), Residual(), nn.Linear(12, 3)).eval()
    original, x = copy.deepcopy(model), torch.randn(64, 4)
    with torch.no_grad():
        model[0].bias += 1.0  # an error in the stream that the branch alone would not see
    recording = record(original, (x,), {})
    assert recording.places["1.outer.weight"].sums == {0}
    assert not any(place.sums for name, place in recording.places.items() if name != "1.outer.weight")
    layers, _ = pair_layers(
        model,
        original,
        (recording, recording),
        correspondence(model, original),
        {"weights", "biases", "norms"},
    )
    outer = next(layer for layer in layers if layer.place.name == "1.outer.weight")
    sums: dict[str, Moments] = {}
    collect(model, original, [outer], ((x,), {}), sums)
    with torch.no_grad():
        lacking = original[1](original[0](x)) - model[1](model[0](x))
    moments = sums["1.outer.weight"]
    torch.testing.assert_close(moments.square[0], lacking.double().square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross[0, -1], lacking.double().sum(0), rtol=1e-4, atol=1e-4)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


def test_removed_blocks_and_two_prunings_compose():
    model = nn.Sequential(
        nn.Linear(4, 12), nn.Sequential(*(Residual() for _ in range(4))), nn.Linear(12, 3)
    ).eval()
    original, x = copy.deepcopy(model), torch.randn(96, 5, 4)
    dw.prune(model, x[:2], ratio=0.5, axes=["block"], verify=False)
    dw.prune(model, x[:2], ratio=0.25, verify=False)
    dw.prune(model, x[:2], ratio=0.25, verify=False)
    link, sources = correspondence(model, original), dict(original.named_parameters())
    assert len(model[1]) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, cut_as(sources[link.source(name)], name, link)), name
    before = error(model, original, x)
    dw.repair(model, original, x)
    assert error(model, original, x) < 0.7 * before


def test_a_pass_that_makes_held_out_outputs_worse_is_taken_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    original = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight.mul_(0.98)

        # the last layer makes up for something that the repair will undo: fitted to the original it is far off
        for parameter in original[4].parameters():
            parameter.add_(5.0)
    original[4].register_forward_hook(
        lambda module, args, output: output - 5.0 * (args[0].sum(-1, keepdim=True) + 1)
    )
    before = {name: held.clone() for name, held in model.state_dict().items()}
    report = dw.repair(model, original, torch.randn(64, 4))
    assert any("1 of 3 passes" in note and "taken back" in note for note in report.notes)
    last = [layer for layer in report.layers if layer.name.startswith("4.")]
    assert last
    assert not any(layer.repaired for layer in last)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("4.weight", "4.bias"))
    assert report.output_after < report.output_before
    # where nothing else can be repaired, nothing is
    with torch.no_grad():
        for name, held in model.state_dict().items():
            held.copy_(before[name])
            if not name.startswith("4."):
                original.state_dict()[name].copy_(held)
    report = dw.repair(model, original, torch.randn(64, 4), passes=1)
    assert not report.accepted
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_weights_that_something_else_uses_are_left():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.relu(self.inner(self.words(x))), self.words.weight)

    model = Tied().eval()
    original = copy.deepcopy(model)
    with torch.no_grad():
        model.inner.weight[:, :2] = 0
    words = model.words.weight.clone()
    report = dw.repair(model, original, [torch.randint(0, 11, (16, 6)) for _ in range(8)])
    assert torch.equal(model.words.weight, words)
    assert "words.weight" in report.left
    assert report.output_after < report.output_before


def test_errors_come_before_any_change():
    model = with_statistics(Images())
    original, x = copy.deepcopy(model), images(32)
    dw.prune(model, x[:2], ratio=0.3, verify=False)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    spoiled = x.clone()
    spoiled[20, 0, 0, 0] = float("nan")
    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken.last.bias[:] = float("inf")
    for wrong in (
        lambda: dw.repair(model, model, x),
        lambda: dw.repair(model, "original", x),
        lambda: dw.repair(model, original, x, parts=["everything"]),
        lambda: dw.repair(model, original, x, passes=0),
        lambda: dw.repair(model, original, x.split(8), batches=9),
        lambda: dw.repair(model, original, [x]),
        lambda: dw.repair(model, original, 3),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(DwindleError, match="NaN"):
        dw.repair(model, original, spoiled)
    with pytest.raises(DwindleError, match="not finite"):
        dw.repair(model, broken, x)
    other = copy.deepcopy(original)
    dw.prune(other, x[:2], ratio=0.2, verify=False)
    with pytest.raises(ConfigError, match="otherwise"):
        dw.repair(model, other, x)
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_passes_are_as_many_as_wanted_or_as_memory_needs():
    from dwindle.realize.repairing.layers import Layer
    from dwindle.realize.repairing.recording import Place

    layers = [
        Layer(
            Place(str(n), None, None, 1, "linear", 1, 9, 4, False, False),
            str(n),
            None,
            None,
            None,
            True,
            True,
        )
        for n in range(10)
    ]
    for count in (1, 3, 10, 20):
        groups = passes_of(layers, count, 1 << 20)
        assert len(groups) == min(count, 10)
        assert [layer for group in groups for layer in group] == layers
    own = 2 * 8 * layers[0].elements
    assert [len(group) for group in passes_of(layers, 1, 3 * own)] == [3, 3, 3, 1]
