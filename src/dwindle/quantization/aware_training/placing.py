"""Where quantizers stand while a model trains: the places of its int8 file, with normalizations still running."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey
from dwindle.quantization.folding import Fold, find_folds
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.operators import Backend, get_backend
from dwindle.quantization.overrides import Overrides, TargetSetting
from dwindle.quantization.placement import place
from dwindle.quantization.places import Placement
from dwindle.quantization.recording import Recording, record
from dwindle.quantization.weights import is_depthwise
from dwindle.training.inputs import Inputs

_HALF = NumberFormat(-63, 63, True)
"""Levels of which no two add up to more than 128, so that 16-bit sums of two products cannot saturate."""

_BIAS = (2,)
"""Where torch's own convolutions and linear layers give their bias to the function."""


@dataclass(frozen=True)
class Bits:
    """How many bits what has, where the config_list says nothing.

    Attributes:
        weights: Bits of weights (symmetric, one scale for each output channel).
        activations: Bits of activations (unsigned levels with a zero point).
        ends: Bits of the first and the last layer's weight and input.
    """

    weights: int = 8
    activations: int = 8
    ends: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
                raise ConfigError(f"bits.{name} is a number from 2 to 8, not {value!r}")

    @property
    def activation_form(self) -> NumberFormat:
        """Levels of activations."""
        return NumberFormat.parse(f"uint{self.activations}", "affine")

    @property
    def weight_form(self) -> NumberFormat:
        """Levels of weights."""
        return NumberFormat.parse(f"int{self.weights}", "symmetric")

    @property
    def end_setting(self) -> dict[str, TargetSetting]:
        """What the first and the last layer get."""
        return {
            "weight": TargetSetting(NumberFormat.parse(f"int{self.ends}", "symmetric")),
            "_input_0": TargetSetting(NumberFormat.parse(f"uint{self.ends}", "affine")),
        }


@dataclass
class TrainingPlaces:
    """Where quantizers stand.

    Attributes:
        final: Places in the model whose normalizations are folded away.
        training: The same while they still run: what stood behind a layer stands behind its normalization.
        folds: The normalizations that will be folded.
        borrowed: Names of rounded parameters that something else reads too, in float.
        ends: Modules of the first and the last layer.
    """

    final: Placement
    training: Placement
    folds: list[Fold]
    borrowed: frozenset[str]
    ends: frozenset[str]

    @property
    def normalization_of(self) -> dict[str, str]:
        """Path of the normalization behind each layer that has one."""
        return {fold.layer: fold.normalization for fold in self.folds}


def find_places(
    model: nn.Module,
    example: Inputs,
    overrides: Overrides,
    bits: Bits,
    backend: str | Backend | None,
    avoid_saturation: bool,
) -> TrainingPlaces:
    """Decide where quantizers stand.

    Args:
        model: The model, with or without simulators; not changed.
        example: Arguments to record it with.
        overrides: What the user's ``config_list`` wants.
        bits: Bits where that says nothing.
        backend: Whose operators run in integers; None is ``"onnxruntime"`` where all has 8 bits, else ``"layers"``.
        avoid_saturation: Keep 8-bit weights to levels that older processors add without saturation.

    Raises:
        ConfigError: No operator can run in integers with these settings.
    """
    eight = bits.weights == bits.activations == 8
    table = get_backend(backend if backend is not None else "onnxruntime" if eight else "layers")
    with simulate.disabled(model):
        model = simulate.gathered(model)
        folds = find_folds(model, record(model, *example))
        recording = record(model, *example, {fold.call for fold in folds})
    ends = _ends(recording, table, overrides)
    settings = {module: dict(targets) for module, targets in overrides.settings.items()}
    for module in ends:
        settings[module] = {**bits.end_setting, **settings.get(module, {})}
    complete = Overrides(settings, bits.weight_form)
    final = place(recording, table, complete, bits.activation_form)
    if not final.weights:
        raise ConfigError("no operation of this model can run in integers with these settings")
    folded = {fold.layer for fold in folds}
    for key, found in final.weights.items():
        if key.module in folded and found.bias is None:
            found.bias, found.bias_name = (
                _BIAS,
                f"{key.module}.bias",
            )  # that of the normalization, once it is folded
        if found.block is not None:
            raise ConfigError(f"{found.name}: scales for groups of a channel are not trained; use 'default'")
        if not found.form.symmetric or not found.form.signed:
            raise ConfigError(
                f"{found.name}: weights are trained with symmetric signed levels, such as 'int4'"
            )
        if (
            avoid_saturation
            and found.form.highest == 127
            and _pairs(model, key, final.forms[found.input_quantizer])
        ):
            found.form = _HALF
    behind = _behind_normalizations(final, folds)
    return TrainingPlaces(final, behind, folds, _borrowed(recording, final), ends)


def _ends(recording: Recording, table: Backend, overrides: Overrides) -> frozenset[str]:
    """Return the modules of the first and the last layer that may run in integers."""
    layers = [
        operation.key.module
        for operation in recording.operations
        if operation.key.operation in table.compute and not overrides.is_float(operation.key.module)
    ]
    return frozenset((*layers[:1], *layers[-1:]))


def _borrowed(recording: Recording, final: Placement) -> frozenset[str]:
    """Return the names of rounded parameters that other calls read too."""
    names = {found.name for found in final.weights.values()}
    return frozenset(
        value.name
        for operation in recording.operations
        if operation.key not in final.weights
        for _, value in operation.inputs
        if value.name is not None and value.name in names
    )


def _pairs(model: nn.Module, key: CallKey, activation: NumberFormat) -> bool:
    """Say whether a kernel adds products of this weight in pairs that 16 bits may not hold."""
    if activation.highest - activation.lowest <= 127:
        return False
    module = model.get_submodule(key.module)
    weight, groups = module._parameters.get("weight"), getattr(module, "groups", 1)
    return weight is None or not is_depthwise(weight, groups)


def _behind_normalizations(final: Placement, folds: list[Fold]) -> Placement:
    behind = {fold.layer: fold.call for fold in folds}
    outputs = {}
    for key, quantizer in final.outputs.items():
        moves = key in final.weights and key.module in behind
        outputs[behind[key.module] if moves else key] = quantizer
    return replace(final, outputs=outputs)
