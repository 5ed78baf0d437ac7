"""The layers whose bits can be chosen, and the activations that they read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.calls import CallKey, Position, replace_at, run_with
from dwindle.quantization.folding import apply_folds, find_folds
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.operators import get_backend
from dwindle.quantization.overrides import Overrides, overrides_from_config
from dwindle.quantization.placement import place
from dwindle.quantization.places import Placement, WeightPlace
from dwindle.quantization.recording import record
from dwindle.quantization.simulation import PlacedMode, Simulation, WeightSlot, is_quantized
from dwindle.training.inputs import Inputs

Address = tuple[str, str]
"""How a config_list names a target: module path and target name."""


def with_bits(form: NumberFormat, bits: int) -> NumberFormat:
    """Return levels of the same kind with another number of bits."""
    scheme = "symmetric" if form.symmetric else "affine"
    return NumberFormat.parse(f"{'' if form.signed else 'u'}int{bits}", scheme)


@dataclass(frozen=True)
class Layer:
    """One weight, with all the calls that read it.

    Attributes:
        name: The parameter's path, or the call's where it is none.
        calls: The calls that read it.
        addresses: How a config_list names it; empty where none can, so that its bits stay as they are.
        place: Levels, scales and position in the first call.
        shape: Shape of the weight.
        macs: Multiplications and additions of all its calls, with the example inputs.
        activations: The numbers of the :class:`Activation` that its calls read.
        fixed: True when the user's config_list says its bits.
    """

    name: str
    calls: tuple[CallKey, ...]
    addresses: tuple[Address, ...]
    place: WeightPlace
    shape: tuple[int, ...]
    macs: int
    activations: tuple[int, ...]
    fixed: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits that it has when nobody chooses others."""
        return self.place.form.bits

    @property
    def is_free(self) -> bool:
        """True when its bits can be chosen."""
        return bool(self.addresses) and not self.fixed


@dataclass(frozen=True)
class Activation:
    """What layers read: one value, or several that must have the same bits.

    Attributes:
        number: Its place in :attr:`Structure.activations`.
        name: The first quantizer's name.
        quantizers: Their numbers in the placement.
        addresses: How a config_list names it: the inputs of the modules that read it.
        form: Its levels when nobody chooses others.
        fixed: True when its bits cannot be chosen.
    """

    number: int
    name: str
    quantizers: tuple[int, ...]
    addresses: tuple[Address, ...]
    form: NumberFormat
    fixed: bool = False


@dataclass(frozen=True)
class Structure:
    """A model as the choice of bits sees it.

    Attributes:
        model: A copy in evaluation mode with its normalizations folded.
        simulation: Places of the quantizers, all at their first bits.
        layers: The weights.
        activations: What they read.
        macs: Multiplications and additions of each call, with the example inputs.
    """

    model: nn.Module
    simulation: Simulation
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    macs: Mapping[CallKey, int]

    def reads(self) -> dict[CallKey, tuple[Layer, Activation]]:
        """Return the weight and the activation of every call."""
        of_quantizer = {number: own for own in self.activations for number in own.quantizers}
        weights = self.simulation.placement.weights
        return {
            key: (layer, of_quantizer[weights[key].input_quantizer])
            for layer in self.layers
            for key in layer.calls
        }


class Unions:
    """Sets of keys that belong together (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable] = {}

    def find(self, key: Hashable) -> Hashable:
        """Return the representative of a key's set."""
        self._parents.setdefault(key, key)
        while self._parents[key] != key:
            key = self._parents[key]
        return key

    def unite(self, first: Hashable, second: Hashable) -> None:
        """Put two keys and all of theirs into one set."""
        self._parents[self.find(second)] = self.find(first)

    def sets(self, keys: Iterable[Any]) -> list[list[Any]]:
        """Return the keys set by set, in their order."""
        found: dict[Hashable, list[Any]] = {}
        for key in keys:
            found.setdefault(self.find(key), []).append(key)
        return list(found.values())


def input_position(key: CallKey, args: tuple[Any, ...]) -> Position:
    """Return where a call with a weight has its activation."""
    index, keyword = (1, "mat1") if key.operation == "addmm" else (0, "input")
    return (index,) if len(args) > index else (keyword,)


class ReadingMode(PlacedMode):
    """Runs in float and hands every layer's input and weight to functions.

    Args:
        simulation: Where layers are.
        on_input: From a call and its input to what the call reads.
        on_weight: From a call, its weight and its place to what the call reads.
    """

    def __init__(
        self,
        simulation: Simulation,
        on_input: Callable[[CallKey, Tensor], Tensor],
        on_weight: Callable[[CallKey, Tensor, WeightSlot], Tensor],
    ) -> None:
        super().__init__(simulation)
        self.on_input, self.on_weight = on_input, on_weight

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Hand the weight on."""
        return self.on_weight(key, value, slot)

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the input on, then run the call."""
        if key in self.simulation.slots:
            args, kwargs = replace_at(
                args, kwargs, input_position(key, args), lambda value: self.on_input(key, value)
            )
        return super().on_call(key, func, args, kwargs)


