"""NNI's names, with its signatures, on dwindle.

``from dwindle.compat import nni`` in place of ``import nni``, and ``dwindle.compat.nni.compression`` in place of
``nni.compression`` and ``nni.algorithms``. Where versions differ, the names here are those of 3.0;
:mod:`dwindle.compat.nni.v2` has those of 2.10 (and its predecessors' arguments), :mod:`dwindle.compat.nni.v1` those of
1.x.
"""

from dwindle.compat.nni.dependency import auto_set_denpendency_group_ids, auto_set_dependency_group_ids
from dwindle.compat.nni.distillers import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from dwindle.compat.nni.evaluator import TorchEvaluator
from dwindle.compat.nni.heads import TransformerHeadPruner
from dwindle.compat.nni.paths import imported_on_use
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
from dwindle.compat.nni.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from dwindle.compat.nni.searched import AMCPruner, NetAdaptPruner, SensitivityPruner
from dwindle.compat.nni.speedup import ModelSpeedup
from dwindle.compat.nni.tracing import trace
from dwindle.compat.nni.v2 import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    AutoCompressPruner,
    LotteryTicketPruner,
    SimulatedAnnealingPruner,
    TaylorFOWeightPruner,
)
from dwindle.compat.nni.v2.quantizers import NaiveQuantizer, ObserverQuantizer, QAT_Quantizer

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AMCPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "Adaptive1dLayerwiseDistiller",
    "AutoCompressPruner",
    "BNNQuantizer",
    "DoReFaQuantizer",
    "DynamicLayerwiseDistiller",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "LsqPlusQuantizer",
    "LsqQuantizer",
    "ModelSpeedup",
    "MovementPruner",
    "NaiveQuantizer",
    "NetAdaptPruner",
    "ObserverQuantizer",
    "PtqQuantizer",
    "QATQuantizer",
    "QAT_Quantizer",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightPruner",
    "TaylorPruner",
    "TorchEvaluator",
    "TransformerHeadPruner",
    "auto_set_denpendency_group_ids",
    "auto_set_dependency_group_ids",
    "trace",
]

__getattr__ = imported_on_use(__name__)
