"""Pruners by plain names, for files that hold no Python, and the arguments that each takes there."""

from __future__ import annotations

import inspect

from dwindle.pruning.activation import ActivationAPoZRankPruner, ActivationMeanRankPruner
from dwindle.pruning.admm import ADMMPruner
from dwindle.pruning.at_initialization import SNIPPruner, SynFlowPruner
from dwindle.pruning.base import Pruner
from dwindle.pruning.geometric_median import FPGMPruner
from dwindle.pruning.heads import TransformerHeadPruner
from dwindle.pruning.l0 import L0Pruner
from dwindle.pruning.magnitude import L1NormPruner, L2NormPruner, LevelPruner, MagnitudePruner
from dwindle.pruning.movement import MovementPruner
from dwindle.pruning.n_m import SRSTEPruner
from dwindle.pruning.observation import ObservingPruner
from dwindle.pruning.random import RandomPruner
from dwindle.pruning.rank import CHIPPruner, HRankPruner
from dwindle.pruning.regularized import RBPruner
from dwindle.pruning.rigl import RigLPruner
from dwindle.pruning.second_order import OBDPruner
from dwindle.pruning.slim import SlimPruner
from dwindle.pruning.sparse_gpt import SparseGPTPruner
from dwindle.pruning.taylor import TaylorPruner
from dwindle.pruning.trained import TrainingPruner
from dwindle.pruning.wanda import WandaPruner

__all__ = ["PRUNERS", "TRAINING_METHODS", "arguments_of", "watches"]

PRUNERS: dict[str, type[Pruner]] = {
    "l1": L1NormPruner,
    "l2": L2NormPruner,
    "level": LevelPruner,
    "magnitude": MagnitudePruner,
    "fpgm": FPGMPruner,
    "random": RandomPruner,
    "taylor": TaylorPruner,
    "apoz": ActivationAPoZRankPruner,
    "mean_activation": ActivationMeanRankPruner,
    "hrank": HRankPruner,
    "chip": CHIPPruner,
    "obd": OBDPruner,
    "heads": TransformerHeadPruner,
    "wanda": WandaPruner,
    "sparse_gpt": SparseGPTPruner,
    "snip": SNIPPruner,
    "synflow": SynFlowPruner,
    "movement": MovementPruner,
    "slim": SlimPruner,
    "admm": ADMMPruner,
    "l0": L0Pruner,
    "rb": RBPruner,
    "rigl": RigLPruner,
    "sr_ste": SRSTEPruner,
}
"""Every pruner that takes a ``config_list``, by the name it has in recipes."""

TRAINING_METHODS: tuple[str, ...] = (
    *(name for name, own in PRUNERS.items() if issubclass(own, TrainingPruner)),
    "group_sparsity",
)
"""Methods whose masks come out of the training itself: scores, gates, penalties, growing again."""

#: What a recipe says in keys of its own, and what no file can hold.
_ELSEWHERE = {"self", "model", "config_list", "example_inputs", "example_kwargs", "training_steps"} | {
    "data",
    "batches",
    "loss",
    "adapt",
}


def arguments_of(kind: type) -> list[str]:
    """Return the names of the arguments that ``options`` may hold for a class of compressors."""
    names: list[str] = []
    for owner in kind.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters.values()  # type: ignore[misc]
        names += [own.name for own in parameters if own.kind not in (own.VAR_KEYWORD, own.VAR_POSITIONAL)]
        if not any(own.kind is own.VAR_KEYWORD for own in parameters):
            break
    return [name for name in dict.fromkeys(names) if name not in _ELSEWHERE]


def watches(kind: type[Pruner]) -> bool:
    """Whether a pruner can watch a training run until its masks come."""
    return issubclass(kind, ObservingPruner) and kind is not SparseGPTPruner
