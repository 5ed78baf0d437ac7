"""NNI's names, with its signatures, on dwindle.

``from dwindle.compat import nni`` in place of ``import nni``, and ``dwindle.compat.nni.compression`` in place of
``nni.compression``: names of 3.0 are here and in :mod:`dwindle.compat.nni.compression`.
"""

from dwindle.compat.nni.dependency import auto_set_denpendency_group_ids, auto_set_dependency_group_ids
from dwindle.compat.nni.evaluator import TorchEvaluator
from dwindle.compat.nni.pruners import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from dwindle.compat.nni.speedup import ModelSpeedup
from dwindle.compat.nni.tracing import trace

__all__ = [
    "AGPPruner",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "ModelSpeedup",
    "MovementPruner",
    "SlimPruner",
    "TaylorPruner",
    "TorchEvaluator",
    "auto_set_denpendency_group_ids",
    "auto_set_dependency_group_ids",
    "trace",
]
