"""Blocks against brute force, and channel axes against what the modules compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dwindle.config import Align, Granularity, Target, aligned_mask
from dwindle.config.errors import ConfigError

WEIGHT = Target("layer", "weight")


def brute_force(values: np.ndarray, kernel: list[int], reduce) -> np.ndarray:
    """One value a block, by slicing."""
    grid = [size // block for size, block in zip(values.shape, kernel, strict=True)]
    result = np.empty(grid)
    for index in itertools.product(*map(range, grid)):
        place = tuple(slice(i * block, (i + 1) * block) for i, block in zip(index, kernel, strict=True))
        result[index] = reduce(values[place])
    return result


# NNI's test_scaling: a tensor [2, 3, 4] with every padding, here with the kernel that each must come to
@pytest.mark.parametrize(
    ("value", "kernel"),
    [
        (([1], "front", 1), [1, 1, 1]),
        (([1], "front", -1), [2, 3, 1]),
        (([1], "back", 1), [1, 1, 1]),
        (([1], "back", -1), [1, 3, 4]),
        (([-1], "front", 1), [1, 1, 4]),
        (([-1], "back", 1), [2, 1, 1]),
        (([2], "front", 1), [1, 1, 2]),
        (([3, 2], "front", 1), [1, 3, 2]),
        (([2, 3], "back", -1), [2, 3, 4]),
        (([3, 2], "front", -1), [2, 3, 2]),
        ([-1, 1], [1, 3, 1]),
        ([2, 3, 4], [2, 3, 4]),
    ],
)
def test_block_lists_like_scaling_of_nni(value, kernel):
    tensor = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    blocks = Granularity.parse(value, module_type=nn.Linear, target=WEIGHT)
    small = blocks.reduce(tensor, "mean")
    np.testing.assert_allclose(small.detach(), brute_force(tensor.detach().numpy(), kernel, np.mean))
    full = blocks.expand(small, tensor.shape)
    assert full.shape == tensor.shape
    assert full.requires_grad
    np.testing.assert_allclose(blocks.reduce(full, "max").detach(), small.detach())


@given(
    grid=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4),
    op=st.sampled_from([("sum", np.sum), ("mean", np.mean), ("max", np.max), ("min", np.min)]),
)
@settings(max_examples=60, deadline=None)
def test_any_blocks_equal_brute_force(grid, op):
    kernel = [block for _, block in grid]
    tensor = torch.randn([count * block for count, block in grid], dtype=torch.float64)
    blocks = Granularity.parse(kernel, module_type=nn.Linear, target=WEIGHT)
    small = blocks.reduce(tensor, op[0])
    np.testing.assert_allclose(small, brute_force(tensor.numpy(), kernel, op[1]), rtol=1e-12)
    assert tuple(small.shape) == blocks.block_shape(tensor.shape)
    assert blocks.block_count(tensor.shape) == small.numel()
    full = blocks.expand(small, tensor.shape)
    for op_again in ("max", "min"):  # constant on each block
        assert torch.equal(blocks.reduce(full, op_again), small)


def test_norm_is_euclidean():
    weight = torch.randn(4, 3, 2, 2)
    channels = Granularity.parse("out_channel", module_type=nn.Conv2d, target=WEIGHT)
    expected = np.sqrt((weight.double().numpy() ** 2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(channels.reduce(weight, "norm"), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"'summ' is not one of .*did you mean 'sum'"):
        channels.reduce(weight, "summ")


def masked_channel(module: nn.Module, granularity: str, channel: int) -> None:
    """Zero one channel of the module's weight."""
    blocks = Granularity.of_module(granularity, module, WEIGHT)
    weight = module.weight
    mask = torch.ones(blocks.block_shape(weight.shape))
    mask[channel] = 0
    with torch.no_grad():
        weight.mul_(blocks.expand(mask, weight.shape))


CONVOLUTIONS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "transposed 3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "linear": lambda: nn.Linear(4, 6),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_an_output_channel_is_what_the_module_computes_for_it(make):
    module = make()
    spatial = {"1d": (7,), "2d": (7, 7), "3d": (5, 5, 5)}.get(type(module).__name__[-2:], ())
    inputs = torch.randn(2, 4, *spatial)
    before = module(inputs)
    gone = before.shape[1] - 2
    masked_channel(module, "out_channel", gone)
    after = module(inputs)
    bias = module.bias[gone].expand_as(after[:, gone])
    assert torch.equal(after[:, gone], bias)
    others = [index for index in range(before.shape[1]) if index != gone]
    torch.testing.assert_close(after[:, others], before[:, others])


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_an_input_channel_is_what_reads_it(make):
    module = make()
    spatial = {"1d": (7,), "2d": (7, 7), "3d": (5, 5, 5)}.get(type(module).__name__[-2:], ())
    inputs = torch.randn(2, 4, *spatial)
    without = inputs.clone()
    without[:, 2] = 0
    expected = module(without)
    masked_channel(module, "in_channel", 2)
    torch.testing.assert_close(module(inputs), expected)


def test_features_of_embeddings_are_their_output_channels():
    for module in (nn.Embedding(10, 4), nn.EmbeddingBag(10, 4)):
        masked_channel(module, "out_channel", 3)
        tokens = torch.tensor([[1, 2], [3, 4]])
        output = module(tokens)
        assert (output[..., 3] == 0).all()
        assert (output[..., :3] != 0).all()


