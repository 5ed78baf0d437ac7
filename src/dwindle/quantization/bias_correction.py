"""Correction of the shift that rounding brings: every channel's mean is put back where it was.

Rounding errors of a channel's few weights do not average out, so a quantized layer's outputs are shifted;
depthwise convolutions suffer most (Nagel et al. 2019, arXiv 1906.04721, section 4.2). Here a layer's mean
output is measured in float and in the simulation on the same data, and the difference goes into its bias. There are
three ways:

* ``"running"``: the simulation is corrected while it runs, batch by batch, so every layer sees inputs that are
  corrected already; the shifts of all batches are averaged at the end. Two forwards a batch.
* ``"sequential"``: layer after layer, each on all the data with the biases before it final. The means are then exactly
  those of the float model; it takes as many passes over the data as there are layers.
* ``"fast"``: each layer by its own rounding alone, on the inputs of the float model. One forward a batch.

A mean over few values is itself uncertain, and then its correction adds noise: :func:`correct_biases` can keep a
part of the data to check on, and leaves the biases as they were where the outputs there do not gain. Padding does
not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.quantization.calls import CallKey, replace_at, run_with, tensors_in
from dwindle.quantization.padding import PADDING_MASK, padding_mask, real_tokens
from dwindle.quantization.simulation import PlacedMode, Simulation, SimulationMode, WeightSlot
from dwindle.training.inputs import Inputs
from dwindle.training.progress import tracked

METHODS = ("running", "sequential", "fast")


def correction_method(choice: bool | str) -> str | None:
    """Return the method that a choice names; None for no correction.

    Raises:
        ConfigError: The name is not known.
    """
    if isinstance(choice, bool):
        return "running" if choice else None
    if choice not in METHODS:
        known = f"True, False, {', '.join(METHODS)}"
        raise ConfigError(f"bias_correction {choice!r} is not known: {known}{did_you_mean(choice, METHODS)}")
    return choice


def _channel_mean(output: Tensor, linear: bool, real: Tensor | None = None) -> Tensor:
    output = real_tokens(output, real) if linear else output
    axis = output.dim() - 1 if linear else 1
    return output.detach().double().mean(dim=[dim for dim in range(output.dim()) if dim != axis])


def _is_linear(key: CallKey) -> bool:
    return not key.operation.startswith("conv")


class _FloatMeans(PlacedMode):
    """Measures the mean output of every channel, in float."""

    real: Tensor | None = None

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.means: dict[CallKey, Tensor] = {}

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Note the means."""
        self.means[key] = _channel_mean(value, _is_linear(key), self.real)
        return value


class _Correcting(SimulationMode):
    """Simulates, and shifts every channel to its mean in float."""

    real: Tensor | None = None

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
        shift = self.means[key] - _channel_mean(value, linear, self.real)
        self.shifts[key] = shift
        shape = [-1] if linear else [1, -1] + [1] * (value.dim() - 2)
        return value + shift.to(value.dtype).reshape(shape)


class _Local(PlacedMode):
    """Runs in float; beside each call it runs the call with its operands rounded and compares the means."""

    real: Tensor | None = None

    def __init__(
        self, simulation: Simulation, parameters: tuple[Tensor, ...], weights: Mapping[CallKey, Tensor]
    ) -> None:
        super().__init__(simulation)
        self.weights = weights
        self.rounding = SimulationMode(simulation, parameters)
        self.shifts: dict[CallKey, Tensor] = {}

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call twice."""
        output = super().on_call(key, func, args, kwargs)
        slot = self.simulation.slots.get(key)
        if slot is None or slot.place.bias is None:
            return output
        place, rounding = slot.place, self.rounding
        index, keyword = (1, "mat1") if key.operation == "addmm" else (0, "input")
        data = (index,) if len(args) > index else (keyword,)
        changes: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
            (data, lambda value: rounding.activation(value, place.input_quantizer)),
            (place.position, lambda value: rounding.weight(self.weights.get(key, value), key, slot)),
        ]
        for position, change in changes:
            args, kwargs = replace_at(args, kwargs, position, change)
        rounded, linear = func(*args, **kwargs), _is_linear(key)
        self.shifts[key] = _channel_mean(output, linear, self.real) - _channel_mean(
            rounded, linear, self.real
        )
        return output


class _Stopped(BaseException):
    """The call that is being corrected has run; the rest of the forward is not needed."""


class _MeanOf(SimulationMode):
    """Simulates up to one call and takes its mean."""

    real: Tensor | None = None

    def __init__(self, simulation: Simulation, parameters: tuple[Tensor, ...], wanted: CallKey) -> None:
        super().__init__(simulation, parameters)
        self.wanted, self.rounds_biases = wanted, False  # only the wanted one is left as it is: see bias()
        self.mean: Tensor | None = None
        self.rows = 0

    def bias(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Leave the bias that is being corrected unrounded: it is rounded once, when it is final."""
        return value if key == self.wanted else super().bias(value, key, slot)

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Take the mean and stop."""
        if key == self.wanted:
            self.mean = _channel_mean(value, _is_linear(key), self.real)
            self.rows = _rows(value, key, self.real)
            raise _Stopped
        return value


def _rows(value: Tensor, key: CallKey, real: Tensor | None) -> int:
    """Return how many values each channel has."""
    value = real_tokens(value, real) if _is_linear(key) else value
    return value.numel() // max(1, value.shape[-1 if _is_linear(key) else 1])


class _FloatSums(PlacedMode):
    """Adds up the output of every channel, in float, over all batches."""

    real: Tensor | None = None

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.sums: dict[CallKey, Tensor] = {}
        self.rows: dict[CallKey, int] = {}

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Add up."""
        rows = _rows(value, key, self.real)
        self.sums[key] = self.sums.get(key, 0.0) + _channel_mean(value, _is_linear(key), self.real) * rows
        self.rows[key] = self.rows.get(key, 0) + rows
        return value


