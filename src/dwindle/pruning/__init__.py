"""Pruners: which weights go, by what measure, in what blocks and groups."""

from dwindle.pruning.activation import ActivationAPoZRankPruner, ActivationMeanRankPruner
from dwindle.pruning.base import Pruner
from dwindle.pruning.geometric_median import FPGMPruner
from dwindle.pruning.importance import IMPORTANCES
from dwindle.pruning.magnitude import L1NormPruner, L2NormPruner, LevelPruner
from dwindle.pruning.movement import MovementPruner
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.random import RandomPruner
from dwindle.pruning.report import PruningReport, SparsityRow
from dwindle.pruning.scheduled import AGPPruner, LinearPruner, ScheduledPruner
from dwindle.pruning.sparse_gpt import SparseGPTPruner
from dwindle.pruning.taylor import TaylorPruner
from dwindle.pruning.slim import SlimPruner
from dwindle.pruning.trained import TrainingPruner
from dwindle.pruning.wanda import WandaPruner

__all__ = [
    "IMPORTANCES",
    "AGPPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "MovementPruner",
    "ObservingPruner",
    "Pruner",
    "PruningReport",
    "RandomPruner",
    "ScheduledPruner",
    "SparseGPTPruner",
    "SlimPruner",
    "SparsityRow",
    "TaylorPruner",
    "TrainingPruner",
    "WandaPruner",
]
