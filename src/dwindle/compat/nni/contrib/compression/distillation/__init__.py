"""``nni.contrib.compression.distillation``, an older path of ``nni.compression.distillation``."""

from dwindle.compat.nni.compression.distillation import *  # noqa: F403
from dwindle.compat.nni.compression.distillation import __all__ as __all__
