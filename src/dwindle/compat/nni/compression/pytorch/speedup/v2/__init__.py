"""``nni.compression.pytorch.speedup.v2``, between NNI 2.10 and 3.0."""

from dwindle.compat.nni.speedup import ModelSpeedup

__all__ = ["ModelSpeedup"]
