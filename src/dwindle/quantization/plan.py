"""A quantized model as plain data, and back: what a manifest needs to rebuild it from a fresh instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dwindle.config.errors import FileFormatError
from dwindle.quantization.calls import CallKey, Position
from dwindle.quantization.folding import Fold, prepare_structure
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.outliers import installed_factors, prepare_factors
from dwindle.quantization.places import Placement, WeightPlace
from dwindle.quantization.simulation import Simulation, WeightSlot, attach, simulation_of


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Return where a model's quantizers stand, as JSON-able data. Scales are in its ``state_dict``."""
    simulation = simulation_of(model)
    placement = simulation.placement
    return {
        "quantizers": [
            {"name": name, "form": form.to_json()}
            for name, form in zip(placement.names, placement.forms, strict=True)
        ],
        "outputs": [[list(key), number] for key, number in placement.outputs.items()],
        "inputs": [
            [list(key), list(position), number]
            for key, places in placement.inputs.items()
            for position, number in places.items()
        ],
        "weights": [[list(key), _slot_to_json(slot)] for key, slot in simulation.slots.items()],
        "folds": [[fold.layer, fold.normalization, list(fold.call)] for fold in simulation.folds],
        "divided": list(installed_factors(model)),
    }


def apply_plan(model: nn.Module, plan: dict[str, Any]) -> nn.Module:
    """Make a freshly constructed float model a quantized one, in place, ready for ``load_state_dict``.

    Args:
        model: Of the same architecture as the one the plan was made of.
        plan: What :func:`plan_of` returned.

    Returns:
        The same model, in evaluation mode. Its weights and ranges are those of the state loaded next.

    Raises:
        FileFormatError: The plan is not one, or does not fit the model.
    """
    try:
        placement, slots, folds = _read(plan)
        prepare_structure(model, folds)
        prepare_factors(model, plan.get("divided", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"the quantization plan does not fit: {error}") from error
    count, packed = len(placement.names), sum(slot.length for slot in slots.values())
    zeros = torch.zeros(count, dtype=torch.int32), torch.zeros(packed, dtype=torch.int32)
    attach(
        model,
        Simulation(placement, slots, folds),
        (torch.ones(count), zeros[0], torch.ones(packed), zeros[1]),
    )
    return model.eval()


def _read(plan: dict[str, Any]) -> tuple[Placement, dict[CallKey, WeightSlot], list[Fold]]:
    placement = Placement(
        names=[entry["name"] for entry in plan["quantizers"]],
        forms=[NumberFormat(**entry["form"]) for entry in plan["quantizers"]],
        outputs={_key(key): int(number) for key, number in plan["outputs"]},
    )
    for key, position, number in plan["inputs"]:
        placement.inputs.setdefault(_key(key), {})[_position(position)] = int(number)
    slots = {_key(key): _slot(entry) for key, entry in plan["weights"]}
    placement.weights = {key: slot.place for key, slot in slots.items()}
    folds = [Fold(layer, normalization, _key(call)) for layer, normalization, call in plan["folds"]]
    return placement, slots, folds


def _key(entry: list[Any]) -> CallKey:
    module, operation, order = entry
    return CallKey(str(module), str(operation), int(order))


def _position(entry: list[Any] | None) -> Position:
    return tuple(entry or ())


def _slot_to_json(slot: WeightSlot) -> dict[str, Any]:
    found = slot.place
    return {
        "position": list(found.position),
        "name": found.name,
        "form": found.form.to_json(),
        "axis": found.axis,
        "bias": None if found.bias is None else list(found.bias),
        "input_quantizer": found.input_quantizer,
        "bias_name": found.bias_name,
        "block": found.block,
        "start": slot.start,
        "length": slot.length,
    }


def _slot(entry: dict[str, Any]) -> WeightSlot:
    found = WeightPlace(
        position=_position(entry["position"]),
        name=entry["name"],
        form=NumberFormat(**entry["form"]),
        axis=entry["axis"],
        bias=None if entry["bias"] is None else _position(entry["bias"]),
        input_quantizer=int(entry["input_quantizer"]),
        bias_name=entry["bias_name"],
        block=entry.get("block"),
    )
    return WeightSlot(found, int(entry["start"]), int(entry["length"]))


def record_history(model: nn.Module, facts: dict[str, Any], plan: dict[str, Any]) -> None:
    """Note in the model's history that it was quantized."""
    try:
        from dwindle.config.history import record
    except ImportError:  # the history room is optional for using the simulation
        return
    record(model, {"kind": "quantize", **facts, "plan": plan})


def replay(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Repeat a ``quantize`` step of a history on a freshly made model; its numbers are loaded afterwards.

    Args:
        model: The model as it was before that step.
        entry: The history's entry, with the ``plan``.

    Raises:
        FileFormatError: The entry does not fit the model.
    """
    if "plan" not in entry:
        raise FileFormatError("this quantize entry holds no plan")
    return apply_plan(model, entry["plan"])
