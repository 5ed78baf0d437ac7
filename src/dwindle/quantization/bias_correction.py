"""Correction of the shift that rounding brings: every channel's mean is put back where it was.

Rounding errors of a channel's few weights do not average out, so a quantized layer's outputs are shifted;
depthwise convolutions suffer most (Nagel et al. 2019, arXiv 1906.04721, section 4.2). Here a layer's mean
output is measured in float and in the simulation on the same data, and the difference goes into its bias. The
simulation is corrected while it runs, so every layer sees inputs that are corrected already.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dwindle.quantization.calls import CallKey, run_with
from dwindle.quantization.simulation import PlacedMode, Simulation, SimulationMode, WeightSlot
from dwindle.training.inputs import Inputs


def _channel_mean(output: Tensor, linear: bool) -> Tensor:
    axis = output.dim() - 1 if linear else 1
    return output.detach().double().mean(dim=[dim for dim in range(output.dim()) if dim != axis])


def _is_linear(key: CallKey) -> bool:
    return not key.operation.startswith("conv")


class _FloatMeans(PlacedMode):
    """Measures the mean output of every channel, in float."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.means: dict[CallKey, Tensor] = {}

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Note the means."""
        self.means[key] = _channel_mean(value, _is_linear(key))
        return value


class _Correcting(SimulationMode):
    """Simulates, and shifts every channel to its mean in float."""

    def __init__(
        self, simulation: Simulation, parameters: tuple[Tensor, ...], means: dict[CallKey, Tensor]
    ) -> None:
        super().__init__(simulation, parameters)
        self.means = means
        self.shifts: dict[CallKey, Tensor] = {}

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Shift the channels and note by how much."""
        linear = _is_linear(key)
        if slot.place.bias is None or key not in self.means:
            return value
        shift = self.means[key] - _channel_mean(value, linear)
        self.shifts[key] = shift
        shape = [-1] if linear else [1, -1] + [1] * (value.dim() - 2)
        return value + shift.to(value.dtype).reshape(shape)


def correct_biases(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Iterable[Inputs],
) -> int:
    """Change the biases of a model so that the simulation's channel means are those of the float model.

    Args:
        model: The model, not simulating yet; its biases are changed in place.
        simulation: Where the quantizers stand.
        parameters: The packed scales and zero points.
        batches: Data to measure on.

    Returns:
        How many biases were corrected.
    """
    total: dict[CallKey, Tensor] = {}
    count = 0
    for args, kwargs in batches:
        floats = _FloatMeans(simulation)
        run_with(model, floats, args, kwargs)
        correcting = _Correcting(simulation, parameters, floats.means)
        run_with(model, correcting, args, kwargs)
        for key, shift in correcting.shifts.items():
            total[key] = total[key] + shift if key in total else shift
        count += 1
    corrected = 0
    for key, name in correctable_biases(model, simulation).items():
        if key in total:
            bias = model.get_parameter(name)
            with torch.no_grad():
                bias.add_((total[key] / count).to(bias.dtype))
            corrected += 1
    return corrected


def correctable_biases(model: nn.Module, simulation: Simulation) -> dict[CallKey, str]:
    """Return the names of the bias parameters that belong to one call alone, by call."""
    names = {key: slot.place.bias_name for key, slot in simulation.slots.items()}
    owned = {name for name, _ in model.named_parameters()}
    readers = list(names.values())
    return {
        key: name
        for key, name in names.items()
        if name is not None and name in owned and readers.count(name) == 1
    }
