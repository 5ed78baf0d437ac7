"""``nni.compression.pytorch.speedup`` of NNI 2.x."""

from dwindle.compat.nni.paths import imported_on_use
from dwindle.compat.nni.speedup import ModelSpeedup

__all__ = ["ModelSpeedup"]

__getattr__ = imported_on_use(__name__)
