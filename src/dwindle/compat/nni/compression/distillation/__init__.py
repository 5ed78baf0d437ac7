"""``nni.compression.distillation``: the distillers of NNI 3.0."""

from dwindle.compat.nni.distillers import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller

__all__ = ["Adaptive1dLayerwiseDistiller", "DynamicLayerwiseDistiller"]
