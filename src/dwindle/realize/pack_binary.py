"""``dw.pack_binary``: makes a simulated binarization real, layer by layer, with proof."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwindle import simulate
from dwindle.config import Target, history
from dwindle.config.errors import ConfigError, RealizeError
from dwindle.quantization.quantizers.binary import (
    BinaryActivation,
    BinaryQuantizerBase,
    BinaryWeight,
    StepActivation,
)
from dwindle.realize.binary_layers import (
    PackedBinaryConv2d,
    PackedBinaryLayer,
    PackedBinaryLinear,
    from_description,
)
from dwindle.realize.module_places import ModulePlaces
from dwindle.training.progress import tracked

__all__ = ["BinaryResult", "BinaryRow", "pack_binary", "replay_binary"]

_EXACT = 1e-6
"""Largest difference over the largest output: scales are rounded to float32, a single wrong sign is larger."""


@dataclass(frozen=True)
class BinaryRow:
    """What became of one layer that has something binary.

    Attributes:
        name: Path of the layer.
        kind: Its class before.
        packed: Whether it runs on packed signs now.
        reason: Why it does not; empty when it does.
        difference: Largest difference from the simulation in float64, over the largest output.
        bytes_before: Size of its numbers.
        bytes_after: Size of its numbers now.
        milliseconds: Medians of ``"float"`` (the same layer on numbers, without simulation) and ``"packed"``.
    """

    name: str
    kind: str
    packed: bool
    reason: str = ""
    difference: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass
class BinaryResult:
    """The model, layer by layer.

    Attributes:
        model: The model itself, some of its layers replaced.
        rows: One for each layer with a binary weight or input.
        max_difference: Largest difference of the model's outputs before and after, over the largest output.
    """

    model: nn.Module
    rows: list[BinaryRow] = field(default_factory=list)
    max_difference: float = 0.0

    def summary(self) -> str:
        """Return a readable account."""
        done = [row for row in self.rows if row.packed]
        before, after = sum(row.bytes_before for row in done), sum(row.bytes_after for row in done)
        lines = [
            f"{len(done)} of {len(self.rows)} binary layers are packed ({before:,} bytes before, {after:,} now)"
        ]
        for row in self.rows:
            times = row.milliseconds
            speed = f", {times['float']:.3f} ms in float, {times['packed']:.3f} ms packed" if times else ""
            said = f"packed{speed}" if row.packed else f"still simulated: {row.reason}{speed}"
            lines.append(f"  {row.name} ({row.kind}): {said}")
        lines.append(f"the model's outputs differ by {self.max_difference:.2g} of the largest")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data (without the model)."""
        return {"layers": [asdict(row) for row in self.rows], "max_difference": self.max_difference}


def pack_binary(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    least_gain: float | None = None,
    rounds: int = 7,
) -> BinaryResult:
    """Replace layers whose weight and input are simulated as binary by packed ones, in place.

    Every packed layer is compared with its simulation in float64, on what the example inputs send to it. Sums of signs
    are integers, so the two are equal but for the rounding of the scale. Everything stays simulated that is not packed
    (layers of which only the weight is binary, for instance).

    Args:
        model: The model, on the CPU, as :class:`~dwindle.quantization.BinaryQuantizer` left it. Put in evaluation mode.
        example_inputs: A tensor or a tuple of positional inputs.
        example_kwargs: Keyword inputs.
        least_gain: Pack only layers that get at least so many times faster than the same layer in float; None packs
            all. Needs ``rounds``.
        rounds: Calls of each form for the times in the report, taking turns; 0 leaves them out.

    Raises:
        ConfigError: Nothing is binary yet, numba is missing, or an argument is not valid.
        RealizeError: A packed layer does not give what its simulation gives; the model is as it was.
    """
    if rounds < 0 or (least_gain is not None and (least_gain <= 0 or not rounds)):
        raise ConfigError("rounds must not be negative, and least_gain needs rounds and must be positive")
    args = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    layers = _binary_layers(model)
    if not layers:
        raise ConfigError("nothing in this model is binary: train it with a BinaryQuantizer first")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    places, result, done = ModulePlaces(model), BinaryResult(model), {}
    try:
        with torch.no_grad():
            seen, before = _observed(model, layers, args, kwargs)
            for name, layer in tracked(list(layers.items()), "packing binary layers"):
                row, packed = _try(name, layer, seen.get(name), least_gain, rounds)
                result.rows.append(row)
                if packed is not None:
                    places.put(name, packed)
                    done[name] = packed
            result.max_difference = _difference(before, _tensors(model(*args, **kwargs)))
    except BaseException:
        for name in done:
            places.put(name, layers[name])
        for module, training in modes:
            module.training = training
        raise
    if done:
        entry = {"kind": "pack_binary", "layers": {name: own.description() for name, own in done.items()}}
        history.record(model, entry)
    return result


