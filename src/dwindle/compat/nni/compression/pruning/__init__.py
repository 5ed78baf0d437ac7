"""``nni.compression.pruning`` of NNI 3.0."""

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

__all__ = [
    "AGPPruner",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "MovementPruner",
    "SlimPruner",
    "TaylorPruner",
]
