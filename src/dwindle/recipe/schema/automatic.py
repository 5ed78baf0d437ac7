"""The stage that finds the best model within a budget by itself."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.recipe.schema.part import Count, Fraction
from dwindle.recipe.schema.stage import Stage
from dwindle.search.auto import METHODS, Candidate
from dwindle.search.auto.limits import parse_limits

__all__ = ["AutoStage"]


class AutoStage(Stage):
    """Find the best small model within a budget; see ``dw.auto``.

    Attributes:
        budget: By cost: a share of the newest model's (0.25), or words with a unit ("8 ms").
        minimize: The other way round: a cost that becomes as small as ``max_drop`` allows.
        candidate: What a search found, done again without a search: its trials are kept as recipes with this key.
        share: Of the epochs, for a candidate: that of the trial it was.
        metric: ``accuracy``, or ``agreement`` with the newest model, which needs no labels.
        max_drop: What the metric may lose.
        effort: ``seconds`` (trains nothing), ``minutes`` or ``hours``.
        trials: Candidates that are scored, in place of the effort's own number.
        labels: Whether labels are learned from; otherwise from the model's own answers alone.
        epochs: Passes over the training data, of the chosen candidate.
        optimizer: ``adamw`` or ``sgd`` (with momentum 0.9).
        learning_rate: The largest one.
        weight_decay: Of the optimizer.
        teacher_weight: Weight of the newest model's answers beside the labels.
        temperature: Of the distillation.
        methods: Some of ``blocks``, ``widths``, ``ranks``, ``int8``.
        ignore: Parameter names, module names or patterns whose axes stay.
        axes: Kinds of axes that may shrink; null: all that shrink by default.
        validation: Share of the training data that candidates are scored on and not trained on, where the data bring
            no validation data of their own.
        batch_size: Samples of a timed pass.
        threads: Threads of a timed pass; null leaves it to the runtime.
    """

    kind: ClassVar[str] = "auto"
    makes_model: ClassVar[bool] = True
    budget: dict[str, float | str] | None = None
    minimize: str | None = None
    candidate: dict[str, Any] | None = None
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    metric: Literal["accuracy", "agreement"] = "accuracy"
    max_drop: float = Field(default=0.01, ge=0.0)
    effort: Literal["seconds", "minutes", "hours"] = "minutes"
    trials: Count | None = None
    labels: bool = True
    epochs: Count = 10
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=1e-4, ge=0.0)
    teacher_weight: Fraction = 0.7
    temperature: float = Field(default=4.0, gt=0.0)
    methods: list[str] = Field(default_factory=lambda: list(METHODS), min_length=1)
    ignore: list[str] = Field(default_factory=list)
    axes: list[str] | None = None
    validation: float = Field(default=0.15, gt=0.0, lt=1.0)
    batch_size: Count = 1
    threads: Count | None = 1

    @field_validator("methods")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in METHODS:
                raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
        return names

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: Any) -> Any:
        if value is not None:
            _checked(value)
        return value

    @field_validator("candidate")
    @classmethod
    def _candidate(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                Candidate.from_json(value)
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("candidate: ")) from error
        return value

    @field_validator("minimize")
    @classmethod
    def _minimize(cls, value: str | None) -> str | None:
        if value is not None:
            _checked({value: 1.0})
        return value

    @model_validator(mode="after")
    def _something(self) -> AutoStage:
        if self.budget is None and self.minimize is None and self.candidate is None:
            raise ValueError('give a budget, such as {"latency:onnxruntime": 0.25}, or the cost to minimize')
        if self.candidate is None and self.share != 1:
            raise ValueError("'share' belongs to a candidate")
        return self


def _checked(budget: dict[str, Any]) -> None:
    try:
        parse_limits(budget)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("budget: ")) from error
