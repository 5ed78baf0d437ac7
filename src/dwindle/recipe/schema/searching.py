"""What the ``search`` part of a recipe may say; ``dwindle search`` reads it, ``dwindle run`` refuses it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dwindle.config.errors import did_you_mean
from dwindle.recipe.schema.part import Count, Fraction, Part

__all__ = ["EFFORTS", "METRICS", "SearchPart", "SearchTiming"]

EFFORTS = {"seconds": 10, "minutes": 40, "hours": 200}
"""Trials by a word for the effort; how long they take is up to the recipe."""

METRICS = ("accuracy", "agreement")


class SearchTiming(Part):
    """How latencies of trials are measured: beside the original, call by call in turn.

    Attributes:
        threads: Threads of a runtime; null leaves it to the runtime.
        batch_size: Samples of one forward pass.
        repeats: Timed calls of each.
    """

    threads: Count | None = 1
    batch_size: Count = 1
    repeats: Count = 40


class SearchPart(Part):
    """What of a recipe is searched, for what, and how.

    Attributes:
        objective: What is made as good as can be: ``accuracy``, ``agreement`` (with the original), or a cost (made
            small). Several give a Pareto front.
        budget: The most that a candidate may cost: shares of the original (0.25), or words with a unit ("8 ms").
        drop: The most that the metric may fall below the original's (0 to 1).
        measure: Further costs that are only written down.
        timing: How latencies are measured.
        space: What is searched, by the path of a key: ``stages.prune.ratio: {low: 0.1, high: 0.8}`` or a list of
            choices. Keys may be searched where they stand, too: ``ratio: {search: [0.3, 0.5]}``.
        order: Names of stages that may come in any order, in the places that they have now.
        evaluation: What trials are scored on: training data held out (``validation``), or the test data.
        validation: Share of the training data that is held out, where the data bring no validation data of their own.
        effort: ``seconds``, ``minutes`` or ``hours``: how many trials, where ``trials`` does not say.
        trials: How many trials are finished in the end.
        sampler: ``tpe``, ``nsga2``, ``random`` or ``package.module:callable``; left out: ``tpe``, or ``nsga2`` where
            there are several objectives.
        sampler_options: Its arguments.
        pruner: ``median``, ``successive_halving`` or ``package.module:callable``; what it judges is the metric after
            each stage. Left out: no trial is stopped.
        pruner_options: Its arguments.
        seed: Decides every proposal.
        generation: Trials that are proposed from earlier generations alone; the result is then the same for any
            number of workers.
        workers: Processes.
        storage: SQLite file, ``journal:PATH`` or database URL; ``study.db`` in the search's directory when left out.
        enqueue: Values of the first trials, by path.
        keep_runs: Keep what the runs of all trials left; else their recipes and summaries alone.
    """

    objective: list[str] = Field(default_factory=lambda: ["accuracy"], min_length=1)
    budget: dict[str, float | str] = Field(default_factory=dict)
    drop: Fraction | None = None
    measure: list[str] = Field(default_factory=list)
    timing: SearchTiming = SearchTiming()
    space: dict[str, Any] = Field(default_factory=dict)
    order: list[str] = Field(default_factory=list)
    evaluation: Literal["validation", "test"] = "validation"
    validation: float = Field(default=0.2, gt=0.0, lt=1.0)
    effort: Literal["seconds", "minutes", "hours"] = "minutes"
    trials: Count | None = None
    sampler: str | None = None
    sampler_options: dict[str, Any] = Field(default_factory=dict)
    pruner: str | None = None
    pruner_options: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    generation: Count | None = None
    workers: Count = 1
    storage: str | None = None
    enqueue: list[dict[str, Any]] = Field(default_factory=list)
    keep_runs: bool = False

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("objective", "measure")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        from dwindle.search.auto.limits import COSTS

        for name in names:
            known = (*METRICS, *COSTS)
            if name not in METRICS and name.partition(":")[0] not in COSTS:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}")
            if name == "latency":
                raise ValueError(
                    "name the runtime of the latency: 'latency:onnxruntime', 'latency:openvino', ..."
                )
        if len(set(names)) != len(names):
            raise ValueError("a name stands there twice")
        return names

    @model_validator(mode="after")
    def _fits(self) -> SearchPart:
        if len(self.objective) > 1 and self.pruner is not None:
            raise ValueError("a pruner compares one objective; with several leave it out")
        return self

    @property
    def metric(self) -> str | None:
        """The objective that is a metric; None when only costs are objectives."""
        return next((name for name in self.objective if name in METRICS), None)

    @property
    def wanted(self) -> int:
        """How many trials."""
        return self.trials if self.trials is not None else EFFORTS[self.effort]

    @property
    def chosen_sampler(self) -> str:
        """The sampler, or the one that fits the objectives."""
        return self.sampler or ("tpe" if len(self.objective) == 1 else "nsga2")
