"""What sits on a quantized tensor in training: rounding, and how its range is learned."""

from dwindle.quantization.quantizers.base import Quantizer
from dwindle.quantization.quantizers.binary import (
    BinaryActivation,
    BinaryWeight,
    SignActivation,
    StepActivation,
)
from dwindle.quantization.quantizers.dorefa import (
    DorefaActivationQuantizer,
    DorefaWeightQuantizer,
    GradientQuantizer,
)
from dwindle.quantization.quantizers.learned_range import AsymmetricRangeQuantizer, SymmetricRangeQuantizer
from dwindle.quantization.quantizers.lsq import LsqPlusQuantizer, LsqQuantizer
from dwindle.quantization.quantizers.methods import METHODS, Method, make_quantizer
from dwindle.quantization.quantizers.moving_average import MovingAverageQuantizer
from dwindle.quantization.quantizers.pact import PactQuantizer
from dwindle.quantization.quantizers.rounding import Gradient, learned_round, round_to_levels
from dwindle.quantization.quantizers.tqt import TqtQuantizer

__all__ = [
    "METHODS",
    "AsymmetricRangeQuantizer",
    "BinaryActivation",
    "BinaryWeight",
    "DorefaActivationQuantizer",
    "DorefaWeightQuantizer",
    "Gradient",
    "GradientQuantizer",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "Method",
    "MovingAverageQuantizer",
    "PactQuantizer",
    "Quantizer",
    "SignActivation",
    "StepActivation",
    "SymmetricRangeQuantizer",
    "TqtQuantizer",
    "learned_round",
    "make_quantizer",
    "round_to_levels",
]
