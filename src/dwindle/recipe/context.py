"""What a stage is given, and what it may tell while it works."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from dwindle.measure import count_macs, count_parameters
from dwindle.recipe.data_source import Data
from dwindle.recipe.evaluation import evaluate
from dwindle.recipe.layers import describe_layers
from dwindle.recipe.schema import Recipe, Stage
from dwindle.recipe.variant import Variant, load_variant, save_predictions, save_variant

__all__ = ["Event", "Listener", "StageContext", "stage_seed"]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run, for whoever shows it.

    Attributes:
        kind: ``run`` (with ``total`` stages), ``started``, ``skipped`` (finished by an earlier run), ``advanced``
            (inside a stage) or ``finished``.
        seed: The seed of the chain of stages.
        label: The stage.
        text: One line for people.
        done: Parts of the stage that are done.
        total: Parts of the stage, or stages of the run.
    """

    kind: Literal["run", "started", "skipped", "advanced", "finished"]
    seed: int = 0
    label: str = ""
    text: str = ""
    done: int = 0
    total: int = 0


Listener = Callable[[Event], None]


@dataclass
class StageContext:
    """Everything a stage works with.

    Attributes:
        recipe: The whole recipe.
        stage: The part that is being done.
        seed: The seed of this chain of stages.
        directory: Where the stage may write; becomes the stage's own directory when it is finished.
        data: The data.
        original: The model before any compression, or None before there is one.
        variants: All models made so far, oldest first, the original among them.
        original_predictions: The original's answers on the test data.
        records: Records of the finished stages of this chain.
        tell: Takes events.
    """

    recipe: Recipe
    stage: Stage
    seed: int
    directory: Path
    data: Data
    original: Variant | None
    variants: list[Variant]
    original_predictions: Tensor | None
    records: list[dict[str, Any]]
    tell: Listener

    @property
    def current(self) -> Variant | None:
        """The newest model, or None when there is none yet."""
        return self.variants[-1] if self.variants else None

    @property
    def own_seed(self) -> int:
        """The seed of this stage: decided by the chain's seed and the stage's name, and by nothing else."""
        return stage_seed(self.seed, self.stage.label)

    def load_current(self) -> nn.Module:
        """Read the newest model from its file, so that a resumed run does just what an unbroken one does."""
        assert self.current is not None
        return load_variant(self.current, self.recipe.model)

    def keep_model(self, model: nn.Module) -> dict[str, Any]:
        """Evaluate a model that the stage made, write it and its answers, and describe it.

        Returns:
            The part of the stage's record that every model-making stage has.
        """
        model.eval()
        evaluation, predictions = evaluate(model, self.data, self.original_predictions)
        args, kwargs = self.data.example(2)
        save_variant(model, self.directory, self.recipe.model, args, kwargs)
        save_predictions(predictions, self.directory)
        return {
            "evaluation": evaluation.to_json(),
            "parameters": count_parameters(model).total,
            "macs": round(count_macs(model, args, kwargs) / _samples(args, kwargs)),
            "layers": describe_layers(model),
        }

    def advance(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the stage is."""
        self.tell(Event("advanced", self.seed, self.stage.label, text, done, total))


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch of example inputs."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    return len(tensors[0]) if tensors else 1


def stage_seed(seed: int, label: str) -> int:
    """Derive the seed of a stage (31 bits) from the chain's seed and the stage's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{label}".encode()).digest()[:4]) & 0x7FFFFFFF
