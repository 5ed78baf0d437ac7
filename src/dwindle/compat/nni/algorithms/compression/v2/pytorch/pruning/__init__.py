"""``nni.algorithms.compression.v2.pytorch.pruning``: the pruners of NNI 2.10."""

from dwindle.compat.nni.compression.pytorch.pruning import *  # noqa: F403
from dwindle.compat.nni.compression.pytorch.pruning import __all__ as __all__
