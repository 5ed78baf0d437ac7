"""Padding counts neither in ranges nor in means; corrections that do not gain are left out."""

import pytest
import torch
from torch import nn

from dwindle.quantization import quantization_parameters, quantize
from dwindle.quantization.padding import padding_mask, real_tokens


class Tagger(nn.Module):
    """Every token by itself."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.second(torch.tanh(self.first(self.embedding(input_ids))))


def padded():
    torch.manual_seed(0)
    model = Tagger().eval()
    with torch.no_grad():
        model.embedding.weight[0] = 50.0  # the padding token
    tokens, mask = torch.randint(1, 20, (6, 7)), torch.ones(6, 7, dtype=torch.int64)
    tokens[::2, 4:], mask[::2, 4:] = 0, 0
    return model, {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("correction", [False, True, "running", "fast", "sequential"])
def test_padded_data_quantize_like_the_same_data_without_padding(correction):
    model, batch = padded()
    real = batch["input_ids"][batch["attention_mask"].bool()][None]
    options = {"observer": "minmax", "bias_correction": correction}
    one = quantize(model, [batch], **options)
    other = quantize(model, [{"input_ids": real}], **options)
    for first, second in zip(quantization_parameters(one), quantization_parameters(other), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
    counted = quantize(model, [batch], padding=None, **options)
    assert quantization_parameters(counted)[0][0] > 5 * quantization_parameters(one)[0][0]


def test_masks_that_mean_something_else_are_passed_over():
    assert padding_mask({"attention_mask": torch.ones(2, 3)}) is None
    assert padding_mask({"attention_mask": torch.ones(2, 3, 3).tril()}) is None
    assert padding_mask({"attention_mask": torch.tensor([[0, 0], [1, 1]])}) is None
    assert padding_mask({"other": torch.tensor([[0, 1]])}) is None
    real = padding_mask({"attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])})
    assert real_tokens(torch.zeros(2, 3, 5), real).shape == (4, 5)
    for shape in ((2, 3), (2, 5, 3), (2, 3, 3, 4)):  # heads and tokens of one number cannot be told apart
        assert real_tokens(torch.zeros(shape), real).shape == shape


def test_a_correction_that_harms_what_was_kept_apart_is_left_out():
    """The data that correct are nothing like the data that judge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    four = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int3"}]
    data = [torch.randn(4, 6) + 4, torch.randn(4, 6) + 4, torch.randn(200, 6) - 4]
    corrected = quantize(model, data, config_list=four, bias_correction="running")
    checked = quantize(model, data, config_list=four, bias_correction=True)
    with torch.no_grad():
        errors = [float((q(data[-1]) - model(data[-1])).square().sum()) for q in (corrected, checked)]
    plain = quantize(model, data, config_list=four, bias_correction=False)
    assert errors[1] < errors[0]
    assert torch.equal(checked[0].bias, plain[0].bias)
