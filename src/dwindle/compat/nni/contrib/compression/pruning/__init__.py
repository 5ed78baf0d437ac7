"""``nni.contrib.compression.pruning``, an older path of ``nni.compression.pruning``."""

from dwindle.compat.nni.compression.pruning import *  # noqa: F403
from dwindle.compat.nni.compression.pruning import __all__ as __all__
