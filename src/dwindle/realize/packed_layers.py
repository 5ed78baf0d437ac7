"""``dw.pack_weights``: layers whose weights are simulated small integers become layers that store nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dwindle.config import history
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.targets import Target
from dwindle.quantization.weight_only import packed_weights
from dwindle.realize.module_places import ModulePlaces
from dwindle.realize.packed_linear import KERNELS, PackedLinear, from_description, unfit
from dwindle.realize.packing import LEAST_SQNR, PackResult, held_bytes, put_in_place
from dwindle.simulate.attaching import detach
from dwindle.training.inputs import forward_inputs

_CHOICES = ("exact", "fast", *KERNELS)


def pack_weights(
    model: nn.Module,
    example_inputs: Any,
    *,
    kernel: str = "exact",
    least_sqnr: float = LEAST_SQNR,
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
    inputs = forward_inputs(model, example_inputs, lambda batch: batch)
    result = PackResult(model)
    result.bytes["before"] = held_bytes(model)
    fresh = {}
    for name, weight in weights.items():
        chosen = _kernel(weight, kernel)
        reason = unfit(weight, chosen)
        if reason:
            raise ConfigError(f"{name}: {reason}")
        bias = model.get_submodule(name)._parameters.get("bias")
        fresh[name] = PackedLinear(weight, bias, chosen)
        result.kernels[name] = chosen
    old, result.sqnr = put_in_place(model, fresh, inputs, least_sqnr)
    for module in old.values():
        detach(module, keep_values=False, targets=[Target("", "weight")], stage="quantize")
    result.bytes["after"] = held_bytes(model)
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
