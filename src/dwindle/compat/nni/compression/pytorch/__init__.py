"""``nni.compression.pytorch``, the paths of NNI 2.x."""

from dwindle.compat.nni.paths import imported_on_use
from dwindle.compat.nni.speedup import ModelSpeedup
from dwindle.compat.nni.v2 import TorchEvaluator
from dwindle.compat.nni.v2.sensitivity import apply_compression_results

__all__ = ["ModelSpeedup", "TorchEvaluator", "apply_compression_results"]

__getattr__ = imported_on_use(__name__)
