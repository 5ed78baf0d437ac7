"""What a ``config_list`` may say about one target: the keys, their types and ranges, for each kind of method.

The keys are those of NNI 3.0. :func:`setting_class` gives the model of a kind; :func:`validate` turns a plain
dict into a setting and says in one line what is wrong with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.granularity import GranularityValue, check_value, implied_ratio

Kind = Literal["pruning", "quantization", "distillation", "factorization"]

KINDS: tuple[Kind, ...] = ("pruning", "quantization", "distillation", "factorization")

#: What an axis of a model can be.
AxisKind = Literal["channels", "heads", "head_width", "embedding", "feed_forward"]

#: How a student's tensor can be compared with a teacher's.
DISTILLATION_METHODS = (
    "mse",
    "kl",
    "hint",
    "attention_transfer",
    "attention_map",
    "attention_map_mse",
    "token_relations",
    "relation_distance",
    "relation_angle",
    "similarity",
    "pkt",
    "norm_direction",
    "contrastive",
    "classes",
    "binary",
    "dkd",
    "dist",
)

#: Number formats beyond ``int{n}`` and ``uint{n}``.
FLOAT_DTYPES = ("float8_e4m3fn", "float8_e5m2")


def _number(value: Any) -> Any:
    """Refuse what Python would silently read as a number: ``True`` and text."""
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is not a number")
    return value


Ratio = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
GroupId = Annotated[int | str, Field(union_mode="smart")]
PositiveCount = Annotated[int, Field(ge=1, strict=True)]


class Setting(BaseModel):
    """What all settings share: unknown keys are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Align(Setting):
    """Take the mask from another target: an entry stays where the source keeps anything.

    Attributes:
        module_name: Module of the source; None is the same module.
        target_name: The source's parameter.
        dims: Dimensions of the source whose indices are the entries of this target.
    """

    module_name: str | None = None
    target_name: str = "weight"
    dims: tuple[int, ...] = (0,)


class PruningSetting(Setting):
    """How one target is pruned.

    Attributes:
        sparse_ratio: Share of the blocks that go, 0 to 1; ``int(blocks * ratio)`` of them.
        sparse_threshold: Keep blocks with at least this metric (not together with ``sparse_ratio``).
        max_sparse_ratio: At most this share goes, with thresholds and in global rankings too.
        min_sparse_ratio: At least this share goes.
        global_group_id: Targets with the same id are ranked together.
        dependency_group_id: Targets with the same id get one mask, from the mean of their metrics.
        internal_metric_block: Split the blocks in so many equal parts and prune the same share of each.
        granularity: Which entries go as a whole, see :mod:`dwindle.config.granularity`.
        apply_method: ``mul`` multiplies by the mask, ``add`` adds a large negative number where it is 0
            (inputs of a softmax), ``bypass`` changes nothing.
        align: Take the mask from another target.
        axes: Only channels that lie on axes of these kinds go; None is every kind. Needs example inputs.
        round_to: The number of channels that stay becomes a multiple of this, where there are as many.
        minimum: At least so many channels stay.
    """

    sparse_ratio: Ratio | None = None
    sparse_threshold: Number | None = None
    max_sparse_ratio: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None
    min_sparse_ratio: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)] | None = None
    global_group_id: GroupId | None = None
    dependency_group_id: GroupId | None = None
    internal_metric_block: Annotated[int, Field(ge=1, strict=True)] | None = None
    granularity: GranularityValue = "default"
    apply_method: Literal["mul", "add", "bypass"] = "mul"
    align: Align | None = None
    axes: tuple[AxisKind, ...] | None = None
    round_to: Annotated[int, Field(ge=1, strict=True)] = 1
    minimum: Annotated[int, Field(ge=0, strict=True)] = 0

    @field_validator("granularity")
    @classmethod
    def _check_granularity(cls, value: GranularityValue) -> GranularityValue:
        return check_value(value)

    @model_validator(mode="after")
    def _check_together(self) -> PruningSetting:
        low, high = self.min_sparse_ratio, self.max_sparse_ratio
        if self.sparse_ratio is not None and self.sparse_threshold is not None:
            raise ValueError("sparse_ratio and sparse_threshold exclude each other")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_sparse_ratio {low} is above max_sparse_ratio {high}")
        implied = implied_ratio(self.granularity)
        if implied is not None and self.sparse_threshold is not None:
            raise ValueError(
                f"granularity {self.granularity!r} fixes the ratio; sparse_threshold has no meaning"
            )
        if implied is not None and self.sparse_ratio is not None and abs(self.sparse_ratio - implied) > 1e-9:
            raise ValueError(
                f"granularity {self.granularity!r} means sparse_ratio {implied:g}, not {self.sparse_ratio:g}"
            )
        return self

    @property
    def goal(self) -> float | None:
        """The share of blocks to prune: ``sparse_ratio``, or what an N:M granularity implies."""
        return self.sparse_ratio if self.sparse_ratio is not None else implied_ratio(self.granularity)

    @property
    def has_goal(self) -> bool:
        """Whether the setting says how much to prune."""
        return self.goal is not None or self.sparse_threshold is not None