def correct_biases(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Iterable[Inputs],
    method: str = "running",
    reference: nn.Module | None = None,
    *,
    padding: str | None = PADDING_MASK,
    checked: bool = False,
) -> int:
    """Change the biases of a model so that the simulation's channel means are those of the float model.

    Args:
        model: The model, not simulating yet; its biases are changed in place.
        simulation: Where the quantizers stand.
        parameters: The packed scales and zero points.
        batches: Data to measure on; read several times by the sequential method.
        method: ``"running"``, ``"sequential"`` or ``"fast"``.
        reference: The float model, where the weights of ``model`` are rounded already; ``model`` when not given.
        padding: The argument that tells padding from real tokens.
        checked: Judge on every fourth batch (the last one of fewer, and the only one of one), and change nothing where
            the model's outputs there come no closer to float.

    Returns:
        How many biases were corrected.
    """
    names = correctable_biases(model, simulation)
    reference = model if reference is None else reference
    batches = list(batches)
    judges = _judges(batches) if checked else []
    expected = [run_with(reference, PlacedMode(simulation), *judge) for judge in judges]
    before = {name: model.get_parameter(name).detach().clone() for name in names.values()}
    plain = _distance(model, simulation, parameters, judges, expected, padding)
    if method == "sequential":
        count = _correct_sequentially(model, simulation, parameters, batches, names, reference, padding)
    else:
        others = [batch for batch in batches if not any(batch is judge for judge in judges)]
        count = _correct_by_batch(
            model, simulation, parameters, others or batches, names, reference, padding, method
        )
    if checked and not _distance(model, simulation, parameters, judges, expected, padding) < plain:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        return 0
    return count


def _judges(batches: Sequence[Inputs]) -> list[Inputs]:
    return [*batches[3::4]] or [*batches[-1:]]


def _distance(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Sequence[Inputs],
    expected: Sequence[Any],
    padding: str | None,
) -> float:
    """Return the squared error of the simulation's outputs as a share of the energy of the expected ones."""
    lost = whole = 0.0
    for (args, kwargs), wanted in zip(batches, expected, strict=True):
        real = padding_mask(kwargs, padding)
        got = run_with(model, SimulationMode(simulation, parameters), args, kwargs)
        for first, second in zip(tensors_in(wanted), tensors_in(got), strict=True):
            if first.is_floating_point():
                target = real_tokens(first, real).double()
                lost += float((real_tokens(second, real).double() - target).square().sum())
                whole += float(target.square().sum())
    return lost / max(whole, 1e-300)


def _correct_by_batch(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Sequence[Inputs],
    names: dict[CallKey, str],
    reference: nn.Module,
    padding: str | None,
    method: str,
) -> int:
    total: dict[CallKey, Tensor] = {}
    parameters_by_name = dict(model.named_parameters())
    weights = {
        key: parameters_by_name[slot.place.name]
        for key, slot in simulation.slots.items()
        if slot.place.name in parameters_by_name
    }
    for args, kwargs in tracked(batches, "bias correction: batches"):
        real = padding_mask(kwargs, padding)
        correcting: _Local | _Correcting
        if method == "fast":
            correcting = _Local(simulation, parameters, weights)
            correcting.real = real
            run_with(reference, correcting, args, kwargs)
        else:
            floats = _FloatMeans(simulation)
            floats.real = real
            run_with(reference, floats, args, kwargs)
            correcting = _Correcting(simulation, parameters, floats.means)
            correcting.real = real
            run_with(model, correcting, args, kwargs)
        for key, shift in correcting.shifts.items():
            total[key] = total[key] + shift if key in total else shift
    changed = [key for key in names if key in total]
    for key in changed:
        _add(model, names[key], total[key] / len(batches))
    return len(changed)


def _correct_sequentially(
    model: nn.Module,
    simulation: Simulation,
    parameters: tuple[Tensor, ...],
    batches: Sequence[Inputs],
    names: dict[CallKey, str],
    reference: nn.Module,
    padding: str | None,
) -> int:
    floats = _FloatSums(simulation)
    for args, kwargs in batches:
        floats.counts.clear()
        floats.real = padding_mask(kwargs, padding)
        run_with(reference, floats, args, kwargs)
    wanted = [key for key in floats.sums if key in names]  # in the order of the calls
    for key in tracked(wanted, "bias correction: layers"):
        total, rows = torch.zeros_like(floats.sums[key]), 0
        for args, kwargs in batches:
            mode = _MeanOf(simulation, parameters, key)
            mode.real = padding_mask(kwargs, padding)
            try:
                run_with(model, mode, args, kwargs)
            except _Stopped:
                mode.path.stack.clear()  # hooks that leave a module are passed over when the forward ends early
            if mode.mean is not None:
                total, rows = total + mode.mean * mode.rows, rows + mode.rows
        if rows:
            _add(model, names[key], floats.sums[key] / floats.rows[key] - total / rows)
    return len(wanted)


def _add(model: nn.Module, name: str, shift: Tensor) -> None:
    bias = model.get_parameter(name)
    with torch.no_grad():
        bias.add_(shift.to(bias.dtype))


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
