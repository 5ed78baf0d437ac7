"""What quantizers that learn or follow their range have in common: state that takes its shape from the first range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.numbers import SMALLEST_SCALE, NumberFormat, scale_and_zero_point
from dwindle.quantization.quantizers.base import Quantizer
from dwindle.quantization.quantizers.rounding import Bounds


class RangeQuantizer(Quantizer):
    """A quantizer whose state is empty until :meth:`initialize`, or until a checkpoint is loaded.

    Subclasses name their state with :meth:`learn` and :meth:`follow` and fill it with :meth:`put`. Parameters keep
    their identity when they are filled, so an optimizer may hold them before.

    Args:
        form: The levels.
        axis: The dimension with one scale for each index, or None for one scale.
        activation: True for activations, whose first dimension counts samples; False for weights.
    """

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis)
        self.activation = activation

    def behind(self, value: Tensor, bounds: Bounds) -> Tensor:
        """Clip and round in one.

        Args:
            value: Any floating tensor.
            bounds: What to clip to.
        """
        return self(value, bounds)  # type: ignore[no-any-return]

    def learn(self, name: str) -> None:
        """Register an empty parameter."""
        self.register_parameter(name, nn.Parameter(torch.empty(0)))

    def follow(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        """Register an empty buffer."""
        self.register_buffer(name, torch.empty(0, dtype=dtype))

    def put(self, **values: Tensor) -> None:
        """Set parameters and buffers by name, whatever shape they had."""
        for name, value in values.items():
            held = getattr(self, name)
            held.data = value.detach().clone().to(held.dtype)

    def require(self, state: Tensor) -> Tensor:
        """Return a piece of state once it was filled.

        Raises:
            ConfigError: :meth:`initialize` was not called and nothing was loaded.
        """
        if not state.numel():
            raise ConfigError(
                f"{type(self).__name__} has no range yet: call initialize(low, high) or load a state first"
            )
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, held in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and not held.numel() and saved.shape != held.shape:
                held.data = torch.empty(saved.shape, dtype=held.dtype, device=held.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ScaledQuantizer(RangeQuantizer):
    """A quantizer that learns a scale around a zero point that stays where the first range put it.

    The published symmetric methods know values around zero (zero point 0) and values above it (zero point at the
    lowest level). Both come out of the first range; so does the zero point of one-sided levels for values of both
    signs, which integer kernels need for activations without ReLU.

    Attributes:
        zero_point: int32 buffer of the shape of the scale.
    """

    zero_point: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis, activation=activation)
        self.follow("zero_point", torch.int32)

    @property
    def moved_zero(self) -> Tensor | None:
        """The zero point, or None where the format says that it is zero: rounding then saves two passes."""
        return None if self.form.symmetric and self.form.signed else self.zero_point

    def reach(self, zero_point: Tensor) -> Tensor:
        """Return how many levels lie above zero (below it, where none lie above), float32."""
        above = self.form.highest - zero_point
        return torch.where(above > 0, above, zero_point - self.form.lowest).float()


def checked(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return a first range as float32 that is fit for a start.

    Raises:
        ConfigError: NaN or infinity, an edge below the other, or two shapes.
    """
    low, high = torch.as_tensor(low).detach().float(), torch.as_tensor(high).detach().float()
    if low.shape != high.shape or low.dim() > 1:
        raise ConfigError(
            f"a range needs one value or one per channel on both sides: {low.shape}, {high.shape}"
        )
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ConfigError("the range holds NaN or infinity: the data or the model are broken")
    if bool((low > high).any()):
        raise ConfigError("the range has a low edge above its high edge")
    return low, high


def checked_sample(sample: Tensor, axis: int | None) -> Tensor:
    """Return a first tensor as float32, shape ``(channels, values)``; one row without an axis.

    Raises:
        ConfigError: It is empty, or holds NaN or infinity.
    """
    sample = sample.detach()
    if not sample.numel() or not bool(sample.isfinite().all()):
        raise ConfigError(
            "the first tensor is empty, or holds NaN or infinity: the data or the model are broken"
        )
    sample = sample.float()
    return sample.reshape(1, -1) if axis is None else sample.movedim(axis, 0).flatten(1)


def first_scale(low: Tensor, high: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of a first range, with a scale to learn from where all values are zero.

    Args:
        low: Smallest values, one or one per channel.
        high: Largest values.
        form: The levels.

    Returns:
        ``scale`` float32 and ``zero_point`` int32.
    """
    scale, zero_point = scale_and_zero_point(low, high, form)
    return alive(scale, form), zero_point


def alive(scale: Tensor, form: NumberFormat) -> Tensor:
    """Return scales with those of all-zero channels replaced by the mean of the others.

    Such a channel has nothing to say about its range, and from a scale of nearly nothing it would never learn one.
    A tensor of zeros gets the range [-1, 1] or [0, 1].
    """
    living = scale > 2 * SMALLEST_SCALE
    mean = torch.where(living, scale, 0.0).sum() / living.sum().clamp(min=1)
    mean = torch.where(living.any(), mean, 1.0 / max(form.highest, 1))
    return torch.where(living, scale, mean)


def ending_at(bound: float, levels: Tensor) -> Tensor:
    """Return the largest float32 scale of which so many levels stand for no more than a bound.

    Args:
        bound: Above zero.
        levels: How many levels lie above zero.
    """
    scale = (bound / levels.double()).float()
    return torch.where(scale * levels.float() > bound, scale.nextafter(torch.zeros_like(scale)), scale)


def positive(scale: Tensor) -> Tensor:
    """Return a learned scale as kernels take it: its absolute value, kept away from zero, with gradient."""
    return scale.abs().clamp(min=SMALLEST_SCALE)


def straight(value: Tensor, through: Tensor) -> Tensor:
    """Return exactly ``value``, with the gradient of ``through``."""
    return value.detach() + (through - through.detach())


def slowed(parameter: Tensor, factor: float) -> Tensor:
    """Return exactly a parameter, its gradient multiplied by a factor."""
    return parameter.detach() + (parameter - parameter.detach()) * factor