def test_conv1d_of_hugging_face_is_a_transposed_linear():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = pytorch_utils.Conv1D(6, 4)  # out, in
    masked_channel(module, "out_channel", 5)
    output = module(torch.randn(2, 3, 4))
    assert torch.equal(output[..., 5], module.bias[5].expand(2, 3))
    assert Granularity.of_module("2:4", module, WEIGHT).axis == 0


def test_channels_of_vectors_and_scalars():
    norm = nn.BatchNorm2d(5)
    for name in ("out_channel", "in_channel", "per_channel"):
        blocks = Granularity.of_module(name, norm, WEIGHT)
        assert torch.equal(blocks.reduce(norm.weight * 2), norm.weight * 2)
    scalar = Granularity.parse("out_channel", module_type=nn.Module, target=WEIGHT, dimensions=0)
    assert scalar.reduce(torch.tensor(3.0)).item() == 3
    assert scalar.expand(torch.tensor(3.0), ()).item() == 3


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Conv2d(3, 3, 1), (2, 3, 5, 5), 1),
        (nn.BatchNorm1d(3), (2, 3, 7), 1),
        (nn.Linear(3, 3), (2, 7, 3), 2),
        (nn.LayerNorm(3), (2, 7, 3), 2),
        (nn.ReLU(), (2, 3, 5, 5), 1),
    ],
)
def test_channels_of_activations(module, shape, axis):
    blocks = Granularity.of_module("default", module, Target("x", "_output_0"), default="per_channel")
    value = torch.randn(shape)
    others = [dim for dim in range(len(shape)) if dim != axis]
    torch.testing.assert_close(blocks.reduce(value, "sum"), value.sum(others))
    mask = blocks.expand(torch.tensor([1.0, 0.0, 1.0]), shape)
    assert (mask.select(axis, 1) == 0).all()
    assert mask.sum() == mask.numel() * 2 / 3


def test_whole_tensor_and_single_elements():
    value = torch.randn(3, 4)
    whole = Granularity.parse("per_tensor", module_type=nn.Linear, target=WEIGHT)
    assert whole.reduce(value, "max").shape == ()
    assert torch.equal(whole.expand(torch.tensor(2.0), (3, 4)), torch.full((3, 4), 2.0))
    for name in (None, "element"):
        single = Granularity.parse(name, module_type=nn.Linear, target=WEIGHT)
        assert torch.equal(single.reduce(value), value)
        assert torch.equal(single.expand(value, value.shape), value)


def test_compact_broadcasts_to_the_same_as_expand():
    weight = torch.randn(4, 6, 3, 3)
    for value in ("out_channel", "in_channel", "per_tensor", None, [2, 3, 1, 1]):
        blocks = Granularity.parse(value, module_type=nn.Conv2d, target=WEIGHT, dimensions=4)
        small = blocks.reduce(weight, "mean")
        expanded = blocks.expand(small, weight.shape)
        assert torch.equal(blocks.compact(small, weight.shape).expand(weight.shape), expanded)


def test_n_of_m():
    blocks = Granularity.parse("2:4", module_type=nn.Conv2d, target=WEIGHT, dimensions=4)
    assert (blocks.keep, blocks.window, blocks.axis) == (2, 4, 1)
    blocks.check((8, 16, 3, 3), "conv.weight")
    with pytest.raises(ConfigError, match=r"conv\.weight: granularity 2:4 needs a multiple of 4"):
        blocks.check((8, 3, 3, 3), "conv.weight")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("outchannel", "did you mean 'out_channel'"),
        ("4:4", "not a granularity"),
        ("0:4", "not a granularity"),
        ([0, 4], "whole numbers above 0"),
        ([2.5], "whole numbers above 0"),
        ([True], "whole numbers above 0"),
        ([], "whole numbers above 0"),
        (([4], "middle", 1), "'front' or 'back'"),
        (([4], "front", 2), "1 or -1"),
    ],
)
def test_what_is_no_granularity(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Granularity.parse(value, module_type=nn.Linear, target=WEIGHT)
    assert "layer.weight" in str(caught.value)


def test_blocks_that_do_not_fit():
    with pytest.raises(ConfigError, match="do not divide"):
        Granularity.parse([4, 4], module_type=nn.Linear, target=WEIGHT).reduce(torch.ones(6, 8))
    with pytest.raises(ConfigError, match="more dimensions"):
        Granularity.parse([1, 1, 1], module_type=nn.Linear, target=WEIGHT).reduce(torch.ones(6, 8))


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_bias_of_a_removed_output_channel_goes_with_it(make):
    from dwindle.config.target_rules import follower_of

    module = make()
    blocks = Granularity.of_module("out_channel", module, WEIGHT)
    keep = torch.ones(blocks.block_shape(module.weight.shape))
    keep[[0, 3]] = 0
    align = follower_of(module, "bias", {"weight", "bias"})
    assert isinstance(align, Align)
    mask = aligned_mask(blocks.expand(keep, module.weight.shape), align, module)
    assert mask.shape == module.bias.shape
    assert torch.equal(mask, keep)


def test_aligned_mask_on_several_dimensions():
    mask = torch.zeros(2, 3, 4)
    mask[1, 2, 0] = 1
    kept = aligned_mask(mask, Align(target_name="weight", dims=(0, 1)), nn.LayerNorm((2, 3, 4)))
    assert kept.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert torch.equal(aligned_mask(mask, Align(dims=(0, 1, 2)), nn.LayerNorm((2, 3, 4))), mask)
