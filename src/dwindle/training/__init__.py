"""Training with compressors: the step contract, schedules, runs, and a plain loop.

The contract is :class:`Compressor`; :func:`compress` lets several of them work together in the user's own
loop; :func:`fit` is a loop for those who have none.
"""

from dwindle.training.accuracy_aware import accuracy_aware
from dwindle.training.accuracy_records import AccuracyAware, AccuracyOptions, RateTrial
from dwindle.training.adaptive_schedule import AdaptiveSchedule
from dwindle.training.batches import accuracy, logits_of, predictions
from dwindle.training.checkpoint import load_state, save_state
from dwindle.training.claims import Claim
from dwindle.training.compressor import Compressor
from dwindle.training.early_stop import EarlyStop
from dwindle.training.freezing import Freezing, frozen
from dwindle.training.loop import EpochRecord, TrainingOptions, TrainingResult, fit, seed_everything
from dwindle.training.normalization_statistics import AdaptedNormalization, adapt_normalization
from dwindle.training.rate_search import RateSearch
from dwindle.training.rewinding import Rewinding
from dwindle.training.run import CompressionRun, compress, register_realizer
from dwindle.training.schedule import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    ExponentialWithBiasSchedule,
    LinearSchedule,
    MultistepSchedule,
    PolynomialSchedule,
    Schedule,
    value_at,
)
from dwindle.training.staged import Staged
from dwindle.training.whole_state import load_whole_state, whole_state

__all__ = [
    "AccuracyAware",
    "AccuracyOptions",
    "AdaptedNormalization",
    "AdaptiveSchedule",
    "Claim",
    "CompressionRun",
    "Compressor",
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "EarlyStop",
    "EpochRecord",
    "ExponentialSchedule",
    "ExponentialWithBiasSchedule",
    "Freezing",
    "LinearSchedule",
    "MultistepSchedule",
    "PolynomialSchedule",
    "RateSearch",
    "RateTrial",
    "Rewinding",
    "Schedule",
    "Staged",
    "TrainingOptions",
    "TrainingResult",
    "accuracy",
    "accuracy_aware",
    "adapt_normalization",
    "compress",
    "fit",
    "frozen",
    "load_state",
    "load_whole_state",
    "logits_of",
    "predictions",
    "register_realizer",
    "save_state",
    "seed_everything",
    "value_at",
    "whole_state",
]