class _Counting(PlacedMode):
    """Counts the multiplications of every call with a weight."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.macs: dict[CallKey, int] = {}
        self.shapes: dict[CallKey, tuple[int, ...]] = {}

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count one call."""
        output = super().on_call(key, func, args, kwargs)
        slot = self.simulation.slots.get(key)
        if slot is not None:
            index = slot.place.position[0]
            weight = args[index] if isinstance(index, int) else kwargs[index]
            where = input_position(key, args)[0]
            read = args[where] if isinstance(where, int) else kwargs[where]
            self.shapes[key] = tuple(weight.shape)
            self.macs[key] = _macs(key.operation, read, weight, output)
        return output


def _macs(operation: str, read: Tensor, weight: Tensor, output: Tensor) -> int:
    if operation.startswith("conv_transpose"):  # every input value meets the kernels of its group's outputs
        return read.numel() * weight[0].numel()
    if operation == "addmm":
        return output.numel() * weight.shape[0]
    return output.numel() * weight[0].numel()


def examine(
    model: nn.Module,
    example: Inputs,
    config_list: list[dict[str, Any]] | None,
    backend: str,
    default: NumberFormat,
) -> Structure:
    """Find the layers of a model and what they read.

    Args:
        model: Not changed.
        example: Arguments to record it with.
        config_list: What the user wants at single targets; these keep it.
        backend: Whose operators run in integers.
        default: Levels of activations that nothing was said about.

    Raises:
        ConfigError: Nothing can be quantized, the model is quantized already, or the config_list contradicts itself.
    """
    if is_quantized(model):
        raise ConfigError("this model is quantized already; choose bits for the original instead")
    own = copy.deepcopy(model).eval()
    overrides = overrides_from_config(own, config_list)
    folds = find_folds(own, record(own, *example))
    apply_folds(own, folds)
    placement = place(
        record(own, *example, {fold.call for fold in folds}), get_backend(backend), overrides, default
    )
    if not placement.weights:
        raise ConfigError("no operation of this model can run in integers with these settings")
    slots = {key: WeightSlot(found, 0, 0) for key, found in placement.weights.items()}
    simulation = Simulation(placement, slots, folds)
    counting = _Counting(simulation)
    with torch.no_grad():
        run_with(own, counting, *example)
    activations = _activations(placement, overrides)
    layers = _layers(own, placement, overrides, activations, counting)
    return Structure(own, simulation, layers, activations, counting.macs)


def _activations(placement: Placement, overrides: Overrides) -> tuple[Activation, ...]:
    """Return what layers read. A module's calls share the setting of its input, so theirs belong together."""
    unions = Unions()
    readers: dict[int, list[str]] = {}
    for key, found in placement.weights.items():
        unions.unite(("module", key.module), found.input_quantizer)
        readers.setdefault(found.input_quantizer, []).append(key.module)
    activations = []
    for number, quantizers in enumerate(unions.sets(readers)):
        modules = list(dict.fromkeys(module for own in quantizers for module in readers[own]))
        forms = {placement.forms[own] for own in quantizers}
        said = any("_input_0" in overrides.settings.get(module, {}) for module in modules)
        activations.append(
            Activation(
                number,
                placement.names[quantizers[0]],
                tuple(quantizers),
                tuple((module, "_input_0") for module in modules),
                max(forms, key=lambda form: form.bits),
                fixed=said or "" in modules or len(forms) > 1,
            )
        )
    return tuple(activations)


def _layers(
    model: nn.Module,
    placement: Placement,
    overrides: Overrides,
    activations: tuple[Activation, ...],
    counting: _Counting,
) -> tuple[Layer, ...]:
    """Return the weights, each with all its calls; calls that one setting reaches belong together."""
    unions = Unions()
    addresses = {key: _address(model, key, found) for key, found in placement.weights.items()}
    for key, found in placement.weights.items():
        unions.unite(key, ("weight", found.name))
        if addresses[key] is not None:
            unions.unite(key, ("address", addresses[key]))
    of_quantizer = {number: own.number for own in activations for number in own.quantizers}
    layers = []
    for calls in unions.sets(placement.weights):
        first = placement.weights[calls[0]]
        own = list(dict.fromkeys(addresses[key] for key in calls))
        if len({placement.weights[key].form for key in calls}) > 1:
            raise ConfigError(
                f"{first.name} is read by {', '.join(map(str, calls))}: give all of them the same bits"
            )
        read = dict.fromkeys(of_quantizer[placement.weights[key].input_quantizer] for key in calls)
        layers.append(
            Layer(
                first.name,
                tuple(calls),
                tuple(found for found in own if found is not None) if None not in own else (),
                replace(first),
                counting.shapes[calls[0]],
                sum(counting.macs[key] for key in calls),
                tuple(read),
                fixed=any(
                    found is not None and found[1] in overrides.settings.get(found[0], {}) for found in own
                ),
            )
        )
    return tuple(layers)


def _address(model: nn.Module, key: CallKey, found: WeightPlace) -> Address | None:
    """Return how a config_list names the weight of a call, or None."""
    if key.module and isinstance(getattr(model.get_submodule(key.module), "weight", None), Tensor):
        return key.module, "weight"
    owner, _, name = found.name.rpartition(".")
    modules = dict(model.named_modules())
    return (owner, name) if owner and owner in modules and name in modules[owner]._parameters else None


__all__ = ["Activation", "Layer", "ReadingMode", "Structure", "Unions", "examine", "with_bits"]
