"""The pruners and quantizers of NNI 2.10, with their signatures."""

from dwindle.compat.nni.searched import AMCPruner
from dwindle.compat.nni.v2.annealed import AutoCompressPruner, SimulatedAnnealingPruner
from dwindle.compat.nni.v2.evaluator import TorchEvaluator
from dwindle.compat.nni.v2.iterative import AGPPruner, LinearPruner, LotteryTicketPruner
from dwindle.compat.nni.v2.one_shot import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    TaylorFOWeightPruner,
)
from dwindle.compat.nni.v2.quantizers import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)
from dwindle.compat.nni.v2.sensitivity import SensitivityAnalysis, apply_compression_results
from dwindle.compat.nni.v2.trained import ADMMPruner, MovementPruner, SlimPruner

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AMCPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "AutoCompressPruner",
    "BNNQuantizer",
    "DoReFaQuantizer",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "LsqQuantizer",
    "MovementPruner",
    "NaiveQuantizer",
    "ObserverQuantizer",
    "QAT_Quantizer",
    "SensitivityAnalysis",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightPruner",
    "TorchEvaluator",
    "apply_compression_results",
]
