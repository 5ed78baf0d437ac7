"""``nni.compression.speedup`` of NNI 3.0."""

from dwindle.compat.nni.speedup import ModelSpeedup

__all__ = ["ModelSpeedup"]
