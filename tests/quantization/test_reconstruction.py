"""Learned rounding against NumPy references of its formulas, and what it brings."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.quantization import NumberFormat, compare, quantize
from dwindle.quantization.reconstruction import Reconstruction, reconstruction_loss
from dwindle.quantization.reconstruction_blocks import find_blocks, split_inputs
from dwindle.quantization.rounding import (
    annealed_beta,
    hard_weight,
    initial_variables,
    rectified_sigmoid,
    rounding_regularizer,
    soft_weight,
)
from quantization.models import Encoder, residual

INT4 = NumberFormat.parse("int4")
FOUR_BITS = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


def h(v):
    return np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)


def test_formulas():
    generator = np.random.default_rng(0)
    v, w = generator.normal(0, 2, (4, 6)), generator.normal(0, 1, (4, 6))
    scale = generator.uniform(0.05, 0.3, (4, 1))
    tensors = [torch.from_numpy(value) for value in (v, w, scale)]
    np.testing.assert_allclose(rectified_sigmoid(tensors[0]).numpy(), h(v), atol=1e-14)
    floor = np.floor(w / scale)
    soft = np.clip(floor + h(v), -7, 7) * scale
    got = soft_weight(torch.from_numpy(floor), tensors[0], tensors[2], INT4)
    np.testing.assert_allclose(got.numpy(), soft, atol=1e-14)
    hard = hard_weight(torch.from_numpy(floor), tensors[0], tensors[2], INT4)
    np.testing.assert_allclose(hard.numpy(), np.clip(floor + (h(v) >= 0.5), -7, 7) * scale, atol=1e-14)
    start = initial_variables(tensors[1], tensors[2])
    np.testing.assert_allclose(floor + h(start.numpy()), w / scale, atol=1e-12)
    for beta in (2.0, 7.5, 20.0):
        expected = (1 - np.abs(2 * h(v) - 1) ** beta).sum()
        assert float(rounding_regularizer(tensors[0], beta)) == pytest.approx(expected, rel=1e-12)
    assert [annealed_beta(step, 100, 0.2) for step in (0, 20, 60, 100)] == [20.0, 20.0, 11.0, 2.0]


def test_gradient_of_the_objective():
    """The paper's objective for one linear layer, its gradient written out by hand."""
    generator = np.random.default_rng(1)
    w, x, v = generator.normal(0, 1, (3, 5)), generator.normal(0, 1, (40, 5)), generator.normal(0, 1, (3, 5))
    scale, beta, weight = np.full((3, 1), 0.2), 6.0, 0.01
    floor = np.floor(w / scale)
    inside = (np.abs(v) < np.log(11)) & (floor + h(v) >= -7) & (floor + h(v) <= 7)
    s = 1 / (1 + np.exp(-v))
    slope = np.where(np.abs(v) < np.log(11), 1.2 * s * (1 - s), 0.0)
    difference = x @ (np.clip(floor + h(v), -7, 7) * scale).T - x @ w.T
    power = (x @ w.T).__pow__(2).mean()
    error = 2 * difference.T @ x / difference.size / power * 3 * scale * np.where(inside, slope, 0.0)
    undecided = -beta * np.abs(2 * h(v) - 1) ** (beta - 1) * np.sign(2 * h(v) - 1) * 2 * slope
    variables = torch.from_numpy(v).requires_grad_(True)
    soft = soft_weight(torch.from_numpy(floor), variables, torch.from_numpy(scale), INT4)
    data = torch.from_numpy(x)
    loss = reconstruction_loss(data @ soft.T, data @ torch.from_numpy(w).T)
    (loss + weight * rounding_regularizer(variables, beta)).backward()
    np.testing.assert_allclose(variables.grad.numpy(), error + weight * undecided, rtol=1e-9, atol=1e-12)


