"""Mixed precision: how many bits every layer gets, by curvature, by search, or by hand."""

from dwindle.quantization.mixed_precision.choose import choose_bits, manual_bits
from dwindle.quantization.mixed_precision.layer_bits import LayerBits
from dwindle.quantization.mixed_precision.result import MixedPrecision

__all__ = ["LayerBits", "MixedPrecision", "choose_bits", "manual_bits"]
