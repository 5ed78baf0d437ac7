"""Pruners: which weights go, by what measure, in what blocks and groups."""

from dwindle.pruning.activation import ActivationAPoZRankPruner, ActivationMeanRankPruner
from dwindle.pruning.activation_energy import Activation
from dwindle.pruning.admm import ADMMPruner
from dwindle.pruning.at_initialization import SNIPPruner, SynFlowPruner
from dwindle.pruning.axis_importance import AxisImportance, GroupNorm, WeightImportance
from dwindle.pruning.base import Pruner
from dwindle.pruning.geometric_median import FPGMPruner
from dwindle.pruning.group_sparsity import GroupSparsity
from dwindle.pruning.heads import TransformerHeadPruner
from dwindle.pruning.importance import IMPORTANCES
from dwindle.pruning.l0 import L0Pruner
from dwindle.pruning.magnitude import L1NormPruner, L2NormPruner, LevelPruner, MagnitudePruner
from dwindle.pruning.measured import Fisher, Hessian, Outputs, Taylor
from dwindle.pruning.movement import MovementPruner
from dwindle.pruning.n_m import SRSTEPruner
from dwindle.pruning.named_importances import AXIS_IMPORTANCES
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.random import RandomPruner
from dwindle.pruning.rank import CHIPPruner, HRankPruner
from dwindle.pruning.regularized import RBPruner
from dwindle.pruning.report import PruningReport, SparsityRow
from dwindle.pruning.rigl import RigLPruner
from dwindle.pruning.scheduled import AGPPruner, LinearPruner, ScheduledPruner
from dwindle.pruning.second_order import OBDPruner
from dwindle.pruning.slim import SlimPruner
from dwindle.pruning.sparse_gpt import SparseGPTPruner
from dwindle.pruning.taylor import TaylorPruner
from dwindle.pruning.torch_masks import import_torch_masks, split_torch_state
from dwindle.pruning.trained import TrainingPruner
from dwindle.pruning.wanda import WandaPruner

__all__ = [
    "AXIS_IMPORTANCES",
    "IMPORTANCES",
    "ADMMPruner",
    "AGPPruner",
    "Activation",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "AxisImportance",
    "CHIPPruner",
    "FPGMPruner",
    "Fisher",
    "GroupNorm",
    "GroupSparsity",
    "HRankPruner",
    "Hessian",
    "L0Pruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "MagnitudePruner",
    "MovementPruner",
    "OBDPruner",
    "ObservingPruner",
    "Outputs",
    "Pruner",
    "PruningReport",
    "RBPruner",
    "RandomPruner",
    "RigLPruner",
    "SNIPPruner",
    "SRSTEPruner",
    "ScheduledPruner",
    "SlimPruner",
    "SparseGPTPruner",
    "SparsityRow",
    "SynFlowPruner",
    "Taylor",
    "TaylorPruner",
    "TrainingPruner",
    "TransformerHeadPruner",
    "WandaPruner",
    "WeightImportance",
    "import_torch_masks",
    "split_torch_state",
]
