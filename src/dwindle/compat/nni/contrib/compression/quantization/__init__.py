"""``nni.contrib.compression.quantization``, an older path of ``nni.compression.quantization``."""

from dwindle.compat.nni.compression.quantization import *  # noqa: F403
from dwindle.compat.nni.compression.quantization import __all__ as __all__
