"""Statistics of batch normalizations estimated anew: against NumPy, on changed models, with nothing else moved."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dwindle import pruning, realize, simulate
from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import TrainingQuantizer
from dwindle.training import adapt_normalization, compress
from dwindle.training.moments import Moments, moments_of

SIZES = (5, 9, 2, 8)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def batches(sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(sum(sizes), 2, 6, 6, generator=generator) * 2 + 1
    return list(whole.split(sizes))


def conv(layer: Any, x: np.ndarray) -> np.ndarray:
    """A 3x3 convolution in float64, written out."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    high, wide = x.shape[2] - 2, x.shape[3] - 2
    out = np.zeros((len(x), len(weight), high, wide))
    for i in range(3):
        for j in range(3):
            out += np.einsum("nchw,oc->nohw", x[:, :, i : i + high, j : j + wide], weight[:, :, i, j])
    return out + bias[:, None, None]


def normalized(norm: Any, x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    scale, shift = (own.detach().double().numpy()[:, None, None] for own in (norm.weight, norm.bias))
    return (x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + norm.eps) * scale + shift


def of_all(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([value.transpose(1, 0, 2, 3).reshape(value.shape[1], -1) for value in values], 1)
    return rows.mean(1), rows.var(1, ddof=1)


def of_batches(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    found = [of_all([value]) for value in values]
    return np.mean([mean for mean, _ in found], 0), np.mean([own for _, own in found], 0)


def moving(values: list[np.ndarray], norm: Any, weight: float) -> tuple[np.ndarray, np.ndarray]:
    mean, variance = (own.double().numpy().copy() for own in (norm.running_mean, norm.running_var))
    for value in values:
        new_mean, new_variance = of_all([value])
        mean, variance = mean + weight * (new_mean - mean), variance + weight * (new_variance - variance)
    return mean, variance


def reference(model: nn.Sequential, average: Any, one_by_one: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    def of(values: list[np.ndarray], norm: Any) -> tuple[np.ndarray, np.ndarray]:
        if average == "values":
            return of_all(values)
        return of_batches(values) if average == "batches" else moving(values, norm, average)

    first = [conv(model[0], batch.double().numpy()) for batch in batches()]
    found = of(first, model[1])

    def own(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if one_by_one:
            return found
        return value.mean((0, 2, 3)), value.var((0, 2, 3))

    hidden = [np.maximum(normalized(model[1], value, *own(value)), 0) for value in first]
    return [found, of([conv(model[3], value) for value in hidden], model[4])]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("average", ["values", "batches", 0.3])
def test_numpy_agrees(average: Any, one_by_one: bool) -> None:
    model = net()
    expected = reference(model, average, one_by_one)
    report = adapt_normalization(model, batches(), average=average, one_by_one=one_by_one)
    assert (report.layers, report.unreached, report.batches) == (("1", "4"), (), 4)
    for norm, (mean, variance) in zip((model[1], model[4]), expected, strict=True):
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=3e-6)
        assert int(norm.num_batches_tracked) == 4


def test_the_mean_of_batches_is_what_torch_takes() -> None:
    model, twin = net(), net()
    adapt_normalization(model, batches(), average="batches")
    twin[7].p = 0.0
    torch.optim.swa_utils.update_bn(batches(), twin)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(24,), (1,) * 24, (23, 1)])
def test_one_by_one_does_not_see_how_the_data_were_cut(sizes: tuple[int, ...]) -> None:
    model, twin = net(), net()
    adapt_normalization(model, batches(), one_by_one=True)
    adapt_normalization(twin, iter(batches(sizes)), one_by_one=True)
    for key, value in model.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, twin.state_dict()[key], rtol=1e-5, atol=1e-5)


def test_inference_sees_what_the_statistics_say() -> None:
    """What one_by_one promises: each normalization's input has exactly its mean and variance in evaluation."""
    model = net()
    adapt_normalization(model, batches(), one_by_one=True)
    seen: dict[int, list[np.ndarray]] = {1: [], 4: []}
    for index, values in seen.items():
        model[index].register_forward_pre_hook(
            lambda _, args, own=values: own.append(args[0].double().numpy())
        )
    model.eval()
    with torch.no_grad():
        for batch in batches((24,)):
            model(batch)
    for index, values in seen.items():
        mean, variance = of_all(values)
        np.testing.assert_allclose(model[index].running_mean.numpy(), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model[index].running_var.numpy(), variance, rtol=1e-5)


def everything(model: nn.Module) -> dict[str, Any]:
    own = {key: value.clone() for key, value in model.state_dict().items() if "running" not in key}
    return {key: value for key, value in own.items() if "num_batches" not in key}


def test_nothing_else_moves() -> None:
    model = net()
    model[1].eval()
    model[1].momentum = None
    model[0].weight.grad = torch.ones_like(model[0].weight)
    modes = [module.training for module in model.modules()]
    before, drawn = everything(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=6, shuffle=True)
    adapt_normalization(model, loader, batches=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (None, 0.1)
    assert model[0].weight.grad is not None
    assert model[3].weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in everything(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_and_cut_channels() -> None:
    """A masked model and the smaller one made of it get the same statistics where channels are left."""
    model = net().eval()
    pruner = pruning.L1NormPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=(batches()[0],)
    )
    pruner.compress()
    small = realize.realize(copy.deepcopy(model), example_inputs=(batches()[0],)).model
    own = dict(small.named_children())
    assert own["0"].out_channels == 3
    adapt_normalization(model, batches())
    adapt_normalization(small, batches())
    left = simulate.masks_as_nested(model)["0"]["bias"].bool()
    torch.testing.assert_close(model[1].running_mean[left], own["1"].running_mean)
    torch.testing.assert_close(model[4].running_mean, own["4"].running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[4].running_var, own["4"].running_var, rtol=1e-4, atol=1e-5)
    assert simulate.simulated_targets(model)


def test_quantizers_stay_as_they_are_and_round() -> None:
    plain = net()
    model = copy.deepcopy(plain)
    quantizer = TrainingQuantizer(model, calibration_data=batches(), bits=2, backend="layers")
    with compress(model, [quantizer]):
        ranges = {key: value for key, value in everything(model).items() if "dwindle" in key}
        assert ranges
        adapt_normalization(model, batches())
        after = everything(model)
        assert all(torch.equal(value, after[key]) for key, value in ranges.items())
    adapt_normalization(plain, batches())
    assert not torch.allclose(model[4].running_mean, plain[4].running_mean, rtol=1e-2)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, first: torch.Tensor, second: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.norm(input=first) + self.norm(second) * scale


def test_any_inputs_shared_layers_and_unreached_ones() -> None:
    one, other = torch.randn(6, 3), torch.randn(4, 3) + 3
    model = Pair()
    report = adapt_normalization(model, [{"first": one[:4], "second": other, "labels": torch.ones(4)}])
    assert (report.layers, report.unreached) == (("norm",), ("unused",))
    both = torch.cat([one[:4], other])
    torch.testing.assert_close(model.norm.running_mean, both.mean(0))
    torch.testing.assert_close(model.norm.running_var, both.var(0))
    assert report.moved["norm"] == pytest.approx(float(both.mean(0).abs().max()), rel=1e-4)
    assert torch.equal(model.unused.running_mean, torch.zeros(3))


def test_mistakes_and_failures_leave_the_model() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    bad = batches()
    bad[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(DwindleError, match="NaN or infinity came to the normalization 1"):
        adapt_normalization(model, bad)
    with pytest.raises(DwindleError, match="normalization 1"):
        adapt_normalization(model, bad, one_by_one=True)
    with pytest.raises(ConfigError, match="one_by_one=True"):
        adapt_normalization(Pair(), [(torch.ones(1, 3), torch.ones(1, 3))])
    with pytest.raises(ConfigError, match="did you mean 'values'"):
        adapt_normalization(model, batches(), average="value")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="above 0, up to 1"):
        adapt_normalization(model, batches(), average=1.5)
    with pytest.raises(ConfigError, match="'5' is no batch normalization"):
        adapt_normalization(model, batches(), op_names=["5"])
    with pytest.raises(ConfigError, match="no batch normalization"):
        adapt_normalization(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(ConfigError, match="gave no batch"):
        adapt_normalization(model, [])
    with pytest.raises(RuntimeError, match="expected input"):
        adapt_normalization(model, [torch.ones(2, 5, 6, 6)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    adapt_normalization(model, batches(), op_names=["4"])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 3), (2, 0, 5)])
def test_moments_do_not_lose_digits(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(size, 2, 3, generator=generator, dtype=torch.float64) + 1e6 for size in sizes if size
    ]
    found = Moments.nothing(2)
    for value in values:
        found = found.with_others(moments_of(value))
    rows = torch.cat(values).transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(1), rtol=1e-14)
    np.testing.assert_allclose(found.variance.numpy(), rows.var(1, ddof=1), rtol=1e-8)
    assert float(Moments.nothing(2).variance.max()) == 0
