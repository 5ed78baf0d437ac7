"""``nni.contrib.compression``, an older path of ``nni.compression``."""

from dwindle.compat.nni.evaluator import TorchEvaluator

__all__ = ["TorchEvaluator"]
