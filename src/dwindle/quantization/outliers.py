"""Outlier channels of a layer's input are divided at run time, and the weights that read them multiplied.

In transformers a handful of channels is ten to fifty times larger than the rest, often at one token alone, and a
scale for the whole tensor leaves the rest few levels. SmoothQuant folds a division into what makes the channel,
which BERT's norms forbid (their output goes on in the residual sum as well), and so does GELU. Here the division
stays: one product in front of the quantizer, for which all layers that read the same tensor share a factor. Only
channels above a threshold are divided, each down to it: ``s_j = max(1, max|X_j| / t)``, and the threshold is
searched that leaves the layers' outputs the least error (Wei et al. 2023, "Outlier Suppression+", arXiv 2304.09145,
equations 5 and 6, without its shift). Ranges come from one part of the data and the error from another, because a
tensor of many equally large channels is clipped more easily; where that does not gain clearly, nothing is divided
and nothing is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dwindle.quantization.calls import CallKey, CallMode, ModulePath, replace_at, run_with
from dwindle.quantization.levels import fake_quantize
from dwindle.quantization.numbers import NumberFormat, scale_and_zero_point
from dwindle.quantization.padding import PADDING_MASK, padding_mask, real_tokens
from dwindle.quantization.recording import Recording
from dwindle.quantization.weights import weight_scale
from dwindle.training.inputs import Inputs
from dwindle.training.progress import tracked

BUFFER = "_dwindle_input_factor"
"""Name of the buffer of a layer that its input is multiplied by."""
_SHRINK, _CANDIDATES = 0.8, 16
_ROWS = 1024
"""Rows of an input that thresholds are judged on."""
_GAIN = 0.8
"""Divide only where the error falls below this share of what it was."""
_WEIGHT_FORM = NumberFormat.parse("int8")


@dataclass(frozen=True)
class WeightRounding:
    """What becomes of the weights that read divided channels.

    Attributes:
        share: How much of the error of nearest levels counts.
        avoid_saturation: As :func:`dwindle.quantization.weights.weight_scale` takes it.
    """

    share: float = 1.0
    avoid_saturation: bool = False


class MultiplyInput:
    """Forward pre-hook: multiplies a layer's first input by the layer's buffer. A class, so deepcopy carries it."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the input multiplied."""
        factor: Tensor = getattr(module, BUFFER)
        return replace_at(
            args, kwargs, (0,) if args else ("input",), lambda value: value * factor.to(value.dtype)
        )


def install_factor(layer: nn.Module, factor: Tensor) -> None:
    """Let a layer multiply its input by a factor for each channel.

    Args:
        layer: A linear layer; its weight is the caller's affair.
        factor: ``[channels]``.
    """
    layer.register_buffer(BUFFER, factor)
    layer.register_forward_pre_hook(MultiplyInput(), with_kwargs=True)


def installed_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of all layers that have one, by the layer's name."""
    return {
        name: layer.get_buffer(BUFFER) for name, layer in model.named_modules() if BUFFER in layer._buffers
    }


