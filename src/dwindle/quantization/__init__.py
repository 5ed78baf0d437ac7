"""Int8 quantization: ranges from data, one placement, a simulation that the real file matches."""

from dwindle.quantization.numbers import NumberFormat, fake_quantize, scale_and_zero_point
from dwindle.quantization.observers import (
    OBSERVERS,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
)
from dwindle.quantization.operators import BACKENDS, Backend, ComputeRule
from dwindle.quantization.parity import Parity, compare, parity
from dwindle.quantization.plan import apply_plan, plan_of, replay
from dwindle.quantization.quantize import PRESETS, quantize
from dwindle.quantization.simulation import is_quantized, quantization_parameters

__all__ = [
    "BACKENDS",
    "OBSERVERS",
    "PRESETS",
    "Backend",
    "ComputeRule",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "NumberFormat",
    "Observer",
    "Parity",
    "PercentileObserver",
    "apply_plan",
    "compare",
    "fake_quantize",
    "is_quantized",
    "parity",
    "plan_of",
    "quantization_parameters",
    "quantize",
    "replay",
    "scale_and_zero_point",
]
