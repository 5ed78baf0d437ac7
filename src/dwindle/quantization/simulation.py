"""The simulated model: quantizers at their places, applied while the user's own eager forward runs.

Everything a quantizer needs stands in four buffers of the root module (scales and zero points of activations
and of weights, packed), so ``state_dict``, ``.to()`` and ``deepcopy`` treat them like any other state, and no
module is added that a container could trip over. The parameters stay the user's: a weight is quantized where
a call reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import (
    CallKey,
    CallMode,
    ModulePath,
    map_tensors,
    remove_hooks,
    replace_at,
    track_modules,
    untrack_modules,
)
from dwindle.quantization.folding import Fold
from dwindle.quantization.integer_sums import repeated, summed_in_integers
from dwindle.quantization.levels import fake_quantize
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.observers import Observer
from dwindle.quantization.padding import real_tokens
from dwindle.quantization.places import Placement, WeightPlace

ATTRIBUTE = "_dwindle_quantization"
BUFFERS = tuple(
    f"{ATTRIBUTE}_{name}"
    for name in ("activation_scale", "activation_zero_point", "weight_scale", "weight_zero_point")
)
NODE_DOMAIN = "dwindle"
"""Domain of the placeholder operators that an export records, and replaces before the file is written."""


@dataclass
class WeightSlot:
    """Where a weight's scales stand in the packed buffers, and what the weight is."""

    place: WeightPlace
    start: int
    length: int


@dataclass
class Simulation:
    """All that makes a model simulate int8; it hangs on the root module outside of its submodules.

    Attributes:
        forms: Levels of each activation quantizer.
        names: Name of each activation quantizer.
        placement: Which quantizer stands where.
        slots: Weights by the call that reads them.
        folds: Batch normalizations that were folded away.
        path: Follows the running module.
        exporting: True while an export records the forward.
        captured: While a dictionary, weights and biases are put in as calls read them.
        factors: What parameters were multiplied by without changing the float model's function, by name.
        reconstructed: What learned rounding brought, block by block.
    """

    placement: Placement
    slots: dict[CallKey, WeightSlot]
    folds: list[Fold]
    path: ModulePath = field(default_factory=ModulePath)
    exporting: bool = False
    captured: dict[tuple[CallKey, str], Tensor] | None = None
    running: list[SimulationMode] = field(default_factory=list)
    factors: dict[str, Tensor] = field(default_factory=dict)
    reconstructed: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.passed_over = {fold.call for fold in self.folds}
        self.operations = {
            key.operation
            for keys in (self.placement.outputs, self.placement.inputs, self.slots, self.passed_over)
            for key in keys
        }

    @property
    def forms(self) -> list[NumberFormat]:
        """Levels of each activation quantizer."""
        return self.placement.forms

    def has_integer_kernel(self, slot: WeightSlot) -> bool:
        """Say whether a runtime may compute a call in integers: both operands in bytes, a scale for a whole channel.

        Everything else runs in float between dequantizing and quantizing, with a bias in float.
        """
        forms = slot.place.form, self.forms[slot.place.input_quantizer]
        return slot.place.block is None and all(form.stored in ("int8", "uint8") for form in forms)


class PlacedMode(CallMode):
    """Applies something at every activation quantizer's place, and something at every weight's."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.path)
        self.simulation = simulation

    def watches(self, operation: str) -> bool:
        """Name only the operations that carry a quantizer somewhere."""
        return operation in self.simulation.operations

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Return what readers get of an activation."""
        return value

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Return what the call gets of its weight."""
        return value

    def bias(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Return what the call gets of its bias."""
        return value

    def compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: CallKey, slot: WeightSlot
    ) -> Any:
        """Run a call with a quantized weight, its operands being what the methods above gave."""
        return func(*args, **kwargs)

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Return what a call with a quantized weight gave, before the quantizer behind it."""
        return value

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call with its quantizers around it."""
        simulation = self.simulation
        if key in simulation.passed_over:
            return args[0]
        for position, quantizer in simulation.placement.inputs.get(key, {}).items():
            args, kwargs = replace_at(args, kwargs, position, partial(self.activation, quantizer=quantizer))
        slot = simulation.slots.get(key)
        if slot is not None:
            weight = partial(self.weight, key=key, slot=slot)
            args, kwargs = replace_at(args, kwargs, slot.place.position, weight)
            if slot.place.bias is not None:
                bias = partial(self.bias, key=key, slot=slot)
                args, kwargs = replace_at(args, kwargs, slot.place.bias, bias)
        if slot is None:
            output = func(*args, **kwargs)
        else:
            output = self.result(self.compute(func, args, kwargs, key, slot), key, slot)
        made = simulation.placement.outputs.get(key)
        return output if made is None else map_tensors(output, partial(self.activation, quantizer=made))


