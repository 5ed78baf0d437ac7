"""Weight-only quantization: small integers in groups for the weights of linear layers, activations in float."""

from dwindle.quantization.weight_only.awq import awq_scale
from dwindle.quantization.weight_only.gptq import gptq
from dwindle.quantization.weight_only.groups import GroupFormat
from dwindle.quantization.weight_only.hqq import hqq
from dwindle.quantization.weight_only.packed_weight import PackedWeight
from dwindle.quantization.weight_only.quantize_weights import (
    WeightRow,
    packed_weights,
    quantize_weights,
    replay,
    weight_rows,
)

__all__ = [
    "GroupFormat",
    "PackedWeight",
    "WeightRow",
    "awq_scale",
    "gptq",
    "hqq",
    "packed_weights",
    "quantize_weights",
    "replay",
    "weight_rows",
]
