"""What sits on a quantized tensor in training: rounding, and how its range is learned."""

from dwindle.quantization.quantizers.base import Quantizer

__all__ = ["Quantizer"]
