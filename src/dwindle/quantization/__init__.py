"""Int8 quantization: ranges from data, one placement, a simulation that the real file matches."""

from dwindle.quantization.aware_training import Bits, QuantizationStages, TrainingQuantizer, finish_training
from dwindle.quantization.binarization import BinaryQuantizer
from dwindle.quantization.binary_methods import (
    BiRealQuantizer,
    BNNQuantizer,
    DoReFaBinaryQuantizer,
    XNORQuantizer,
)
from dwindle.quantization.binary_stages import BinaryStages
from dwindle.quantization.explanation import (
    OperationFact,
    PlacementFacts,
    QuantizerFact,
    explain_placement,
)
from dwindle.quantization.fallback import QuantizedWithin, quantize_within
from dwindle.quantization.layer_errors import LayerError, error_table, layer_errors
from dwindle.quantization.levels import fake_quantize
from dwindle.quantization.mixed_precision import LayerBits, MixedPrecision, choose_bits, manual_bits
from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.observers import (
    OBSERVERS,
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
)
from dwindle.quantization.operators import BACKENDS, Backend, ComputeRule
from dwindle.quantization.parity import Parity, compare, parity
from dwindle.quantization.plan import apply_plan, plan_of, replay
from dwindle.quantization.quality import QuantizationReport, quantization_report
from dwindle.quantization.quantize import PRESETS, quantize
from dwindle.quantization.reconstruction import BlockResult, Reconstruction
from dwindle.quantization.simulation import is_quantized, quantization_parameters
from dwindle.quantization.value_histograms import ValueHistogram, value_histograms
from dwindle.quantization.weight_only import (
    GroupFormat,
    PackedWeight,
    packed_weights,
    quantize_weights,
    weight_rows,
)

__all__ = [
    "BACKENDS",
    "OBSERVERS",
    "PRESETS",
    "BNNQuantizer",
    "Backend",
    "BiRealQuantizer",
    "BinaryQuantizer",
    "BinaryStages",
    "Bits",
    "BlockResult",
    "ComputeRule",
    "DoReFaBinaryQuantizer",
    "EntropyObserver",
    "GroupFormat",
    "HistogramObserver",
    "LayerBits",
    "LayerError",
    "MinMaxObserver",
    "MixedPrecision",
    "MovingAverageObserver",
    "NumberFormat",
    "Observer",
    "OperationFact",
    "PackedWeight",
    "Parity",
    "PercentileObserver",
    "PlacementFacts",
    "QuantizationReport",
    "QuantizationStages",
    "QuantizedWithin",
    "QuantizerFact",
    "Reconstruction",
    "TrainingQuantizer",
    "ValueHistogram",
    "XNORQuantizer",
    "apply_plan",
    "choose_bits",
    "compare",
    "error_table",
    "explain_placement",
    "fake_quantize",
    "finish_training",
    "is_quantized",
    "layer_errors",
    "manual_bits",
    "packed_weights",
    "parity",
    "plan_of",
    "quantization_parameters",
    "quantization_report",
    "quantize",
    "quantize_weights",
    "quantize_within",
    "replay",
    "scale_and_zero_point",
    "value_histograms",
    "weight_rows",
]
