"""Where a quantized model loses: signal to noise of every quantized layer, float against quantized, worst first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, replace_at, run_with
from dwindle.quantization.folding import apply_folds
from dwindle.quantization.outliers import install_factor, installed_factors
from dwindle.quantization.simulation import (
    BUFFERS,
    PlacedMode,
    SimulationMode,
    WeightSlot,
    quantization_parameters,
    simulation_of,
)
from dwindle.training.inputs import input_batches
from dwindle.training.progress import tracked


@dataclass(frozen=True)
class LayerError:
    """What quantization costs at one layer.

    Attributes:
        name: The call.
        weight_bits: Bits of the weight.
        input_bits: Bits of the activation that it reads.
        input_range: Smallest and largest value that the activation's levels stand for.
        clipped: Share of the activation's values outside of that range.
        sqnr_db: Signal to noise of the layer's output in the quantized model, with all that was lost before it.
        own_sqnr_db: The same when this layer alone is quantized.
        weight_sqnr_db: Signal to noise of the weight.
        weight_name: The weight's path.
        input_name: Name of the quantizer of the activation that it reads; layers may share one.
    """

    name: str
    weight_bits: int
    input_bits: int
    input_range: tuple[float, float]
    clipped: float
    sqnr_db: float
    own_sqnr_db: float
    weight_sqnr_db: float
    weight_name: str = ""
    input_name: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data; an infinite ratio becomes None."""
        return {
            name: None if isinstance(value, float) and math.isinf(value) else value
            for name, value in asdict(self).items()
        }


