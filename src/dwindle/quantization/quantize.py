"""Post-training quantization in one call."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.aware_training.bank import bank_of
from dwindle.quantization.bias_correction import correct_biases, correction_method
from dwindle.quantization.calls import run_with, without_nan
from dwindle.quantization.compensation import compensate
from dwindle.quantization.equalization import equalize as equalize_layers
from dwindle.quantization.explanation import unheeded_weights
from dwindle.quantization.fallback import quantize_within
from dwindle.quantization.folding import Fold, apply_folds, find_folds
from dwindle.quantization.free_scales import find_free_scales
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.operators import Backend, get_backend
from dwindle.quantization.outliers import divide_outliers
from dwindle.quantization.overrides import Overrides, overrides_from_config
from dwindle.quantization.padding import PADDING_MASK, padding_mask
from dwindle.quantization.placement import place
from dwindle.quantization.places import Placement, summarize
from dwindle.quantization.plan import plan_of, record_history
from dwindle.quantization.reconstruction import COMPENSATION, Reconstruction, get_rounding, reconstruct
from dwindle.quantization.recording import Recording, record, rectified_calls
from dwindle.quantization.scales import ScaleOptions, packed_parameters
from dwindle.quantization.simulation import ObservingMode, Simulation, attach, is_quantized
from dwindle.quantization.smoothing import smooth as smooth_activations
from dwindle.quantization.useful_ranges import useful_ranges
from dwindle.quantization.weights import check_weight_range
from dwindle.simulate import refuse_shards
from dwindle.training.inputs import Inputs, forward_inputs, input_batches
from dwindle.training.progress import tracked


@dataclass(frozen=True)
class Preset:
    """Levels of activations, how their ranges are found, and what is done against the loss.

    Attributes:
        activation: Levels of activations.
        observer: Name of the observer.
        rounding: How weights are rounded.
        outliers: Whether outlier channels are divided.
    """

    activation: NumberFormat
    observer: str
    rounding: str = "nearest"
    outliers: bool = False


PRESETS: dict[str, Preset] = {
    "int8": Preset(NumberFormat.parse("uint8", "affine"), "histogram"),
    "int8_minmax": Preset(NumberFormat.parse("uint8", "affine"), "minmax"),
    "int8_transformer": Preset(NumberFormat.parse("uint8", "affine"), "minmax", "gptq", outliers=True),
}
"""``int8``: weights int8 symmetric per output channel, activations uint8 affine per tensor."""

CORRECTION_BATCHES = 8
"""Batches that are kept for bias correction, where nothing asks for all of them."""

COMPENSATED_SHARE = 0.5
"""How much of the rounding error of weights is left, about, where it is compensated."""


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
    settle_scales: bool = True,
    equalize: bool = False,
    smooth: float | None = None,
    weight_range: str = "minmax",
    rounding: str | Reconstruction | None = None,
    outliers: bool | None = None,
    bias_correction: bool | str = True,
    padding: str | None = PADDING_MASK,
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.01,
) -> nn.Module:
    """Quantize a trained model after training: fold, place quantizers, and set their ranges from data.

    Args:
        model: A float model; it is not changed.
        calibration_data: An iterable of batches: tensors, tuples (labels behind the inputs are left out),
            or mappings by argument name. A few dozen samples are enough.
        preset: ``"int8"``: weights int8 symmetric per output channel (levels -127 to 127), activations uint8
            affine per tensor, zero exactly representable, ranges of least squared error.
            ``"int8_minmax"``: the same with the whole ranges seen. ``"int8_transformer"``: that with
            ``rounding="gptq"`` and ``outliers=True``.
        config_list: Other settings for single targets (``quant_dtype``, ``quant_scheme``, ``granularity``);
            ``quant_dtype: None`` leaves a target in float.
        example_inputs: Arguments to record the model with: a tensor, a tuple, or a mapping; the first batch
            when not given.
        backend: The runtime whose placement to use: ``"onnxruntime"`` (good in OpenVINO too) or
            ``"openvino"``.
        observer: How ranges are found: ``"minmax"``, ``"moving_average"``, ``"percentile"``, ``"histogram"``,
            ``"entropy"``, or a function that makes an observer; the preset's when not given.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Read at most so many batches.
        avoid_saturation: Scale weights so that processors without VNNI compute the same as others (see
            :func:`dwindle.quantization.weights.weight_scale`). Switch it off, for up to one more bit of
            precision, when the file runs only on processors with VNNI, AMX or ARM's dot product.
        settle_scales: Enlarge scales by up to a few percent so that no value of an integer kernel lies near a half,
            where runtimes round differently (:mod:`dwindle.quantization.requantization`): the file then gives what the
            simulation gives.
        equalize: Make the ranges of each channel equal in the layers that make and read it, wherever that
            leaves the float model the same function (:mod:`dwindle.quantization.equalization`).
        smooth: SmoothQuant's alpha, between 0 and 1: move outliers of activations into weights
            (:mod:`dwindle.quantization.smoothing`). None leaves them.
        outliers: Divide channels of the inputs of linear layers that are far larger than the rest, in front of the
            quantizer, at the cost of one product there (:mod:`dwindle.quantization.outliers`); the preset's when not
            given.
        weight_range: ``"minmax"``, or ``"mse"``: clip weights where that loses least, which helps below 8 bits.
        rounding: ``"nearest"``; ``"adaround"`` or ``"brecq"`` learn the rounding of each weight layer by layer
            or block by block (:mod:`dwindle.quantization.reconstruction`), on all of the calibration data;
            ``"gptq"`` computes one where errors make up for each other
            (:mod:`dwindle.quantization.compensation`), in seconds. The preset's when not given.
        bias_correction: Put every channel's mean back where it was in float: True corrects while the
            simulation runs, but only if data that was kept apart gains; ``"running"`` does so in any case,
            ``"sequential"`` goes layer after layer over all data, ``"fast"`` takes each layer by its own
            error alone (:mod:`dwindle.quantization.bias_correction`); False does not.
        padding: The argument of the forward, ``[batch, tokens]``, that is zero where a token is padding: such tokens
            count neither in ranges nor in means. Models without such an argument are not concerned.
        evaluate: Function from a model to its quality, larger is better. When given, the most harmful layers
            go back to float until at most ``max_drop`` is lost (:mod:`dwindle.quantization.fallback`).
        max_drop: How much of ``evaluate``'s value may be lost.

    Returns:
        A copy in evaluation mode that simulates int8 in its ordinary forward. Its int8 file is written by
        ``dwindle.export``.

    Raises:
        ConfigError: An argument is not valid, nothing can be quantized, or the model is quantized already.
        DwindleError: Values that are not finite were met where they cannot be passed over.
    """
    refuse_shards(model, "dw.quantize")
    if evaluate is not None:
        options = {name: value for name, value in locals().items() if name in _OPTIONS}
        return quantize_within(model, calibration_data, evaluate, max_drop, quantize, **options).model
    chosen, table = _preset(preset), get_backend(backend)
    make = partial(make_observer, observer or chosen.observer)
    make()
    learned = get_rounding(chosen.rounding if rounding is None else rounding)
    divides = chosen.outliers if outliers is None else outliers
    correction = correction_method(bias_correction)
    check_weight_range(weight_range)
    if is_quantized(model):
        raise ConfigError("this model is quantized already; quantize the original instead")
    if bank_of(model) is not None:
        raise ConfigError("this model is trained with quantizers: finish() or withdraw() those first")
    overrides = overrides_from_config(model, config_list)
    simulated = copy.deepcopy(model).eval()
    every = smooth is not None or learned is not None or divides or correction == "sequential"
    data = _Calibration(simulated, calibration_data, example_inputs, adapt, max_batches, every)

    folds = find_folds(simulated, record(simulated, *data.example))
    apply_folds(simulated, folds)
    factors = _rescale(simulated, data, folds, equalize, smooth)
    recording = record(simulated, *data.example, {fold.call for fold in folds})
    if divides:
        share = COMPENSATED_SHARE if learned == COMPENSATION else 1.0
        divided = divide_outliers(
            simulated,
            recording,
            data.kept,
            chosen.activation,
            weight_share=share,
            avoid_saturation=avoid_saturation,
            padding=padding,
        )
        for name, factor in divided.items():
            factors[name] = factors.get(name, torch.ones(())) * factor
        recording = record(simulated, *data.example, {fold.call for fold in folds})
    placement = place(recording, table, overrides, chosen.activation)
    if not placement.weights:
        raise ConfigError("no operation of this model can run in int8 with these settings")
    _warn_of_unheeded(overrides, placement)

    observers = [make() for _ in placement.names]
    ranges, useful = Simulation(placement, {}, folds), useful_ranges(recording, placement)
    for batch in data:
        real = padding_mask(batch[1], padding)
        run_with(simulated, ObservingMode(ranges, observers, real, useful), *batch)
    scales = ScaleOptions(avoid_saturation, weight_range, settle_scales)
    parameters, slots = packed_parameters(
        simulated, recording, placement, folds, observers, [data.example, *data.kept], scales
    )
    simulation = Simulation(placement, slots, folds, factors=factors)
    reference = simulated
    if learned is not None:
        reference = copy.deepcopy(simulated)
        simulation.reconstructed = _round(
            simulated, simulation, parameters, data.kept, learned, recording, padding
        )
    if correction is not None:
        correct_biases(
            simulated,
            simulation,
            parameters,
            data.kept,
            correction,
            reference,
            padding=padding,
            checked=bias_correction is True,
        )
    attach(simulated, simulation, parameters)
    record_history(
        simulated, {"preset": preset, "backend": table.name, **summarize(placement)}, plan_of(simulated)
    )
    return simulated


_OPTIONS = frozenset(inspect.signature(quantize).parameters) - {
    "model",
    "calibration_data",
    "evaluate",
    "max_drop",
}


class _Calibration:
    """The calibration data as inputs; some are kept to be read again.

    Args:
        model: Whose inputs they are.
        data: What the user gave.
        example_inputs: Arguments to record the model with, or None for the first batch.
        adapt: As in :func:`quantize`.
        limit: Batches to read at most.
        every: Keep all batches, or only as many as bias correction takes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        example_inputs: Any,
        adapt: Callable[[Any], Any] | None,
        limit: int | None,
        every: bool,
    ) -> None:
        self._rest = map(
            partial(without_nan, name="calibration_data"),
            input_batches(model, data, adapt, limit, "calibration_data"),
        )
        self.kept = list(self._rest if every else itertools.islice(self._rest, CORRECTION_BATCHES))
        self.example: Inputs = (
            self.kept[0]
            if example_inputs is None
            else forward_inputs(model, example_inputs, lambda batch: batch)
        )

    def __iter__(self) -> Iterator[Inputs]:
        return tracked(itertools.chain(self.kept, self._rest), "calibration: batches")


