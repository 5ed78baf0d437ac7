"""Post-training quantization in one call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.bias_correction import correct_biases
from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.folding import Fold, apply_folds, find_folds
from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.operators import Backend, get_backend
from dwindle.quantization.overrides import overrides_from_config
from dwindle.quantization.placement import Placement, place, summarize
from dwindle.quantization.plan import plan_of, record_history
from dwindle.quantization.recording import record
from dwindle.quantization.simulation import (
    ObservingMode,
    PlacedMode,
    Simulation,
    WeightSlot,
    attach,
    is_quantized,
)
from dwindle.quantization.weights import is_depthwise, weight_scale
from dwindle.training.inputs import Inputs, forward_inputs, input_batches


@dataclass(frozen=True)
class Preset:
    """Levels of activations and how their ranges are found.

    Attributes:
        activation: Levels of activations.
        observer: Name of the observer.
    """

    activation: NumberFormat
    observer: str


PRESETS: dict[str, Preset] = {
    "int8": Preset(NumberFormat.parse("uint8", "affine"), "histogram"),
    "int8_minmax": Preset(NumberFormat.parse("uint8", "affine"), "minmax"),
}
"""``int8``: weights int8 symmetric per output channel, activations uint8 affine per tensor."""

CORRECTION_BATCHES = 8
"""Batches that are kept for bias correction."""


def quantize(
    model: nn.Module,
    calibration_data: Any,
    *,
    preset: str = "int8",
    config_list: list[dict[str, Any]] | None = None,
    example_inputs: Any = None,
    backend: str | Backend = "onnxruntime",
    observer: str | Callable[[], Observer] | None = None,
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    avoid_saturation: bool = True,
    bias_correction: bool = True,
) -> nn.Module:
    """Quantize a trained model after training: fold, place quantizers, and set their ranges from data.

    Args:
        model: A float model; it is not changed.
        calibration_data: An iterable of batches: tensors, tuples (labels behind the inputs are left out),
            or mappings by argument name. A few dozen samples are enough.
        preset: ``"int8"``: weights int8 symmetric per output channel (levels -127 to 127), activations uint8
            affine per tensor, zero exactly representable, ranges of least squared error.
            ``"int8_minmax"``: the same with the whole ranges seen.
        config_list: Other settings for single targets (``quant_dtype``, ``quant_scheme``, ``granularity``);
            ``quant_dtype: None`` leaves a target in float.
        example_inputs: Arguments to record the model with: a tensor, a tuple, or a mapping; the first batch
            when not given.
        backend: The runtime whose placement to use: ``"onnxruntime"`` (good in OpenVINO too) or
            ``"openvino"``.
        observer: How ranges are found: ``"minmax"``, ``"moving_average"``, ``"percentile"``, ``"histogram"``,
            or a function that makes an observer; the preset's when not given.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Read at most so many batches.
        bias_correction: Put every channel's mean back where it was in float, on at most 8 batches.
        avoid_saturation: Scale weights so that processors without VNNI compute the same as others (see
            :func:`dwindle.quantization.weights.weight_scale`). Switch it off, for up to one more bit of
            precision, when the file runs only on processors with VNNI, AMX or ARM's dot product.

    Returns:
        A copy in evaluation mode that simulates int8 in its ordinary forward. Its int8 file is written by
        ``dwindle.export``.

    Raises:
        ConfigError: An argument is not valid, nothing can be quantized, or the model is quantized already.
    """
    chosen = _preset(preset)
    table = get_backend(backend)
    make_observer(observer or chosen.observer)
    if is_quantized(model):
        raise ConfigError("this model is quantized already; quantize the original instead")
    overrides = overrides_from_config(model, config_list)
    simulated = copy.deepcopy(model).eval()
    batches = input_batches(simulated, calibration_data, adapt, max_batches, "calibration_data")
    example = (
        None if example_inputs is None else forward_inputs(simulated, example_inputs, lambda batch: batch)
    )
    kept: list[Inputs] = []
    if example is None:
        example = next(batches)
        kept.append(example)

    folds = find_folds(simulated, record(simulated, *example))
    apply_folds(simulated, folds)
    recording = record(simulated, *example, {fold.call for fold in folds})
    placement = place(recording, table, overrides, chosen.activation)
    if not placement.weights:
        raise ConfigError("no operation of this model can run in int8 with these settings")

    observers = [make_observer(observer or chosen.observer) for _ in placement.names]
    ranges = Simulation(placement, {}, folds)
    for batch in itertools.chain(list(kept), batches):
        run_with(simulated, ObservingMode(ranges, observers), *batch)
        if len(kept) < CORRECTION_BATCHES and not (kept and batch is kept[0]):
            kept.append(batch)
    parameters, slots = _parameters(simulated, placement, folds, observers, example, avoid_saturation)
    simulation = Simulation(placement, slots, folds)
    if bias_correction:
        correct_biases(simulated, simulation, parameters, kept)
    attach(simulated, simulation, parameters)
    record_history(
        simulated, {"preset": preset, "backend": table.name, **summarize(placement)}, plan_of(simulated)
    )
    return simulated


def _parameters(
    model: nn.Module,
    placement: Placement,
    folds: list[Fold],
    observers: list[Observer],
    example: Inputs,
    avoid_saturation: bool,
) -> tuple[tuple[Tensor, ...], dict[CallKey, WeightSlot]]:
    """Return the packed scales and zero points of activations and weights, and where weights' stand."""
    scale, zero_point = _activation_parameters(placement, observers)
    slots, weight_scales = weight_parameters(model, placement, folds, example, scale, avoid_saturation)
    zeros = torch.zeros(len(weight_scales), dtype=torch.int32)
    device = next(model.parameters()).device
    return tuple(part.to(device) for part in (scale, zero_point, weight_scales, zeros)), slots


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def _activation_parameters(placement: Placement, observers: list[Observer]) -> tuple[Tensor, Tensor]:
    scales, zero_points = [], []
    for name, form, observer in zip(placement.names, placement.forms, observers, strict=True):
        try:
            low, high = observer.range(form)
        except ValueError as error:
            raise ConfigError(f"no finite value reached {name} in the calibration data: {error}") from error
        scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), form)
        scales.append(scale)
        zero_points.append(zero_point)
    return torch.stack(scales), torch.stack(zero_points)


