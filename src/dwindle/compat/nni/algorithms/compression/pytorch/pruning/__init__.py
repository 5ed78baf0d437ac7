"""``nni.algorithms.compression.pytorch.pruning``: the pruners of NNI 1.x."""

from dwindle.compat.nni.v1 import *  # noqa: F403
from dwindle.compat.nni.v1 import __all__ as __all__