def _round(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: list[Inputs],
    rounding: str | Reconstruction,
    recording: Recording,
    padding: str | None,
) -> list[Any]:
    """Set the weights on levels, in place; return what that brought."""
    if isinstance(rounding, Reconstruction):
        relus = rectified_calls(recording)
        return list(reconstruct(model, simulation, parameters, batches, rounding, relus))
    return list(compensate(model, simulation, parameters, batches, padding))


def _rescale(
    model: nn.Module, data: _Calibration, folds: list[Fold], equalizes: bool, alpha: float | None
) -> dict[str, Tensor]:
    """Equalize and smooth a model in place; return by name what parameters were multiplied by."""
    if not equalizes and alpha is None:
        return {}
    scales = find_free_scales(model, *data.example, {fold.normalization for fold in folds})
    factors = equalize_layers(model, scales) if equalizes else {}
    if alpha is not None:
        for name, change in smooth_activations(model, scales, data.kept, alpha).items():
            factors[name] = factors[name] * change if name in factors else change
    return factors


def _warn_of_unheeded(overrides: Overrides, placement: Placement) -> None:
    """Say which weights stay in float although the config_list gives them a number format."""
    unheeded = unheeded_weights(overrides, placement)
    if unheeded:
        more = f" and {len(unheeded) - 5} more" if len(unheeded) > 5 else ""
        warnings.warn(
            f"{', '.join(unheeded[:5])}{more}: no int8 kernel of the backend reads this, so it stays in float "
            "(dwindle inspect --quantization says why)",
            stacklevel=3,
        )


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not known: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
