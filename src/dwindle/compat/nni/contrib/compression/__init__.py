"""``nni.contrib.compression``, an older path of ``nni.compression``."""

from dwindle.compat.nni.evaluator import TorchEvaluator
from dwindle.compat.nni.paths import imported_on_use

__all__ = ["TorchEvaluator"]

__getattr__ = imported_on_use(__name__)