@dataclass
class _Readers:
    """Layers that read the same tensor, and what was seen of it."""

    layers: list[str]
    low: Tensor | None = None
    high: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def widen(self, value: Tensor) -> None:
        low, high = value.amin(0).double(), value.amax(0).double()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class _Inputs(CallMode):
    """Looks at the inputs of the first layer of each set of readers."""

    def __init__(self, wanted: dict[CallKey, _Readers], real: Tensor | None, judged: int) -> None:
        super().__init__(ModulePath())
        self.wanted, self.real, self.judged = wanted, real, judged

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the range, or keep some rows to judge on."""
        readers = self.wanted.get(key)
        if readers is not None:
            value = args[0] if args else kwargs["input"]
            rows = real_tokens(value, self.real).detach().reshape(-1, value.shape[-1])
            rows = rows[torch.isfinite(rows).all(1)]
            if not len(rows):
                pass
            elif self.judged:
                readers.rows.append(rows[:: max(1, len(rows) // self.judged)].float().cpu())
            else:
                readers.widen(rows.cpu())
        return func(*args, **kwargs)


def divide_outliers(
    model: nn.Module,
    recording: Recording,
    batches: Sequence[Inputs],
    form: NumberFormat,
    *,
    weight_share: float = 1.0,
    avoid_saturation: bool = False,
    padding: str | None = PADDING_MASK,
) -> dict[str, Tensor]:
    """Divide outlier channels in front of linear layers, in place. The float model stays the same function.

    Args:
        model: The model.
        recording: Its operations.
        batches: Calibration data; rows with values that are not finite are passed over. Of two or more batches every
            fourth (or the last) is judged on, the others give the ranges; of one batch alone both.
        form: Levels of activations.
        weight_share: How much of the rounding error of the weights counts, less where it will be compensated.
        avoid_saturation: Whether weights will be scaled so that no pair of products saturates.
        padding: The argument that tells padding from real tokens.

    Returns:
        By name what weights were multiplied by, broadcastable to them.
    """
    wanted = _readers(model, recording)
    judged = [*batches[3::4]] or [*batches[-1:]]
    ranging = [batch for batch in batches if not any(batch is other for other in judged)] or judged
    for part, rows in ((ranging, 0), (judged, max(1, _ROWS // len(judged)))):
        for args, kwargs in tracked(part, "outliers: batches"):
            run_with(model, _Inputs(wanted, padding_mask(kwargs, padding), rows), args, kwargs)
    factors: dict[str, Tensor] = {}
    for readers in tracked(list(wanted.values()), "outliers: layers"):
        if readers.low is None or readers.high is None or not readers.rows:
            continue
        weights = torch.cat(
            [model.get_parameter(f"{name}.weight").detach().cpu().float() for name in readers.layers]
        )
        edges = readers.low, readers.high
        rounded = WeightRounding(weight_share, avoid_saturation)
        divisor = best_divisor(torch.cat(readers.rows), edges, weights, form, rounded)
        if divisor is not None:
            for name in readers.layers:
                factors[f"{name}.weight"] = _divide(model.get_submodule(name), divisor)
    return factors


def _divide(layer: nn.Module, divisor: Tensor) -> Tensor:
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        weight.copy_(weight.double() * divisor.to(weight.device))
    install_factor(layer, (1 / divisor).to(weight))
    return divisor


def best_divisor(
    rows: Tensor,
    edges: tuple[Tensor, Tensor],
    weights: Tensor,
    form: NumberFormat,
    rounding: WeightRounding = WeightRounding(),
) -> Tensor | None:
    """Return by what to divide channels so that products with the weights lose least; None where it does not pay.

    Args:
        rows: ``[samples, channels]`` float32, to judge on.
        edges: Smallest and largest value of each channel, float64, of other samples.
        weights: ``[outputs, channels]`` float32.
        form: Levels of the activation.
        rounding: What becomes of the weights.

    Returns:
        ``[channels]`` float64, at least 1.
    """
    magnitude = torch.maximum(-edges[0], edges[1]).clamp(min=0.0)
    largest = float(magnitude.max())
    if largest == 0.0:
        return None
    plain = best = divided_error(rows, edges, weights, form, torch.ones_like(magnitude), rounding)
    chosen = None
    for step in range(1, _CANDIDATES):
        divisor = (magnitude / (largest * _SHRINK**step)).clamp(min=1.0)
        error = divided_error(rows, edges, weights, form, divisor, rounding)
        if error < best:
            best, chosen = error, divisor
    return chosen if best < _GAIN * plain else None


def divided_error(
    rows: Tensor,
    edges: tuple[Tensor, Tensor],
    weights: Tensor,
    form: NumberFormat,
    divisor: Tensor,
    rounding: WeightRounding,
) -> float:
    """Return the squared error of the outputs when both operands are rounded, for one divisor.

    Shapes as in :func:`best_divisor`. The errors of the two operands are added up as if they were independent.
    """
    own = divisor.float()
    scale, zero_point = scale_and_zero_point((edges[0] / divisor).min(), (edges[1] / divisor).max(), form)
    values, multiplied = rows / own, weights * own
    rounded = fake_quantize(values, scale, zero_point, form)
    steps = weight_scale(multiplied, 0, _WEIGHT_FORM, avoid_saturation=rounding.avoid_saturation).float()
    nearest = fake_quantize(multiplied, steps, torch.zeros(len(steps), dtype=torch.int32), _WEIGHT_FORM, 0)
    from_values = ((rounded - values) @ multiplied.t()).double().square().sum()
    from_weights = (values @ (nearest - multiplied).t()).double().square().sum()
    return float(from_values + rounding.share * from_weights)


def _readers(model: nn.Module, recording: Recording) -> dict[CallKey, _Readers]:
    """Return sets of linear layers that read one tensor, by the call of the first of each."""
    uses: dict[str, int] = {}
    for operation in recording.operations:
        for _, value in operation.inputs:
            if value.name is not None:
                uses[value.name] = uses.get(value.name, 0) + 1
    found: dict[int, tuple[CallKey, _Readers]] = {}
    for operation in recording.operations:
        name, data = operation.key.module, operation.at(0, "input")
        if operation.key.operation != "linear" or data is None or not data[1].active:
            continue
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or parametrize.is_parametrized(layer) or BUFFER in layer._buffers:
            continue
        if uses.get(f"{name}.weight") != 1:
            continue
        index = data[1].index
        if index in found:
            found[index][1].layers.append(name)
        else:
            found[index] = operation.key, _Readers([name])
    return dict(found.values())


def prepare_factors(model: nn.Module, layers: Iterable[str]) -> None:
    """Give layers of a freshly made model the buffers that a loaded state fills.

    Raises:
        AttributeError: There is no such layer.
    """
    for name in layers:
        weight = model.get_submodule(name).get_parameter("weight")
        install_factor(model.get_submodule(name), torch.ones_like(weight[0].detach()))


__all__ = [
    "BUFFER",
    "MultiplyInput",
    "WeightRounding",
    "best_divisor",
    "divide_outliers",
    "divided_error",
    "install_factor",
    "installed_factors",
    "prepare_factors",
]