class QuantizationSetting(Setting):
    """How one target is quantized.

    Attributes:
        quant_dtype: ``int{n}``, ``uint{n}`` (1 to 32 bits), ``float8_e4m3fn``, ``float8_e5m2``; None stays
            float.
        quant_scheme: ``affine`` or ``symmetric``; None leaves it to the method.
        granularity: Which entries share a scale; ``default`` leaves it to the method.
        narrow_range: Leave out the lowest level (int8: -127 to 127); None does so for signed symmetric numbers.
        apply_method: NNI's ``clamp_round``, ``qat_clamp_round`` or ``bypass``.
        fuse_names: Names of modules that act as one: ``[("conv1", "bn1", "relu1")]``.
    """

    quant_dtype: str | None = None
    quant_scheme: Literal["affine", "symmetric"] | None = None
    granularity: GranularityValue = "default"
    narrow_range: bool | None = None
    apply_method: Literal["bypass", "clamp_round", "qat_clamp_round"] = "clamp_round"
    fuse_names: tuple[tuple[str, ...], ...] | None = None

    @field_validator("granularity")
    @classmethod
    def _check_granularity(cls, value: GranularityValue) -> GranularityValue:
        if implied_ratio(value) is not None:
            raise ValueError(f"{value!r} is a pattern of pruning, not of scales")
        return check_value(value)

    @field_validator("quant_dtype")
    @classmethod
    def _check_dtype(cls, value: str | None) -> str | None:
        if value is None or value in FLOAT_DTYPES:
            return value
        match = re.fullmatch(r"u?int([0-9]+)", value)
        if match and 1 <= int(match[1]) <= 32:
            return value
        known = ["int8", "uint8", "int4", "uint4", *FLOAT_DTYPES]
        raise ValueError(
            f"{value!r} is no number format (int1 to int32, uint1 to uint32, {', '.join(FLOAT_DTYPES)})"
            f"{did_you_mean(value, known)}"
        )


class DistillationSetting(Setting):
    """How one target is taught.

    Attributes:
        lambda_: Weight of this target's loss (key ``lambda``), a number or a schedule (``schedule(step) -> number``, or
            a mapping such as ``{"linear": {"start": 1, "end": 0, "steps": 100}}``); None is 1.
        link: Name, or names, of the teacher's modules; None or ``auto`` finds the one that corresponds.
        apply_method: Name of the loss, one of :data:`DISTILLATION_METHODS`; None is ``mse``.
        options: Options of the loss by name, such as ``{"temperature": 4.0}``; numbers or schedules.
    """

    lambda_: Any = Field(default=None, alias="lambda")
    link: str | tuple[str, ...] | None = None
    apply_method: str | None = None
    options: dict[str, Any] | None = None

    @field_validator("lambda_")
    @classmethod
    def _check_lambda(cls, value: Any) -> Any:
        if value is None or callable(value) or isinstance(value, Mapping):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{value!r} is not a number")
        if not math.isfinite(value):
            raise ValueError(f"{value!r} is not finite")
        return float(value)

    @field_validator("apply_method")
    @classmethod
    def _check_method(cls, value: str | None) -> str | None:
        if value is None or value in DISTILLATION_METHODS:
            return value
        known = ", ".join(DISTILLATION_METHODS)
        raise ValueError(f"{value!r} is not one of {known}{did_you_mean(value, DISTILLATION_METHODS)}")