class _WeightsMode(PlacedMode):
    """Takes the weights as the calls read them (after masks and other parametrizations)."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.weights: dict[Any, Tensor] = {}
        self.biases: dict[Any, Tensor] = {}
        self.groups: dict[Any, int] = {}

    def on_call(self, key: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the weight and the bias of a call."""
        slot = self.simulation.slots.get(key)
        if slot is not None:
            for found, position in ((self.weights, slot.place.position), (self.biases, slot.place.bias)):
                if position is not None:
                    where = position[0]
                    found[key] = args[where] if isinstance(where, int) else kwargs[where]
            self.groups[key] = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        return super().on_call(key, func, args, kwargs)


def weight_parameters(
    model: nn.Module,
    placement: Placement,
    folds: list[Fold],
    example: Inputs,
    activation_scale: Tensor,
    avoid_saturation: bool,
) -> tuple[dict[Any, WeightSlot], Tensor]:
    """Return the slots of all weights and their packed scales.

    Scales are kept large enough that the int32 bias, whose scale is input scale times weight scale, does not
    overflow: a channel of nearly zero weights would otherwise lose its bias in the runtime.
    """
    slots = {key: WeightSlot(weight, 0, 0) for key, weight in placement.weights.items()}
    mode = _WeightsMode(Simulation(placement, slots, folds))
    run_with(model, mode, *example)
    scales, start = [], 0
    for key, slot in slots.items():
        found = slot.place
        weight = mode.weights[key].detach()
        pairs = avoid_saturation and not is_depthwise(weight, mode.groups.get(key, 1))
        scale = weight_scale(weight, found.axis, found.form, avoid_saturation=pairs)
        bias = mode.biases.get(key)
        if bias is not None:
            floor = bias.detach().abs().double() / (float(activation_scale[found.input_quantizer]) * 2.0**30)
            scale = torch.maximum(scale, floor if floor.numel() == scale.numel() else floor.max())
        slot.start, slot.length = start, scale.numel()
        start += scale.numel()
        scales.append(scale.float().reshape(-1).cpu())
    return slots, torch.cat(scales)
