"""What a ``config_list`` says about single targets, in the words of the placement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError
from dwindle.config.schema import QuantizationSetting
from dwindle.config.targets import Target
from dwindle.quantization.calls import CallKey
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.recording import Value


@dataclass(frozen=True)
class TargetSetting:
    """What was said about one target.

    Attributes:
        form: The levels, or None to leave the target in float.
        granularity: ``default``, ``out_channel``, ``per_channel``, a block list, or None for one scale.
    """

    form: NumberFormat | None
    granularity: Any = "default"


DEFAULT_WEIGHT = NumberFormat.parse("int8", "symmetric")


class Overrides:
    """Settings by module and target, over the preset.

    Args:
        settings: ``{module path: {target name: setting}}``.
        default_weight: Levels of weights that nothing was said about.
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, TargetSetting]],
        default_weight: NumberFormat = DEFAULT_WEIGHT,
    ) -> None:
        self.settings, self.default_weight = settings, default_weight

    def _get(self, module: str, target: str) -> TargetSetting | None:
        return self.settings.get(module, {}).get(target)

    def names(self, module: str) -> bool:
        """True when something was said about the weight or the input of this module itself."""
        return any(self._get(module, target) is not None for target in ("weight", "_input_0"))

    def is_float(self, module: str) -> bool:
        """True when the weight or the input of this module shall not be quantized."""
        said = [self._get(module, target) for target in ("weight", "_input_0")]
        return any(setting is not None and setting.form is None for setting in said)

    def is_float_output(self, key: CallKey) -> bool:
        """True when the output of this call's module shall not be quantized."""
        setting = self._get(key.module, "_output_0")
        return bool(key.module) and setting is not None and setting.form is None

    def input_form(self, module: str, default: NumberFormat) -> NumberFormat | None:
        """Return the levels of a module's input, or None for float."""
        setting = self._get(module, "_input_0")
        return default if setting is None else setting.form

    def output_form(self, modules: Iterable[str], default: NumberFormat) -> NumberFormat | None:
        """Return the levels of the output of the first module that has a say, or None for float."""
        for module in modules:
            setting = self._get(module, "_output_0")
            if module and setting is not None:
                return setting.form
        return default

    def weight_form(
        self, module: str, weight: Value, out_axis: int
    ) -> tuple[NumberFormat | None, int | None, int | None]:
        """Return the levels of a module's weight, the dimension with one scale per index, and the size of its blocks.

        A module that reads parameters of other names, or another module's (attention), is asked by the parameter's.

        Raises:
            ConfigError: No runtime has such scales.
        """
        owner, _, name = (weight.name or "").rpartition(".")
        setting = self._get(module, "weight") or self._get(owner, name)
        if setting is None:
            return self.default_weight, out_axis, None
        return setting.form, *_scales(setting.granularity, weight.rank, out_axis, module)


def _scales(granularity: Any, rank: int, out_axis: int, module: str) -> tuple[int | None, int | None]:
    """Return the dimension with a scale per index, and how many neighbours along the other one share it."""
    if granularity is None or granularity == "per_tensor":
        return None, None
    if granularity in ("default", "out_channel", "per_channel"):
        return out_axis, None
    if granularity == "in_channel":
        return 1 - out_axis, None
    if isinstance(granularity, list | tuple):
        blocks = [1] * (rank - len(granularity)) + list(granularity)
        single = [index for index, block in enumerate(blocks) if block != -1]
        if not single:
            return None, None
        if len(single) == 1 and blocks[single[0]] == 1:
            return single[0], None
        if rank == 2 and blocks[out_axis] == 1 and blocks[1 - out_axis] > 1:
            return out_axis, int(blocks[1 - out_axis])
    raise ConfigError(
        f"granularity {granularity!r} of {module}.weight: a weight has one scale, one for each channel, or (in linear "
        "layers) one for each group of inputs, such as [1, 32]; use 'default', 'out_channel', 'in_channel' or None"
    )


def overrides_from_config(model: nn.Module, config_list: list[dict[str, Any]] | None) -> Overrides:
    """Read a ``config_list`` of quantization settings.

    Args:
        model: The model that the names are about.
        config_list: NNI 3.0's keys; ``quant_dtype: None`` leaves a target in float.

    Raises:
        ConfigError: An entry is not valid.
    """
    if not config_list:
        return Overrides({})
    from dwindle.config import resolve

    settings: dict[str, dict[str, TargetSetting]] = {}
    for target, setting in resolve(model, config_list, kind="quantization").items():
        if target.name == "bias":
            continue  # biases are int32 with the scale of input times weight, always
        settings.setdefault(target.module, {})[target.name] = _setting(target, setting)
    return Overrides(settings)


def _setting(target: Target, setting: QuantizationSetting) -> TargetSetting:
    """Return what was said about a target.

    Raises:
        ConfigError: No runtime has such numbers or scales.
    """
    if setting.quant_dtype is None:
        return TargetSetting(None, setting.granularity)
    try:
        form = NumberFormat.parse(setting.quant_dtype, setting.quant_scheme, setting.narrow_range)
    except ConfigError as error:
        raise ConfigError(f"{target}: {error}") from error
    if target.name.startswith(("_input_", "_output_")) and not _is_whole(setting.granularity):
        raise ConfigError(
            f"{target}: granularity {setting.granularity!r} is not possible: integer kernels add products of all "
            "channels, so an activation has one scale; smooth=0.5 or equalize=True even out unequal channels"
        )
    return TargetSetting(form, setting.granularity)


def _is_whole(granularity: Any) -> bool:
    """Say whether a granularity means one scale for a whole activation; input and output channels are a weight's."""
    if isinstance(granularity, list | tuple):
        return all(block == -1 for block in granularity)
    return granularity in (None, "default", "per_tensor", "out_channel", "in_channel")