def replay_binary(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """Put empty packed layers where a saved model had some; their numbers are loaded afterwards.

    Args:
        model: The model before that step, changed in place.
        entry: The step of its history.

    Raises:
        FileFormatError: A description is damaged.
        ConfigError: The entry does not fit the model.
    """
    places = ModulePlaces(model)
    for name, description in entry["layers"].items():
        old, layer = model.get_submodule(name), from_description(description)
        weight = old._parameters.get("weight")
        if weight is None or list(weight.shape) != list(description["shape"]):
            raise ConfigError(f"{name} has no weight of the shape {description['shape']}")
        places.put(name, layer.train(old.training))
    return model


def _binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a binary weight or input that has started."""
    names = {
        target.module: None
        for target, simulator in simulate.simulated_targets(model, "quantize").items()
        if isinstance(simulator, BinaryQuantizerBase)
        and simulator.started
        and not target.name.startswith("_output_")
    }
    return {name: model.get_submodule(name) for name in names}


def _observed(
    model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run the simulated model; return the first input of each layer before it is made binary, and the outputs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor):
                seen.setdefault(name, given[0].clone())

        return look

    handles = [layer.register_forward_pre_hook(keep(name), prepend=True) for name, layer in layers.items()]
    try:
        return seen, _tensors(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()


def _try(
    name: str, layer: nn.Module, x: Tensor | None, least_gain: float | None, rounds: int
) -> tuple[BinaryRow, PackedBinaryLayer | None]:
    """Pack one layer and prove it; return what was found, and the packed layer when it shall stand."""
    kind = type(layer).__name__
    reason = _unfit(layer, x)
    if reason or x is None:
        return BinaryRow(name, kind, False, reason), None
    packed = packed_layer(layer)
    plain, binary = _float_layer(layer), _quantizer(layer, "_input_0")(x)
    difference = _difference([plain.double()(binary.double())], [packed.double()(x.double())])
    if not difference <= _EXACT:
        raise RealizeError(
            f"{name}: the packed layer differs from its simulation by {difference:.2g} of the largest output; "
            "the model is unchanged"
        )
    packed, plain = packed_layer(layer), _float_layer(layer)  # in their own dtype again
    times = _medians({"float": lambda: plain(binary), "packed": lambda: packed(x)}, rounds)
    sizes = (_bytes(plain), _bytes(packed))
    if least_gain is not None and times["float"] < least_gain * times["packed"]:
        gain = f"packed it is {times['float'] / times['packed']:.2f} times as fast"
        return BinaryRow(name, kind, False, gain, difference, *sizes, times), None
    return BinaryRow(name, kind, True, "", difference, *sizes, times), packed.train(layer.training)


def _unfit(layer: nn.Module, x: Tensor | None) -> str:
    """Return why a layer is not packed; empty when it is."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return "linear layers and 2-d convolutions have packed kernels"
    if x is None:
        return "the forward does not call it with a positional input (its weight may be read directly)"
    if x.device.type != "cpu":
        return f"packed kernels are for the CPU, this is on {x.device}"
    weight, given = _quantizer_or_none(layer, "weight"), _quantizer_or_none(layer, "_input_0")
    if not isinstance(weight, BinaryWeight) or not weight.started:
        return "its weight is not binary"
    if not isinstance(given, BinaryActivation) or not given.started:
        return "its input is not binary"
    stacks = simulate.simulated_targets(layer)
    if len(stacks) > 2 or any(len(list(stack.children())) > 1 for stack in stacks.values()):
        return "other simulators stand on it"
    return ""


def packed_layer(layer: nn.Module) -> PackedBinaryLayer:
    """Return the packed form of a linear layer or 2-d convolution with a binary weight and input.

    Args:
        layer: The layer with its simulators; not changed.

    Raises:
        ConfigError: It has no binary weight or input, is of another kind, or numba is missing.
    """
    weight, given = _quantizer(layer, "weight"), _quantizer(layer, "_input_0")
    if not isinstance(weight, BinaryWeight) or not isinstance(given, BinaryActivation):
        raise ConfigError(f"a {type(layer).__name__} needs a binary weight and input to be packed")
    matrix = layer._parameters["weight"]
    if matrix is None or not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ConfigError(f"a {type(layer).__name__} has no packed form")
    signs = torch.where(matrix.detach() >= 0, 1, -1).to(torch.int8)
    scale = (weight.scale_of(matrix) * given.level().to(matrix.dtype)).expand(len(signs))
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    threshold = given.threshold().expand(inputs)
    options: dict[str, Any] = {"reaches": given.reaches, "steps": isinstance(given, StepActivation)}
    bias = layer._parameters.get("bias")
    if isinstance(layer, nn.Linear):
        return PackedBinaryLinear(signs, scale, bias, threshold, **options)
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return PackedBinaryConv2d(
        signs,
        scale,
        bias,
        threshold,
        stride=(layer.stride[0], layer.stride[1]),
        padding=(top, bottom, left, right),
        dilation=(layer.dilation[0], layer.dilation[1]),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **options,
    )


def _quantizer_or_none(layer: nn.Module, target: str) -> nn.Module | None:
    return simulate.simulated_targets(layer, "quantize").get(Target("", target))


def _quantizer(layer: nn.Module, target: str) -> nn.Module:
    found = _quantizer_or_none(layer, target)
    if found is None:
        raise ConfigError(f"{target} of this {type(layer).__name__} is not quantized")
    return found


def _float_layer(layer: nn.Module) -> nn.Module:
    """Return a plain layer with the binary weight as numbers."""
    weight = _quantizer(layer, "weight")(layer._parameters["weight"])
    bias = layer._parameters.get("bias")
    plain: nn.Module
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    elif isinstance(layer, nn.Conv2d):
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias is not None,
            layer.padding_mode,
        )
    else:
        raise ConfigError(f"a {type(layer).__name__} has no packed form")
    plain.to(weight.dtype)
    plain.get_parameter("weight").data.copy_(weight)
    if bias is not None:
        plain.get_parameter("bias").data.copy_(bias)
    return plain


def _medians(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each form in milliseconds, the forms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1 if rounds else 0):
        for name, run in forms.items():
            begin = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(own) for name, own in times.items() if own}


def _bytes(module: nn.Module) -> int:
    return sum(own.numel() * own.element_size() for own in [*module.parameters(), *module.buffers()])


def _tensors(output: Any) -> list[Tensor]:
    """Return the floating tensors in an output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [own for value in output for own in _tensors(value)] if isinstance(output, list | tuple) else []


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference of outputs over the largest output."""
    pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True) if a.numel()]
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return difference / largest if largest else difference