class SimulationMode(PlacedMode):
    """Rounds every quantized value to its levels. Reads nothing back to the host.

    Attributes:
        rounds_biases: Whether biases are rounded as well.
    """

    rounds_biases = True

    def __init__(self, simulation: Simulation, parameters: tuple[Tensor, ...]) -> None:
        super().__init__(simulation)
        self.scale, self.zero_point, self.weight_scale, self.weight_zero_point = parameters

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Round an activation, or record a placeholder while exporting."""
        if self.simulation.exporting:
            return _placeholder("Activation", value, {"quantizer": quantizer})
        form = self.simulation.forms[quantizer]
        return fake_quantize(value, self.scale[quantizer], self.zero_point[quantizer], form)

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Round a weight, or record a placeholder while exporting."""
        if self.simulation.exporting:
            return _placeholder("Weight", value, {"call": repr(tuple(key))})
        if self.simulation.captured is not None:
            self.simulation.captured[key, "weight"] = value.detach().clone()
        part = slice(slot.start, slot.start + slot.length)
        scale, zero_point = self.weight_scale[part], self.weight_zero_point[part]
        return fake_quantize(value, scale, zero_point, slot.place.form, slot.place.axis, slot.place.block)

    def bias(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Round a bias to int32 levels of input scale times weight scale, as integer kernels add it."""
        if not self.simulation.has_integer_kernel(slot):
            return value
        if self.simulation.exporting:
            return _placeholder("Bias", value, {"call": repr(tuple(key))})
        if self.simulation.captured is not None:
            self.simulation.captured[key, "bias"] = value.detach().clone()
        scale = (
            self.weight_scale[slot.start : slot.start + slot.length] * self.scale[slot.place.input_quantizer]
        )
        return round_bias(value, scale)

    def compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: CallKey, slot: WeightSlot
    ) -> Any:
        """Sum whole numbers where a runtime has an integer kernel."""
        simulation, place = self.simulation, slot.place
        if simulation.exporting or not simulation.has_integer_kernel(slot):
            return func(*args, **kwargs)
        scales = self.scale[place.input_quantizer], self.weight_scale[slot.start : slot.start + slot.length]
        positions = place.position, place.bias
        return summed_in_integers(
            func,
            key.operation,
            args,
            kwargs,
            scales,
            place.axis,
            positions,
            round_bias=self.rounds_biases,
        )


def round_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Round a bias to multiples of a scale, with the gradient of the identity.

    Args:
        bias: Shape ``(channels,)`` or broadcast like it.
        scale: One value, or one per channel (of a group, which is repeated).
    """
    scale = repeated(scale, bias.numel())
    rounded = ((bias / scale).round() * scale).to(bias.dtype)
    return bias + (rounded - bias).detach()


def _placeholder(kind: str, value: Tensor, attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{NODE_DOMAIN}::{kind}", (value,), attrs=attributes, dtype=value.dtype, shape=value.shape, version=1
    )


class ObservingMode(PlacedMode):
    """Shows every activation to its observer, without padding; values stay as they are.

    Args:
        simulation: Where quantizers stand.
        observers: One per quantizer.
        real: Which tokens are not padding.
        useful: The part of a quantizer's values that counts, where not all do.
    """

    def __init__(
        self,
        simulation: Simulation,
        observers: list[Observer],
        real: Tensor | None = None,
        useful: Mapping[int, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(simulation)
        self.observers, self.real, self.useful = observers, real, useful or {}

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Show the value to the quantizer's observer.

        Raises:
            ConfigError: It holds NaN.
        """
        if bool(torch.isnan(value).any()):
            name = self.simulation.placement.names[quantizer]
            raise ConfigError(f"the calibration data make NaN at {name}; no range can be told from that")
        seen = real_tokens(value, self.real)
        self.observers[quantizer].update(
            seen.clamp(*self.useful[quantizer]) if quantizer in self.useful else seen
        )
        return value


class StartSimulation:
    """Forward pre-hook of the root: switches the simulation on."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Enter the mode."""
        mode = SimulationMode(self.simulation, tuple(getattr(module, name) for name in BUFFERS))
        self.simulation.running.append(mode)
        self.simulation.path.stack.append("")
        mode.__enter__()


class StopSimulation:
    """Forward hook of the root: switches the simulation off, also when the forward raised."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave the mode."""
        if self.simulation.running:
            self.simulation.running.pop().__exit__(None, None, None)
            self.simulation.path.stack.clear()


def attach(model: nn.Module, simulation: Simulation, parameters: tuple[Tensor, ...]) -> None:
    """Make a model simulate, in place.

    Args:
        model: Its batch normalizations are folded already.
        simulation: What stands where.
        parameters: Activation scales (float32) and zero points (int32), one per quantizer; weight scales and
            zero points, packed as the slots say.

    Raises:
        ConfigError: The model simulates already.
    """
    if is_quantized(model):
        raise ConfigError("this model is quantized already; quantize the original instead")
    for name, value in zip(BUFFERS, parameters, strict=True):
        model.register_buffer(name, value)
    model.__dict__[ATTRIBUTE] = simulation
    track_modules(model, simulation.path)
    model.register_forward_pre_hook(StartSimulation(simulation), prepend=True)
    model.register_forward_hook(StopSimulation(simulation), always_call=True)


def detach_simulation(model: nn.Module) -> None:
    """Take the simulation off a model, in place; its weights stay as they are."""
    simulation = simulation_of(model)
    for name in BUFFERS:
        del model._buffers[name]
    del model.__dict__[ATTRIBUTE]
    untrack_modules(model, simulation.path)
    remove_hooks(model, lambda hook: isinstance(hook, StartSimulation | StopSimulation))


def is_quantized(model: nn.Module) -> bool:
    """Say whether :func:`dwindle.quantize` made this model."""
    return ATTRIBUTE in model.__dict__


def simulation_of(model: nn.Module) -> Simulation:
    """Return what makes a model simulate.

    Raises:
        ConfigError: The model was not quantized by dwindle.
    """
    if not is_quantized(model):
        raise ConfigError("this model was not quantized by dwindle: call dwindle.quantize first")
    simulation: Simulation = model.__dict__[ATTRIBUTE]
    return simulation


def quantization_parameters(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return activation scales and zero points, then packed weight scales and zero points (on the CPU)."""
    simulation_of(model)
    first, second, third, fourth = (getattr(model, name).detach().cpu() for name in BUFFERS)
    return first, second, third, fourth
