"""The first ranges of quantizers: from calibration data, from what was watched, from weights as calls read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.aware_training.bank import SAMPLE, TrainedQuantizers, WatchedRange
from dwindle.quantization.calls import CallKey, ModulePath, run_with
from dwindle.quantization.folding import channel_factor, times_channels
from dwindle.quantization.observers import Observer, make_observer
from dwindle.quantization.quantizers import Quantizer
from dwindle.quantization.simulation import PlacedMode, Simulation, WeightSlot
from dwindle.simulate import has_shards
from dwindle.training.inputs import Inputs
from dwindle.training.processes import join_over_processes, share_from_first, sum_over_processes


class _FirstLook(PlacedMode):
    """Shows activations to observers and to samples, and keeps the weights of calls."""

    def __init__(
        self, simulation: Simulation, observers: list[Observer], samples: list[WatchedRange], copies: bool
    ) -> None:
        super().__init__(simulation)
        self.path = ModulePath()
        self.observers, self.samples, self.copies = observers, samples, copies
        self.weights: dict[CallKey, Tensor] = {}

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Show an activation around."""
        self.observers[quantizer].update(value)
        self.samples[quantizer].update(value)
        return value

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Keep a weight as the call reads it."""
        self.weights[key] = value.detach().clone() if self.copies else value.detach()
        return value


def start_all(model: nn.Module, bank: TrainedQuantizers, batches: Iterable[Inputs], observer: Any) -> None:
    """Set all ranges, before the bank is on the model.

    Args:
        model: The model, with its masks; not changed.
        bank: Its quantizers.
        batches: Calibration data.
        observer: How ranges of activations are found, see :func:`dwindle.quantization.observers.make_observer`.

    Raises:
        ConfigError: The data or a weight holds NaN or infinity, or gives no range.
    """
    observers = [make_observer(observer) for _ in bank.activations]
    samples = [WatchedRange() for _ in bank.activations]
    weights: dict[CallKey, Tensor] = {}
    copies = has_shards(model)  # whole weights are taken away again behind the forward pass
    for batch in batches:
        look = _FirstLook(bank.simulation, observers, samples, copies)
        run_with(model, look, *batch)
        weights = look.weights
    names, forms = bank.places.training.names, bank.places.training.forms
    for number, (quantizer, seen) in enumerate(zip(bank.activations, observers, strict=True)):
        try:
            low, high = seen.range(forms[number])
        except ValueError as error:
            raise ConfigError(
                f"no finite value reached {names[number]} in the calibration data: {error}"
            ) from error
        start(quantizer, torch.tensor(low), torch.tensor(high), samples[number].sample, names[number])
    start_weights(model, bank, weights)
    share_state(bank)


def start_weights(model: nn.Module, bank: TrainedQuantizers, weights: dict[CallKey, Tensor]) -> None:
    """Set the ranges of weights.

    Args:
        model: Whose normalizations weights may be folded into.
        bank: Its quantizers.
        weights: Each weight as its call reads it.
    """
    done: set[int] = set()
    for key, number in bank.weight_of.items():
        if number in done or key not in weights:
            continue
        done.add(number)
        quantizer, weight = bank.weights[number], weights[key].float()
        assert isinstance(quantizer, Quantizer)
        behind = bank.normalization_of.get(key)
        if behind is not None:
            layer, normalization = (model.get_submodule(name) for name in behind)
            weight = times_channels(weight, layer, channel_factor(normalization).detach().float())
        axis = quantizer.axis
        rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
        low, high = rows.aminmax(dim=1)
        shape: tuple[int, ...] = () if axis is None else (-1,)
        name = bank.places.training.weights[key].name
        start(quantizer, low.reshape(shape), high.reshape(shape), weight, name)


def start_watched(bank: TrainedQuantizers) -> None:
    """Set the ranges of activations to what was watched in the last steps of training.

    Raises:
        ConfigError: Nothing finite was seen at a place.
    """
    names = bank.places.training.names
    for number, (quantizer, seen) in enumerate(zip(bank.activations, bank.watched, strict=True)):
        assert isinstance(seen, WatchedRange)
        if bool(seen.low.isnan()):
            continue  # nothing passed there while training: the calibration data's range stays
        start(quantizer, seen.low, seen.high, _sample_of_all(seen), names[number])
        seen.sample = None
    share_state(bank)


def _sample_of_all(seen: WatchedRange) -> Tensor | None:
    """Return the last batch's values in all processes, if they have them."""
    there = torch.tensor(float(seen.sample is not None), device=seen.low.device)
    count = torch.ones_like(there)
    sum_over_processes([there, count])
    if seen.sample is None or float(there) < float(count):
        return None
    joined = join_over_processes(seen.sample)
    return joined[:: max(1, joined.numel() // SAMPLE)]


def start(quantizer: Any, low: Tensor, high: Tensor, sample: Tensor | None, name: str) -> None:
    """Set one quantizer's range.

    Raises:
        ConfigError: The range is not one; the message names the place.
    """
    assert isinstance(quantizer, Quantizer)
    try:
        quantizer.initialize(low.clamp(max=0), high.clamp(min=0), sample)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def share_state(bank: TrainedQuantizers) -> None:
    """Give all processes of a distributed run the ranges of the first."""
    share_from_first([*(own.data for own in bank.parameters()), *bank.buffers()])
