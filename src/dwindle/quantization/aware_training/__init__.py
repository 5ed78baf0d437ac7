"""Training with quantizers: places, first ranges, stages, and the integer model at the end."""

from dwindle.quantization.aware_training.bank import TrainedQuantizers, bank_of, begin_pass
from dwindle.quantization.aware_training.compressor import TrainingQuantizer
from dwindle.quantization.aware_training.conversion import finish_training, finished
from dwindle.quantization.aware_training.placing import Bits, TrainingPlaces
from dwindle.quantization.aware_training.stages import QuantizationStages

__all__ = [
    "Bits",
    "QuantizationStages",
    "TrainedQuantizers",
    "TrainingPlaces",
    "TrainingQuantizer",
    "bank_of",
    "begin_pass",
    "finish_training",
    "finished",
]
