"""From a model that was trained with quantizers to the integer model, as :func:`dwindle.quantize` makes it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config.errors import ConfigError
from dwindle.quantization.aware_training.bank import (
    TrainedQuantizers,
    bank_of,
    detach_bank,
    rounded_weight,
)
from dwindle.quantization.calls import CallKey
from dwindle.quantization.folding import apply_folds, channel_factor
from dwindle.quantization.numbers import SMALLEST_SCALE
from dwindle.quantization.places import summarize
from dwindle.quantization.plan import plan_of, record_history
from dwindle.quantization.quantizers import Quantizer
from dwindle.quantization.simulation import Simulation, WeightSlot, attach


def finish_training(model: nn.Module) -> nn.Module:
    """Return the integer model that quantization-aware training made.

    Normalizations are folded, masks are applied, and what was learned becomes scales and zero points. Folding changes
    no level: a weight with one scale for each output channel keeps its levels, only the scales are multiplied. The
    result computes the same as the model in evaluation mode, up to the rounding of biases to 32-bit integers.

    Args:
        model: Trained with :class:`dwindle.quantization.TrainingQuantizer`; not changed.

    Returns:
        A copy in evaluation mode, like one of :func:`dwindle.quantize`: it can be exported, saved and measured.

    Raises:
        ConfigError: The model has no quantizers.
    """
    if bank_of(model) is None:
        raise ConfigError("this model is not trained with quantizers: attach a TrainingQuantizer first")
    result = simulate.gathered(model)
    result = (copy.deepcopy(model) if result is model else result).eval()
    bank = detach_bank(result)
    assert bank is not None
    bank.eval()
    bank.keep_ends()
    simulate.detach(result, keep_values=True)
    with torch.no_grad():
        scales = _final_weights(result, bank)
        apply_folds(result, bank.places.folds)
        parameters, slots = _packed(result, bank, scales)
    simulation = Simulation(bank.places.final, slots, bank.places.folds)
    device = next(result.parameters()).device
    attach(result, simulation, tuple(part.to(device) for part in parameters))
    for module in result.modules():
        module.training = False
    facts = {"method": "training", **summarize(bank.places.final)}
    record_history(result, facts, plan_of(result))
    return result


def finished(model: nn.Module) -> nn.Module:
    """Return the integer model of one that is trained with quantizers, and any other model as it is."""
    return model if bank_of(model) is None else finish_training(model)


def _final_weights(model: nn.Module, bank: TrainedQuantizers) -> dict[CallKey, Tensor]:
    """Put rounded weights into the parameters, and return the scales that they have behind folding."""
    scales = {}
    parameters = dict(model.named_parameters())
    done: set[str] = set()
    for key, number in bank.weight_of.items():
        quantizer = bank.weights[number]
        assert isinstance(quantizer, Quantizer)
        scale = quantizer.scale_and_zero_point()[0].double()
        normalization = bank.places.normalization_of.get(key.module)
        folded_first = bank.normalization_of.get(key)
        name = bank.places.final.weights[key].name
        parameter = parameters.get(name)
        if parameter is not None and name not in bank.places.borrowed and name not in done:
            done.add(name)
            behind = None if folded_first is None else [model.get_submodule(own) for own in folded_first]
            parameter.copy_(rounded_weight(quantizer, parameter, behind))
        if normalization is not None and folded_first is None:
            factor = channel_factor(model.get_submodule(normalization)).abs()
            scale = (scale * factor).clamp(min=SMALLEST_SCALE)
        scales[key] = scale.reshape(-1)
    return scales


def _packed(
    model: nn.Module, bank: TrainedQuantizers, scales: dict[CallKey, Tensor]
) -> tuple[tuple[Tensor, ...], dict[CallKey, WeightSlot]]:
    """Return the packed scales and zero points of activations and weights, and where weights' stand."""
    found = [own.scale_and_zero_point() for own in bank.activations]  # type: ignore[operator]
    activation = torch.stack([scale.reshape(()) for scale, _ in found]).float()
    zero = torch.stack([zero.reshape(()) for _, zero in found]).to(torch.int32)
    parameters = dict(model.named_parameters())
    slots, packed, begin = {}, [], 0
    for key, place in bank.places.final.weights.items():
        scale = scales[key]
        bias = parameters.get(place.bias_name) if place.bias_name is not None else None
        if bias is not None:
            # The bias is a 32-bit integer of input scale times weight scale: hardly any weight may not cost the bias.
            floor = bias.double().abs() / (activation[place.input_quantizer].double() * 2.0**30)
            scale = torch.maximum(scale, floor if floor.numel() == scale.numel() else floor.max())
        slots[key] = WeightSlot(place, begin, scale.numel())
        begin += scale.numel()
        packed.append(scale.float())
    weights = torch.cat(packed)
    return (activation, zero, weights, torch.zeros(len(weights), dtype=torch.int32)), slots