def test_close_to_the_best_of_all_roundings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    x = torch.randn(256, 3) @ torch.randn(3, 8) + 0.1 * torch.randn(256, 8)
    settings = {"config_list": FOUR_BITS, "bias_correction": False, "avoid_saturation": False}
    nearest = quantize(model, [x], **settings)
    learned = quantize(model, [x], rounding=Reconstruction(steps=250), **settings)
    scale = float(nearest._dwindle_quantization_weight_scale)
    w = model[0].weight.detach().double().numpy()[0]
    gram = (x.T @ x).double().numpy()

    def error(weight):
        return (weight - w) @ gram @ (weight - w)

    floor = np.floor(w / scale)
    every = (np.clip(floor + np.array(up), -7, 7) * scale for up in itertools.product((0, 1), repeat=8))
    best = min(error(weight) for weight in every)
    plain = error(np.clip(np.round(w / scale), -7, 7) * scale)
    found = error(learned[0].weight.detach().double().numpy()[0])
    assert best < plain
    assert found - best <= 0.3 * (plain - best)
    levels = learned[0].weight.detach().numpy() / scale
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)


@pytest.mark.parametrize("blocks", [False, True])
def test_four_bits_of_a_transformer(blocks):
    """On the mean over four models: how much one of them gains differs by 2 dB from one processor to the next."""
    gains = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = Encoder().eval()
        tokens = torch.randint(0, 50, (32, 6))
        plain = quantize(model, [tokens], config_list=FOUR_BITS)
        learned = quantize(
            model,
            [tokens],
            config_list=FOUR_BITS,
            rounding=Reconstruction(blocks=blocks, steps=200, batch_size=8, learning_rate=0.02),
        )
        results = learned._dwindle_quantization.reconstructed
        assert [result.path for result in results] == (
            ["layers.layers.0", "layers.layers.1", "head"]
            if blocks
            else [f"layers.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn", "linear1", "linear2")]
            + ["head"]
        )
        assert all(result.learned <= result.nearest for result in results)
        with torch.no_grad():
            expected = model(tokens)["logits"].numpy()
            before = compare(expected, plain(tokens)["logits"].numpy()).sqnr_db
            after = compare(expected, learned(tokens)["logits"].numpy()).sqnr_db
        gains.append(after - before)
        assert all(own.requires_grad for own in learned.parameters())
    assert sum(gains) / len(gains) > 2


def test_zeros_of_a_mask_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        mask = torch.rand(12, 16) < 0.5
        model[0].weight[mask] = 0.0
    quantized = quantize(
        model, [torch.randn(64, 16)], config_list=FOUR_BITS, rounding=Reconstruction(steps=50)
    )
    assert bool((quantized[0].weight[mask] == 0).all())


def test_data_are_split_by_samples():
    x, mask = torch.arange(5)[:, None], torch.ones(5, 1)
    parts = split_inputs([((x,), {"mask": mask})], 2)
    assert [len(args[0]) for args, _ in parts] == [2, 2, 1]
    assert [len(kwargs["mask"]) for _, kwargs in parts] == [2, 2, 1]
    assert len(split_inputs([((x, torch.ones(3)), {})], 2)) == 1


def test_blocks_of_a_convolutional_model():
    model, x = residual()
    quantized = quantize(model, [x])
    simulation = quantized._dwindle_quantization
    blocks = find_blocks(model, simulation, ((x,), {}), single_layers=True)
    assert [key.module for block in blocks for key in block.keys] == [key.module for key in simulation.slots]


def test_what_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="did you mean 'adaround'"):
        quantize(model, [torch.randn(4, 3)], rounding="adaraund")
    for bad in ({"steps": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}):
        with pytest.raises(ConfigError):
            Reconstruction(**bad)
    before = model.weight.detach().clone()
    with pytest.raises(DwindleError, match="not finite"):
        quantize(model, [torch.randn(4, 3) * 1e30], rounding=Reconstruction(steps=3))
    assert torch.equal(model.weight, before)
