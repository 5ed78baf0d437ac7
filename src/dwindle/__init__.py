"""dwindle makes trained PyTorch models smaller and faster for real, and proves that it did.

The public face: ``dw.prune``, ``dw.realize``, ``dw.quantize``, ``dw.compress``, ``dw.from_recipe``, ``dw.export``,
``dw.measure``, ``dw.sensitivity``, ``dw.save``, ``dw.load``, and the rooms behind them (``dw.pruning``,
``dw.quantization``, ...). Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "ShrinkResult": "dwindle.realize",
    "apply_plan": "dwindle.realize",
    "factorize": "dwindle.realize",
    "lottery_ticket": "dwindle.realize",
    "pack_binary": "dwindle.realize",
    "pack_integers": "dwindle.realize",
    "prune": "dwindle.realize",
    "repair": "dwindle.realize",
    "prune_in_rounds": "dwindle.realize",
    "sensitivity": "dwindle.search.sensitivities",
    "auto": "dwindle.search.auto",
    "quantize": "dwindle.quantization",
    "quantize_weights": "dwindle.quantization",
    "pack_weights": "dwindle.realize",
    "sparsify": "dwindle.realize",
    "densified": "dwindle.realize",
    "compress": "dwindle.training",
    "from_recipe": "dwindle.recipe",
    "load": "dwindle.export",
    "save": "dwindle.export",
    "register_axis_rule": "dwindle.graph",
    "DwindleError": "dwindle.config.errors",
    "ConfigError": "dwindle.config.errors",
}
#: Rooms that share their name with the verb they are for: the module itself can be called.
_VERBS = ("realize", "export", "measure")
_ROOMS = (
    "config",
    "graph",
    "simulate",
    "training",
    "pruning",
    "quantization",
    "distillation",
    "factorization",
    "report",
    "search",
    "recipe",
)

__all__ = ["__version__", *sorted([*_NAMES, *_VERBS, *_ROOMS])]


def __getattr__(name: str) -> Any:
    if name == "compress":
        importlib.import_module("dwindle.realize")  # registers what a run's realize() calls
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _VERBS or name in _ROOMS:
        return importlib.import_module(f"dwindle.{name}")
    raise AttributeError(f"module 'dwindle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
