"""``nni.compression``, the paths of NNI 3.0 (and, under ``pytorch``, of 2.x)."""

from dwindle.compat.nni.evaluator import TorchEvaluator

__all__ = ["TorchEvaluator"]
