"""Stages that make a smaller model at once: whole channels go, or layers become chains of low rank."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from dwindle.recipe.schema.part import Count, Fraction, Part
from dwindle.recipe.schema.stage import Stage

__all__ = ["FactorizeStage", "FactorizeTarget", "PruneStage", "PruneTarget"]


class PruneTarget(Part):
    """What should be left, as a share (0 to 1) of the model that enters the stage."""

    macs: Fraction | None = None
    params: Fraction | None = None
    bytes: Fraction | None = None

    @model_validator(mode="after")
    def _one(self) -> PruneTarget:
        if sum(value is not None for value in (self.macs, self.params, self.bytes)) != 1:
            raise ValueError("give one of macs, params and bytes")
        return self


class PruneStage(Stage):
    """Remove whole channels, heads and features, and make the small model at once.

    Give one of ``ratio``, ``target``, ``config_list``, and ``counts`` or ``blocks`` or both.

    Attributes:
        ratio: Share of every prunable axis that goes.
        target: What should be left, such as ``{macs: 0.35}``.
        config_list: Pruning settings with NNI's keys, for ``pruner``.
        counts: How many indices of each axis stay, by a parameter and dimension that has it; the others stay whole.
        blocks: Paths of residual blocks that go.
        pruner: Which pruner reads ``config_list``.
        importance: What decides which indices stay, as in ``dw.prune``.
        data_batches: Batches for an importance that runs the model (training data where it needs labels, otherwise
            calibration data), and for ``repair``.
        repair: Make up for what went with unlabelled calibration data (``dw.repair``).
        adapt_normalization: Calibration batches from which running statistics of batch normalizations are estimated
            anew in the small model; 0 leaves them.
        scope: Rank within each axis (``local``) or over the whole model (``global``).
        options: Further keyword arguments of ``dw.prune``.
    """

    kind: ClassVar[str] = "prune"
    makes_model: ClassVar[bool] = True
    ratio: Fraction | None = None
    target: PruneTarget | None = None
    config_list: list[dict[str, Any]] | None = None
    counts: dict[str, Count] = Field(default_factory=dict)
    blocks: list[str] = Field(default_factory=list)
    pruner: Literal["l1", "l2", "fpgm", "random"] = "l1"
    importance: Literal[
        "l1", "l2", "fpgm", "random", "group_norm", "taylor", "fisher", "hessian", "outputs", "activation"
    ] = "l1"
    data_batches: Count = 8
    repair: bool = False
    adapt_normalization: int = Field(default=0, ge=0)
    scope: Literal["local", "global"] = "local"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> PruneStage:
        named = self.counts or self.blocks or None
        if sum(value is not None for value in (self.ratio, self.target, self.config_list, named)) != 1:
            raise ValueError("give one of ratio, target, config_list, and counts or blocks")
        if self.repair and self.config_list is not None:
            raise ValueError("repair goes with ratio, target, counts and blocks, not with config_list")
        return self


class FactorizeTarget(Part):
    """What should be left, as a share (0 to 1) of the model that enters the stage."""

    macs: Fraction | None = None
    params: Fraction | None = None

    @model_validator(mode="after")
    def _one(self) -> FactorizeTarget:
        if (self.macs is None) == (self.params is None):
            raise ValueError("give one of macs and params")
        return self


class FactorizeStage(Stage):
    """Replace layers by chains of smaller ones of low rank; see ``dw.factorize``.

    Give one of ``target``, ``rank``, ``rank_ratio`` and ``energy``, or a ``config_list``, or both.

    Attributes:
        target: What should be left, such as ``{macs: 0.5}``.
        rank: Rank of every layer, or ``vbmf``.
        rank_ratio: Share of the full ranks.
        energy: Share of the energy that is kept.
        method: ``auto``, ``svd``, ``tucker``, ``cp`` or ``spatial``.
        config_list: Settings of the kind ``factorization`` for single layers.
        round_to: Ranks become a multiple of this.
        minimum: Smallest rank.
        data_batches: Calibration batches by which ``svd`` judges what matters for the outputs; 0 judges by the weights.
    """

    kind: ClassVar[str] = "factorize"
    makes_model: ClassVar[bool] = True
    target: FactorizeTarget | None = None
    rank: Count | Literal["vbmf"] | None = None
    rank_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    energy: float | None = Field(default=None, gt=0.0, le=1.0)
    method: Literal["auto", "svd", "tucker", "cp", "spatial"] = "auto"
    config_list: list[dict[str, Any]] | None = None
    round_to: Count = 1
    minimum: Count = 1
    data_batches: int = Field(default=8, ge=0)

    @model_validator(mode="after")
    def _some(self) -> FactorizeStage:
        ranks = [
            name for name in ("target", "rank", "rank_ratio", "energy") if getattr(self, name) is not None
        ]
        if len(ranks) > 1:
            raise ValueError(f"{' and '.join(ranks)} exclude each other")
        if not ranks and self.config_list is None:
            raise ValueError("give a target, rank, rank_ratio, energy or config_list")
        return self