def layer_errors(
    model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    adapt: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> list[LayerError]:
    """Compare every quantized layer of a model with its float self.

    Args:
        model: The float model that was quantized.
        quantized: What :func:`dwindle.quantize` made of it. Where scales were moved between layers (equalization,
            SmoothQuant) the float model is rescaled likewise, which a model that was loaded from a file knows nothing
            of: quantize again for the report.
        data: Batches, as :func:`dwindle.quantize` takes them.
        adapt: Function from a batch to inputs, for batches of another form.
        max_batches: Read at most so many batches.

    Returns:
        The layers, that of the lowest signal to noise first.

    Raises:
        ConfigError: ``quantized`` was not made by dwindle or not of this model, or there are no batches.
    """
    simulation = simulation_of(quantized)
    plain, changed = twins(model, quantized)
    parameters = tuple(getattr(quantized, name) for name in BUFFERS)
    found = {key: _Sums() for key in simulation.slots}
    operands = dict(changed.named_parameters())
    for args, kwargs in tracked(input_batches(plain, data, adapt, max_batches), "errors of layers: batches"):
        reference = _Alone(simulation, parameters, operands, found)
        run_with(plain, reference, args, kwargs)
        run_with(changed, _Together(simulation, parameters, reference.outputs, found), args, kwargs)
    scale, zero_point, _, _ = quantization_parameters(quantized)
    errors = []
    for key, slot in simulation.slots.items():
        form, number = simulation.forms[slot.place.input_quantizer], slot.place.input_quantizer
        low, high = (
            (level - int(zero_point[number])) * float(scale[number]) for level in (form.lowest, form.highest)
        )
        errors.append(found[key].error(key, slot, form.bits, (low, high), simulation.placement.names[number]))
    return sorted(errors, key=lambda error: error.sqnr_db)


def error_table(errors: list[LayerError]) -> str:
    """Return the layers as a text table, in the order given."""
    width = max([len(error.name) for error in errors] + [5])
    lines = [f"{'layer':{width}}  bits w/a  {'SQNR':>7}  {'alone':>7}  {'weight':>7}  {'clipped':>8}  range"]
    for error in errors:
        ratios = "  ".join(
            f"{value:7.2f}" for value in (error.sqnr_db, error.own_sqnr_db, error.weight_sqnr_db)
        )
        lines.append(
            f"{error.name:{width}}  {error.weight_bits:>4}/{error.input_bits:<3}  {ratios}  {error.clipped:8.4%}  "
            f"{error.input_range[0]:.4g} to {error.input_range[1]:.4g}"
        )
    return "\n".join(lines)


def twins(model: nn.Module, quantized: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the float model in the form of the quantized one, and the quantized one without its simulation.

    Raises:
        ConfigError: ``quantized`` was not made of this model.
    """
    simulation = simulation_of(quantized)
    plain = copy.deepcopy(model).eval()
    try:
        apply_folds(plain, simulation.folds)
        for name, factor in installed_factors(quantized).items():
            install_factor(plain.get_submodule(name), factor.clone())
        changed = copy.deepcopy(plain)
        changed.load_state_dict({k: v for k, v in quantized.state_dict().items() if k not in BUFFERS})
        with torch.no_grad():
            for name, factor in simulation.factors.items():
                parameter = plain.get_parameter(name)
                parameter.copy_(parameter.double() * factor.to(parameter.device))
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"the quantized model was not made of this model: {error}") from error
    return plain, changed


def ratio_db(signal: float, noise: float) -> float:
    """Return a ratio of energies in decibels, infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


@dataclass
class _Sums:
    """Energies of one layer over all batches."""

    signal: float = 0.0
    together: float = 0.0
    alone: float = 0.0
    weight: tuple[float, float] = field(default=(0.0, 0.0))
    clipped: int = 0
    seen: int = 0

    def error(
        self, key: CallKey, slot: WeightSlot, input_bits: int, edges: tuple[float, float], input_name: str
    ) -> LayerError:
        """Return the ratios."""
        form = slot.place.form
        return LayerError(
            str(key),
            form.bits,
            input_bits,
            edges,
            self.clipped / max(self.seen, 1),
            ratio_db(self.signal, self.together),
            ratio_db(self.signal, self.alone),
            ratio_db(*self.weight),
            slot.place.name,
            input_name,
        )


def _energy(value: Tensor) -> float:
    return float(value.double().square().sum())


class _Alone(PlacedMode):
    """Runs in float; beside each layer it runs the layer alone with its operands rounded."""

    def __init__(
        self,
        simulation: Any,
        parameters: tuple[Tensor, ...],
        operands: dict[str, nn.Parameter],
        found: dict[CallKey, _Sums],
    ) -> None:
        super().__init__(simulation)
        self.rounding = SimulationMode(simulation, parameters)
        self.operands, self.found = operands, found
        self.outputs: dict[CallKey, Tensor] = {}

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call twice."""
        output = super().on_call(key, func, args, kwargs)
        slot = self.simulation.slots.get(key)
        if slot is None:
            return output
        sums, place = self.found[key], slot.place
        self.outputs[key] = output.detach().clone()  # an operation behind may change it in place
        index, keyword = (1, "mat1") if key.operation == "addmm" else (0, "input")

        def rounded_data(value: Tensor) -> Tensor:
            rounded = self.rounding.activation(value, place.input_quantizer)
            form, scale = (
                self.simulation.forms[place.input_quantizer],
                self.rounding.scale[place.input_quantizer],
            )
            zero_point = self.rounding.zero_point[place.input_quantizer]
            levels = (value / scale).round() + zero_point
            sums.clipped += int(((levels < form.lowest) | (levels > form.highest)).sum())
            sums.seen += value.numel()
            return rounded

        def rounded_weight(value: Tensor) -> Tensor:
            rounded = self.rounding.weight(self.operands.get(place.name, value), key, slot)
            sums.weight = (_energy(value), _energy(value - rounded))
            return rounded

        def rounded_bias(value: Tensor) -> Tensor:
            return self.rounding.bias(self.operands.get(place.bias_name or "", value), key, slot)

        args, kwargs = replace_at(args, kwargs, (index,) if len(args) > index else (keyword,), rounded_data)
        args, kwargs = replace_at(args, kwargs, place.position, rounded_weight)
        if place.bias is not None:
            args, kwargs = replace_at(args, kwargs, place.bias, rounded_bias)
        sums.signal += _energy(output)
        sums.alone += _energy(func(*args, **kwargs) - output)
        return output


class _Together(SimulationMode):
    """Simulates the whole model and compares each layer with its output in float."""

    def __init__(
        self,
        simulation: Any,
        parameters: tuple[Tensor, ...],
        outputs: dict[CallKey, Tensor],
        found: dict[CallKey, _Sums],
    ) -> None:
        super().__init__(simulation, parameters)
        self.outputs, self.found = outputs, found

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Compare."""
        if key in self.outputs:
            self.found[key].together += _energy(value - self.outputs[key])
        return value


__all__ = ["LayerError", "error_table", "layer_errors"]
