"""The stages of a recipe, one file a kind; each is a function from a context to the result of its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dwindle.recipe.context import StageContext
from dwindle.recipe.stages.auto import run_auto
from dwindle.recipe.stages.export import run_export
from dwindle.recipe.stages.factorize import run_factorize
from dwindle.recipe.stages.measure import run_measure
from dwindle.recipe.stages.prune import run_prune
from dwindle.recipe.stages.quantize import run_quantize
from dwindle.recipe.stages.train import run_finetune, run_original, run_train

__all__ = ["RUNNERS", "run_original"]

RUNNERS: dict[str, Callable[[StageContext], dict[str, Any]]] = {
    "train": run_train,
    "prune": run_prune,
    "factorize": run_factorize,
    "finetune": run_finetune,
    "quantize": run_quantize,
    "auto": run_auto,
    "export": run_export,
    "measure": run_measure,
}
"""What does the work of each kind of stage. The report is written once for all seeds, by the runner."""
