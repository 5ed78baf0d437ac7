"""The quantizers of a model that is trained with them: its state, and the forward that passes through it.

They stand in the root under the reserved name, so that they move, are saved and are trained with the model, and no
container trips over them. Weights are rounded where a call reads them, behind whatever mask sits on the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dwindle.quantization.aware_training.placing import TrainingPlaces
from dwindle.quantization.calls import CallKey, ModulePath, remove_hooks, track_modules, untrack_modules
from dwindle.quantization.folding import channel_factor, times_channels
from dwindle.quantization.numbers import SMALLEST_SCALE
from dwindle.quantization.quantizers import GradientQuantizer, Quantizer
from dwindle.quantization.quantizers.moving_average import edges, move
from dwindle.quantization.simulation import PlacedMode, Simulation, WeightSlot, round_bias
from dwindle.simulate.host import table_of
from dwindle.simulate.parts import add_part, part_of, remove_part
from dwindle.simulate.sharding import whole
from dwindle.training.processes import widest_range

PART = "quantization"
"""Name of the bank among the parts of the root."""

SAMPLE = 2**16
"""Values of an activation that are kept as the sample that learned steps start from."""


_NORMALIZATION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""Arguments of ``torch.nn.functional.batch_norm``."""


class WatchedRange(nn.Module):
    """What an activation was like in the last steps: its range, and a few of its values.

    Args:
        momentum: Weight of a new batch in the range.

    Attributes:
        low: Followed minimum; 0-d, NaN before the first batch.
        high: Followed maximum.
        sample: The last batch's values, evenly thinned; None before.
    """

    low: Tensor
    high: Tensor

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("low", torch.tensor(torch.nan), persistent=False)
        self.register_buffer("high", torch.tensor(torch.nan), persistent=False)
        self.sample: Tensor | None = None

    @torch.no_grad()
    def update(self, value: Tensor, *, together: bool = False) -> None:
        """Take in a batch.

        Args:
            value: Any floating tensor; it is not kept.
            together: It is a part of one that is spread over all processes, which call this at the same time.
        """
        least, most = (edge.float() for edge in edges(value, None))
        if together:
            least, most = widest_range(least, most)
        fresh = self.low.isnan() & least.isfinite() & most.isfinite()
        self.low.copy_(torch.where(fresh, least, self.low))
        self.high.copy_(torch.where(fresh, most, self.high))
        move(self.low, self.high, least, most, self.momentum)
        self.sample = value.detach().reshape(-1)[:: max(1, value.numel() // SAMPLE)].clone()


class TrainedQuantizers(nn.Module):
    """All quantizers of one model.

    Args:
        places: Where they stand while normalizations run, and where behind that.
        activations: One for each activation quantizer of the placement.
        weights: One for each weight; calls that read the same parameter share one.
        weight_of: Which of ``weights`` belongs to a call.
        normalization_of: Path of the normalization behind a layer whose weight is rounded as the folded one.
        gradient_bits: Bits of the gradients that come back to each rounded layer; None leaves them.

    Attributes:
        rounds_weights: Whether weights are rounded yet.
        rounds_activations: Whether activations are.
        watches: Whether :attr:`watched` looks at activations.
        normalization_frozen: Whether normalizations that will be folded take running statistics in training too.
        folded_call: The call of a layer by the call of the normalization that will be folded into it.
        ends: What activation functions before quantizers of activations clip to, by the number of the quantizer.
    """

    def __init__(
        self,
        places: TrainingPlaces,
        activations: list[Quantizer],
        weights: list[Quantizer],
        weight_of: dict[CallKey, int],
        normalization_of: dict[CallKey, tuple[str, str]],
        gradient_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.places, self.weight_of, self.normalization_of = places, weight_of, normalization_of
        slots = {key: WeightSlot(found, 0, 0) for key, found in places.training.weights.items()}
        self.simulation = Simulation(places.training, slots, [])
        self.activations, self.weights = nn.ModuleList(activations), nn.ModuleList(weights)
        self.watched = nn.ModuleList(WatchedRange() for _ in activations)
        self.folded_call = {
            fold.call: key
            for fold in places.folds
            for key in places.training.weights
            if key.module == fold.layer
        }
        self.gradients = None if gradient_bits is None else GradientQuantizer(gradient_bits)
        self.rounds_weights = self.rounds_activations = True
        self.watches = self.normalization_frozen = self.ranges_frozen = False
        self.ends: dict[int, float] = {}
        self.path = ModulePath()
        self.running: list[TrainingMode] = []

    def train(self, mode: bool = True) -> TrainedQuantizers:
        """Follow the model's mode; frozen ranges stay in evaluation."""
        super().train(mode)
        if self.ranges_frozen:
            for quantizer in self.modules():
                if isinstance(quantizer, Quantizer):
                    quantizer.training = False
        return self

    def keep_ends(self) -> None:
        """Let no activation have levels beyond what the function before it clips to."""
        for number, bound in self.ends.items():
            quantizer = self.activations[number]
            assert isinstance(quantizer, Quantizer)
            quantizer.end_at(bound)

    def freeze_ranges(self) -> None:
        """Let the ranges that follow the batches stand still from now on."""
        self.ranges_frozen = True
        self.train(self.training)


class TrainingMode(PlacedMode):
    """Rounds weights and activations as far as training has come."""

    def __init__(self, model: nn.Module, bank: TrainedQuantizers) -> None:
        super().__init__(bank.simulation)
        self.path = bank.path
        self.model, self.bank = model, bank

    def watches(self, operation: str) -> bool:
        """Name the calls that carry a quantizer, and those of normalizations that may be frozen."""
        return operation == "batch_norm" or super().watches(operation)

    def activation(self, value: Tensor, quantizer: int) -> Tensor:
        """Round an activation, or watch it."""
        bank = self.bank
        if bank.watches and bank.training:
            bank.watched[quantizer].update(value, together=torch.is_grad_enabled())  # type: ignore[operator]
        own = bank.activations[quantizer]
        result: Tensor = own(value) if bank.rounds_activations else wait(value, own)
        return result

    def weight(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Round a weight, folded into its normalization where one scale serves several channels."""
        own = self.bank.weights[self.bank.weight_of[key]]
        if not self.bank.rounds_weights:
            return wait(value, own)
        names = self.bank.normalization_of.get(key)
        behind = None if names is None else [self.model.get_submodule(name) for name in names]
        return rounded_weight(own, value, behind)

    def bias(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Round a bias as integer kernels add it; that of a folded normalization is rounded there."""
        if value is None or key.module in self.bank.places.normalization_of or not self._rounds_bias(slot):
            return value
        return round_bias(value, self._bias_scale(key, slot))

    def _rounds_bias(self, slot: WeightSlot) -> bool:
        bank = self.bank
        return bank.rounds_weights and bank.rounds_activations and self.simulation.has_integer_kernel(slot)

    def _bias_scale(self, key: CallKey, slot: WeightSlot) -> Tensor:
        """Return the step of a call's 32-bit bias before folding: input scale times weight scale."""
        weights, inputs = (
            self.bank.weights[self.bank.weight_of[key]],
            self.bank.activations[slot.place.input_quantizer],
        )
        return weights.scale_and_zero_point()[0] * inputs.scale_and_zero_point()[0].reshape(())  # type: ignore

    def _normalize(self, key: CallKey, given: dict[str, Any]) -> dict[str, Any]:
        """Return a folded normalization's arguments: frozen where it is, its shift rounded as its bias will be."""
        if self.bank.normalization_frozen:
            given = {**given, "training": False}
        call = self.bank.folded_call[key]
        slot = self.simulation.slots[call]
        if given.get("training") or not self._rounds_bias(slot):
            return given
        layer, normalization = self.model.get_submodule(call.module), self.model.get_submodule(key.module)
        factor = channel_factor(normalization).detach()
        scale = self._bias_scale(call, slot).double()
        if call not in self.bank.normalization_of:
            scale = (scale * factor.abs()).clamp(min=SMALLEST_SCALE)
        shift = normalization.running_mean.double() * -factor  # type: ignore[union-attr, operator]
        for own, size in ((layer._parameters.get("bias"), factor), (given["bias"], torch.ones_like(factor))):
            shift = shift if own is None else shift + whole(own).double() * size
        moved = (round_bias(shift, scale) - shift).to(given["input"].dtype)
        return {**given, "bias": moved if given["bias"] is None else given["bias"] + moved}

    def result(self, value: Tensor, key: CallKey, slot: WeightSlot) -> Tensor:
        """Round the gradient that comes back."""
        return value if self.bank.gradients is None else self.bank.gradients(value)

    def on_call(self, key: CallKey, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call with its quantizers around it."""
        if key in self.bank.folded_call:
            given = {"weight": None, "bias": None, **dict(zip(_NORMALIZATION, args, strict=False)), **kwargs}
            given = self._normalize(key, given)
            args, kwargs = (given.pop("input"),), given
        quantizer = self.simulation.placement.outputs.get(key)
        bounds = _bounds(key.operation, args, kwargs)
        if quantizer is not None and bounds is not None:
            if 0 < bounds[1] < math.inf:
                self.bank.ends[quantizer] = bounds[1]
            if self.bank.rounds_activations:
                result: Tensor = self.bank.activations[quantizer].behind(args[0], bounds)  # type: ignore[operator]
                return result
        return super().on_call(key, func, args, kwargs)


def rounded_weight(quantizer: nn.Module, weight: Tensor, behind: Sequence[nn.Module] | None) -> Tensor:
    """Return a rounded weight.

    Args:
        quantizer: What rounds it.
        weight: As the call reads it.
        behind: The layer and the normalization behind it where the folded weight is what is rounded; None where
            rounding comes to the same before and after folding.
    """
    if behind is None:
        result: Tensor = quantizer(weight)
        return result
    layer, normalization = behind
    factor = channel_factor(normalization).detach().to(weight.dtype)
    factor = torch.where(factor == 0, torch.ones_like(factor), factor)
    return times_channels(quantizer(times_channels(weight, layer, factor)), layer, factor.reciprocal())


def _bounds(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """Return what an activation function clips to; None for other calls."""
    if operation == "relu":
        return 0.0, float("inf")
    if operation == "relu6":
        return 0.0, 6.0
    if operation == "hardtanh":
        given = {**dict(zip(("input", "min_val", "max_val"), args, strict=False)), **kwargs}
        return float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))
    return None


class _Wait(torch.autograd.Function):
    """A tensor as it is, with a gradient of zero for parameters that have no part in it yet."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream, *(torch.zeros_like(own) for own in ctx.saved_tensors)


def wait(value: Tensor, quantizer: nn.Module) -> Tensor:
    """Return a tensor as it is; data parallel training still gets a gradient for each parameter of the quantizer."""
    parameters = [own for own in quantizer.parameters() if own.requires_grad]
    if not parameters or not torch.is_grad_enabled():
        return value
    result: Tensor = _Wait.apply(value, *parameters)
    return result


class _Start:
    """Forward pre-hook of the root: switches the quantizers on that it finds in the model."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        bank = bank_of(module)
        if bank is None or not table_of(module).enabled:  # type: ignore[union-attr]
            return
        mode = TrainingMode(module, bank)
        bank.running.append(mode)
        bank.path.stack.append("")
        mode.__enter__()


class _Stop:
    """Forward hook of the root: switches them off, also when the forward raised."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        bank = bank_of(module)
        if bank is not None and bank.running:
            bank.running.pop().__exit__(None, None, None)
            bank.path.stack.clear()


def bank_of(model: nn.Module) -> TrainedQuantizers | None:
    """Return the quantizers that a model is trained with; None when it has none."""
    found = part_of(model, PART)
    return found if isinstance(found, TrainedQuantizers) else None


def attach_bank(model: nn.Module, bank: TrainedQuantizers) -> None:
    """Put quantizers on a model, in place."""
    track_modules(model, bank.path)
    add_part(model, PART, bank)
    model.register_forward_pre_hook(_Start(), prepend=True)
    model.register_forward_hook(_Stop(), always_call=True)


def begin_pass(model: nn.Module) -> None:
    """Let a forward that is under way pass through quantizers that one of its own pre-hooks has put on the model."""
    _Start()(model, ())


def detach_bank(model: nn.Module) -> TrainedQuantizers | None:
    """Take a model's quantizers off again, and return them."""
    bank = bank_of(model)
    if bank is None:
        return None
    remove_part(model, PART)
    untrack_modules(model, bank.path)
    remove_hooks(model, lambda hook: isinstance(hook, _Start | _Stop))
    return bank
