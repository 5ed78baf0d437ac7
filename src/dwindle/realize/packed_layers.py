"""``dw.pack_weights``: layers whose weights are simulated small integers become layers that store nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config import history
from dwindle.config.errors import ConfigError, RealizeError, did_you_mean
from dwindle.config.targets import Target
from dwindle.quantization.weight_only import packed_weights
from dwindle.realize.module_places import ModulePlaces
from dwindle.realize.packed_linear import KERNELS, PackedLinear, from_description, unfit
from dwindle.simulate.attaching import detach
from dwindle.training.inputs import forward_inputs

_CHOICES = ("exact", "fast", *KERNELS)
_LEAST_SQNR = 30.0


@dataclass
class PackResult:
    """A model with packed layers.

    Attributes:
        model: The model, changed in place.
        kernels: The kernel of each layer.
        bytes: Before and after: all parameters and buffers.
        sqnr: Decibels of the outputs over their difference to the simulation's; infinite when equal.
    """

    model: nn.Module
    kernels: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    sqnr: float = math.inf

    def summary(self) -> str:
        """Return one line for people."""
        before, after = (self.bytes[key] / 1e6 for key in ("before", "after"))
        return (
            f"{len(self.kernels)} layers packed: {before:.2f} MB -> {after:.2f} MB, "
            f"outputs equal to the simulation's to {self.sqnr:.1f} dB"
        )


def pack_weights(
    model: nn.Module,
    example_inputs: Any,
    *,
    kernel: str = "exact",
    least_sqnr: float = _LEAST_SQNR,
) -> PackResult:
    """Replace layers that :func:`dwindle.quantize_weights` simulates by layers that hold only the packed integers.

    The outputs before and after are compared; the model is left as it was when they differ too much.

    Args:
        model: The simulated model, changed in place.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs.
        kernel: ``"exact"`` (the float matrix is made when it is needed: the smallest memory, no faster), ``"fast"``
            (torch's int4 and int8 products with bfloat16 inputs where they know the format, for up to eight rows at a
            time; more rows and other layers as in ``"exact"``), or one of the kernels, which must then fit all layers.
        least_sqnr: Decibels that the outputs must agree to.

    Raises:
        ConfigError: Nothing is simulated, the kernel is unknown or does not fit.
        RealizeError: The outputs differ.
    """
    if kernel not in _CHOICES:
        raise ConfigError(
            f"kernel {kernel!r} is not one of {', '.join(_CHOICES)}{did_you_mean(kernel, _CHOICES)}"
        )
    weights = packed_weights(model)
    if not weights:
        raise ConfigError("no weight of this model is packed; call dw.quantize_weights first")
    args, kwargs = forward_inputs(model, example_inputs, lambda batch: batch)
    result = PackResult(model)
    result.bytes["before"] = _bytes(model)
    places, old, fresh = ModulePlaces(model), {}, {}
    for name, weight in weights.items():
        old[name] = model.get_submodule(name)
        chosen = _kernel(weight, kernel)
        reason = unfit(weight, chosen)
        if reason:
            raise ConfigError(f"{name}: {reason}")
        fresh[name] = PackedLinear(weight, old[name]._parameters.get("bias"), chosen)
        result.kernels[name] = chosen
    with torch.no_grad():
        before = list(_tensors(model(*args, **kwargs)))
        try:
            for name, layer in fresh.items():
                places.put(name, layer.train(old[name].training))
            result.sqnr = _sqnr(before, list(_tensors(model(*args, **kwargs))))
            if not result.sqnr >= least_sqnr:
                raise RealizeError(
                    f"packed and simulated outputs agree to {result.sqnr:.1f} dB only; the model is unchanged"
                )
        except BaseException:
            for name, module in old.items():
                places.put(name, module)
            raise
    for module in old.values():
        detach(module, keep_values=False, targets=[Target("", "weight")], stage="quantize")
    result.bytes["after"] = _bytes(model)
    layers = {name: layer.description() for name, layer in fresh.items()}
    history.record(model, {"kind": "pack_weights", "layers": layers})
    return result


def replay_packed(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put empty packed layers where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The model before that step, changed in place.
        entry: The step of its history.

    Raises:
        ConfigError: The entry does not fit the model.
    """
    places = ModulePlaces(model)
    for name, description in entry["layers"].items():
        layer = from_description(description)
        old = model.get_submodule(name)
        shape = tuple(getattr(old, "weight").shape)  # noqa: B009 (a simulator may compute it)
        if set(shape) != {layer.out_features, layer.in_features}:
            raise ConfigError(
                f"{name} is no layer of {layer.in_features} inputs and {layer.out_features} outputs"
            )
        places.put(name, layer.train(old.training))
    return model


def _kernel(weight: Any, kernel: str) -> str:
    if kernel == "exact":
        return "dequantize"
    if kernel == "fast":
        return next((own for own in ("int4", "int8") if not unfit(weight, own)), "dequantize")
    return kernel


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _sqnr(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return decibels of all outputs together."""
    power = noise = 0.0
    for old, new in zip(before, after, strict=True):
        power += float(old.double().square().sum())
        noise += float((old.double() - new.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
