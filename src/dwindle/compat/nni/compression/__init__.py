"""``nni.compression``, the paths of NNI 3.0 (and, under ``pytorch``, of 2.x)."""

from dwindle.compat.nni.evaluator import TorchEvaluator
from dwindle.compat.nni.paths import imported_on_use

__all__ = ["TorchEvaluator"]

__getattr__ = imported_on_use(__name__)