class FactorizationSetting(Setting):
    """How one layer becomes a product of smaller ones; without a rank of its own it takes part in the call's target.

    Attributes:
        method: ``svd``, ``tucker``, ``cp``, ``spatial``; ``auto`` is SVD for matrices and Tucker-2 for convolutions.
        rank: A number, for Tucker-2 perhaps one for outputs and one for inputs, or ``vbmf``: as evidence supports.
        rank_ratio: Share of the full rank.
        energy: Share of the energy that is kept.
        round_to: Ranks become a multiple of this, where they can.
        minimum: No rank is smaller, unless it is full.
    """

    method: Literal["auto", "svd", "tucker", "cp", "spatial"] = "auto"
    rank: PositiveCount | tuple[PositiveCount, PositiveCount] | Literal["vbmf"] | None = None
    rank_ratio: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None
    energy: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] | None = None
    round_to: PositiveCount = 1
    minimum: PositiveCount = 1

    @field_validator("rank", mode="before")
    @classmethod
    def _check_rank(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "vbmf":
            raise ValueError(f"a rank is a number, a pair of them, or 'vbmf'{did_you_mean(value, ['vbmf'])}")
        if isinstance(value, list | tuple) and len(value) == 1:
            return value[0]
        return value

    @model_validator(mode="after")
    def _check_together(self) -> FactorizationSetting:
        given = [name for name in ("rank", "rank_ratio", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other")
        return self


AnySetting = PruningSetting | QuantizationSetting | DistillationSetting | FactorizationSetting

_CLASSES: dict[str, type[Setting]] = {
    "pruning": PruningSetting,
    "quantization": QuantizationSetting,
    "distillation": DistillationSetting,
    "factorization": FactorizationSetting,
}


def setting_class(kind: str) -> type[Setting]:
    """Return the setting class of a kind.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in _CLASSES:
        raise ConfigError(f"kind {kind!r} is not one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return _CLASSES[kind]


def setting_keys(kind: str) -> list[str]:
    """Return the keys that a config_list may use for the settings of a kind."""
    return [field.alias or name for name, field in setting_class(kind).model_fields.items()]


def other_kind_of(key: str, kind: str) -> str | None:
    """Return another kind that knows a key, to say so in the error."""
    return next((other for other in KINDS if other != kind and key in setting_keys(other)), None)


def validate(kind: str, values: Mapping[str, Any], where: str) -> Any:
    """Turn plain values into a setting of a kind.

    Args:
        kind: ``pruning``, ``quantization``, ``distillation`` or ``factorization``.
        values: Keys and values as in a config_list.
        where: What the values belong to, for the message: ``config_list[2]``.

    Raises:
        ConfigError: Naming the place, the key and what is wrong with it.
    """
    known = setting_keys(kind)
    for key in values:
        if key not in known:
            other = other_kind_of(key, kind)
            hint = f" (it belongs to {other})" if other else did_you_mean(key, known)
            raise ConfigError(f"{where}: key {key!r} is not known for {kind}{hint}")
    try:
        return setting_class(kind).model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    """Return the first thing that is wrong, in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    place = [str(part) for part in first["loc"] if isinstance(part, str | int)]
    if not place:
        return message
    given = repr(first.get("input"))
    shown = given if len(given) <= 60 else given[:57] + "..."
    if first["type"] == "extra_forbidden":  # only inside align; keys of a setting are checked before
        return f"key {place[0]!r}: {place[-1]!r} is not known{did_you_mean(place[-1], Align.model_fields)}"
    hint = ""
    if first["type"] == "literal_error" and isinstance(first.get("input"), str):
        hint = did_you_mean(first["input"], re.findall(r"'([^']*)'", str(first["ctx"]["expected"])))
    return f"key {place[0]!r}: {message} (got {shown}){hint}"
