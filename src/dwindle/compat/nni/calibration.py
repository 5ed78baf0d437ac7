"""Scales and zero points of integer models in NNI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dwindle import quantization
from dwindle.quantization.overrides import TargetSetting

Calibration = dict[str, dict[str, dict[str, Any]]]
"""Scales and zero points by module and target."""

Settings = Mapping[str, Mapping[str, TargetSetting]]
"""What a config says, by module and target."""


def become(model: nn.Module, made: nn.Module) -> None:
    """Make a float model the quantized one that was made of a copy of it, in place."""
    quantization.apply_plan(model, quantization.plan_of(made))
    model.load_state_dict(made.state_dict())


def calibration_of(model: nn.Module, settings: Settings | None = None) -> Calibration:
    """Return scales and zero points of an integer model in NNI's form.

    Args:
        model: What :func:`dwindle.quantize` made.
        settings: What the user asked for. Outputs that are named are listed also where a runtime rounds them as the
            input of what reads them. Weights of eight bits are said to have eight also where the levels at the ends
            are not used, so that older processors do not saturate.

    Returns:
        ``{module: {target: {"scale", "zero_point", "quant_dtype", "quant_scheme", "quant_bits", "tracked_min",
        "tracked_max"}}}``.
    """
    from dwindle.quantization.simulation import simulation_of

    simulation, settings = simulation_of(model), settings or {}
    scale, zero_point, weight_scale, weight_zero_point = quantization.quantization_parameters(model)
    found: Calibration = {}

    def activation(number: int) -> dict[str, Any]:
        return _entry(scale[number], zero_point[number], simulation.forms[number])

    for key, slot in simulation.slots.items():
        part, place = slice(slot.start, slot.start + slot.length), slot.place
        asked = settings.get(key.module, {}).get("weight")
        eight = asked is not None and asked.form is not None and asked.form.bits == 8
        bits = 8 if eight and place.form.bits == 7 else place.form.bits
        found.setdefault(key.module, {})["weight"] = _entry(
            weight_scale[part], weight_zero_point[part], place.form, bits
        )
        found[key.module]["_input_0"] = activation(place.input_quantizer)
    for key, number in simulation.placement.outputs.items():
        if key.module:
            found.setdefault(key.module, {})["_output_0"] = activation(number)
    for number, name in enumerate(simulation.placement.names):
        module = name.partition("/")[0]
        if "_output_0" in settings.get(module, {}) and "_output_0" not in found.get(module, {}):
            found.setdefault(module, {})["_output_0"] = activation(number)
    return found


def _entry(
    scale: torch.Tensor, zero_point: torch.Tensor, form: quantization.NumberFormat, bits: int | None = None
) -> dict[str, Any]:
    bits = form.bits if bits is None else bits
    return {
        "scale": scale.clone(),
        "zero_point": zero_point.clone(),
        "quant_dtype": f"{'' if form.signed else 'u'}int{bits}",
        "quant_scheme": "symmetric" if form.symmetric else "affine",
        "quant_bits": bits,
        "tracked_min": (form.lowest - zero_point) * scale,
        "tracked_max": (form.highest - zero_point) * scale,
    }
