"""``nni.compression.pytorch``, the paths of NNI 2.x."""

from dwindle.compat.nni.speedup import ModelSpeedup
from dwindle.compat.nni.v2 import TorchEvaluator

__all__ = ["ModelSpeedup", "TorchEvaluator"]
