"""``dw.pack_integers``: layers that a quantized model simulates become layers that compute in integers, in torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import history
from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, EnterModule, LeaveModule, remove_hooks
from dwindle.quantization.simulation import (
    Simulation,
    WeightSlot,
    detach_simulation,
    quantization_parameters,
    round_bias,
    simulation_of,
)
from dwindle.realize.integer_layers import (
    IntegerConvolution,
    IntegerLayer,
    IntegerLinear,
    from_description,
    geometry,
)
from dwindle.realize.module_places import ModulePlaces
from dwindle.realize.packing import LEAST_SQNR, PackResult, held_bytes, put_in_place
from dwindle.training.inputs import forward_inputs

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_CONVOLUTIONS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


def pack_integers(model: nn.Module, example_inputs: Any, *, least_sqnr: float = LEAST_SQNR) -> PackResult:
    """Replace linear layers and convolutions of a quantized model by layers that compute in 8-bit integers.

    For running in torch, without a file. Weights take a quarter of the memory, and products run on oneDNN's integer
    kernels (Conv1d to Conv3d and Linear; what it brings is measured in ``benchmarks/integers.py``). The model must be
    quantized for this: ``dw.quantize(model, data, backend="torch")`` rounds inputs and weights of layers and nothing
    between them, so that the packed model computes what the simulation does. Layers that no kernel takes (attention's
    own products, transposed convolutions) stay simulated.

    Args:
        model: Made by :func:`dwindle.quantize`, or by ``finish()`` after training with quantizers; changed in place.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
        least_sqnr: Decibels that the outputs before and after must agree to.

    Returns:
        What was packed.

    Raises:
        ConfigError: The model is not quantized, or with roundings between the layers; or no layer can be packed.
        RealizeError: The outputs differ; the model is as it was.
    """
    simulation = simulation_of(model)
    if simulation.placement.outputs:
        raise ConfigError(
            "this model rounds between its layers too, for another runtime; quantize it with backend='torch' instead"
        )
    inputs = forward_inputs(model, example_inputs, lambda batch: batch)
    result = PackResult(model)
    result.bytes["before"] = held_bytes(model)
    fresh, result.left = _layers(model, simulation, inputs)
    if not fresh:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result.left.items())
        raise ConfigError(f"no layer of this model can be packed ({reasons})")
    _, result.sqnr = put_in_place(model, fresh, inputs, least_sqnr)
    result.kernels = dict.fromkeys(fresh, "onednn")
    _forget(model, list(fresh))
    result.bytes["after"] = held_bytes(model)
    layers = {name: layer.description() for name, layer in fresh.items()}
    history.record(model, {"kind": "pack_integers", "layers": layers})
    return result


def replay_integers(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put empty integer layers where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The quantized model before that step, changed in place.
        entry: The step of its history.

    Raises:
        FileFormatError: The entry does not fit.
    """
    places = ModulePlaces(model)
    for name, description in entry["layers"].items():
        old = model.get_submodule(name)
        places.put(name, _with_hooks(old, from_description(description)).train(old.training))
    _forget(model, list(entry["layers"]))
    return model


def _layers(
    model: nn.Module, simulation: Simulation, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[dict[str, IntegerLayer], dict[str, str]]:
    """Return new layers by path, and what cannot be packed with the reason."""
    captured = _captured(model, simulation, inputs)
    scales, zero_points, weight_scales, _ = quantization_parameters(model)
    uses = Counter(key.module for key in simulation.slots)
    fresh: dict[str, IntegerLayer] = {}
    left: dict[str, str] = {}
    for key, slot in simulation.slots.items():
        layer = model.get_submodule(key.module)
        reason = _unfit(simulation, key, slot, layer, uses[key.module])
        if not reason and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            try:
                shape = geometry(layer)
            except ConfigError as error:
                reason = str(error)
        if reason:
            left[str(key)] = reason
            continue
        number = slot.place.input_quantizer
        scale = weight_scales[slot.start : slot.start + slot.length]
        weight, bias = captured[key, "weight"], captured.get((key, "bias"))
        if bias is not None:
            bias = round_bias(bias, scale * scales[number])
        steps = scale.reshape(-1, *[1] * (weight.dim() - 1))
        integers = (weight / steps).round().clamp(slot.place.form.lowest, slot.place.form.highest)
        numbers = (integers, scale, bias, scales[number], zero_points[number], simulation.forms[number])
        linear = isinstance(layer, nn.Linear)
        made = IntegerLinear(*numbers) if linear else IntegerConvolution(*numbers, **shape)
        fresh[key.module] = _with_hooks(layer, made)
    return fresh, left


def _with_hooks(old: nn.Module, fresh: IntegerLayer) -> IntegerLayer:
    """Return a new layer with the old one's hooks and buffers: the user's, and factors of its input."""
    for name, held in old._buffers.items():
        fresh.register_buffer(name, held)
    for kind in _HOOKS:
        getattr(fresh, kind).update(getattr(old, kind))
    remove_hooks(fresh, lambda hook: isinstance(hook, EnterModule | LeaveModule))
    return fresh


def _captured(
    model: nn.Module, simulation: Simulation, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[tuple[CallKey, str], Tensor]:
    """Return weights and biases as the calls read them, unrounded."""
    args, kwargs = inputs
    found: dict[tuple[CallKey, str], Tensor] = {}
    simulation.captured = found
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        simulation.captured = None
    return found


def _unfit(simulation: Simulation, key: CallKey, slot: WeightSlot, layer: nn.Module, uses: int) -> str:
    """Return why a layer cannot be packed; empty when it can."""
    linear = type(layer) is nn.Linear and key.operation == "linear"
    if not linear and _CONVOLUTIONS.get(type(layer)) != key.operation:
        return f"torch has no integer kernel for the {key.operation} of a {type(layer).__name__}"
    if uses > 1:
        return "it is called more than once, with inputs of other scales"
    if (
        not simulation.has_integer_kernel(slot)
        or slot.place.form.highest > 127
        or not slot.place.form.symmetric
    ):
        return "its numbers do not fit in 8 bits"
    if slot.place.axis not in (None, 0):
        return "its scales are not those of output channels"
    return ""


def _forget(model: nn.Module, layers: list[str]) -> None:
    """Take packed layers out of the simulation, and the simulation off a model that has nothing else to round."""
    simulation = simulation_of(model)
    for key in [key for key in simulation.slots if key.module in layers]:
        simulation.slots.pop(key)
        simulation.placement.weights.pop(key, None)
        simulation.placement.inputs.pop(key, None)
    if not simulation.slots:
        detach_simulation(model)
