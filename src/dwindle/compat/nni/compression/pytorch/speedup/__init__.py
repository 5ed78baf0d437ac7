"""``nni.compression.pytorch.speedup`` of NNI 2.x."""

from dwindle.compat.nni.speedup import ModelSpeedup

__all__ = ["ModelSpeedup"]
