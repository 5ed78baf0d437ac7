"""Quantizers with two levels: signs with or without a scale for weights, signs or a learned step for activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers import binary_gradients as gradients
from dwindle.quantization.quantizers.base import Quantizer

__all__ = ["BinaryActivation", "BinaryQuantizerBase", "BinaryWeight", "SignActivation", "StepActivation"]

#: Levels -1 and +1; the level 0 between them is never used.
SIGNS = NumberFormat(-1, 1, True)

#: Levels 0 and 1.
BITS = NumberFormat(0, 1, True)


class BinaryQuantizerBase(Quantizer):
    """A quantizer that can wait: until it is started it returns what it gets.

    Attributes:
        started: Whether it acts. Saved with the model, in a buffer that only loading reads.
    """

    started_flag: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None) -> None:
        super().__init__(form, axis)
        self.started = False
        self.register_buffer("started_flag", torch.zeros((), dtype=torch.bool))

    def start(self, started: bool = True) -> None:
        """Act from now on (or, with False, do not)."""
        self.started = started
        self.started_flag.fill_(started)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.started = bool(self.started_flag)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return "" if self.started else "waiting"


class BinaryWeight(BinaryQuantizerBase):
    """Weights of two values: the sign, times nothing or a mean magnitude.

    Args:
        scale: ``"none"`` (BNN), ``"channel"`` (XNOR: one mean for each output channel) or ``"tensor"`` (DoReFa).
        gradient: See :func:`~dwindle.quantization.quantizers.binary_gradients.scaled_sign`; without a scale
            one of those of :func:`~dwindle.quantization.quantizers.binary_gradients.sign`.
        axis: The dimension of the output channels.

    Raises:
        ConfigError: A name is not known.
    """

    scale: Tensor

    def __init__(self, scale: str = "channel", gradient: str = "identity", axis: int = 0) -> None:
        gradients.check_name("scale", scale, ("none", "channel", "tensor"))
        known = gradients.SIGN_GRADIENTS if scale == "none" else gradients.SCALED_GRADIENTS
        gradients.check_name("gradient", gradient, known)
        super().__init__(SIGNS, axis if scale == "channel" else None)
        self.kind, self.gradient = scale, gradient
        self.register_buffer("scale", torch.ones(()), persistent=False)

    @property
    def clips(self) -> bool:
        """Whether the trained numbers behind the signs are kept between -1 and 1 (BNN)."""
        return self.kind == "none"

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Look at the weight; nothing is learned but the weight itself.

        Raises:
            ConfigError: It holds numbers that are not finite.
        """
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ConfigError("a weight with NaN or infinite numbers has no signs")
        if sample is not None:
            self.scale = self.scale_of(sample)

    def shared_dims(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions of a weight that share one scale."""
        return tuple(dim for dim in range(weight.dim()) if dim != self.axis)

    def scale_of(self, weight: Tensor) -> Tensor:
        """Return the scale of a weight: 0-d, or ``[channels]``; rounded to float32.

        Args:
            weight: As the forward gets it.
        """
        if self.kind == "none":
            return torch.ones((), dtype=weight.dtype, device=weight.device)
        return weight.detach().abs().mean(self.shared_dims(weight)).float().to(weight.dtype)

    def forward(self, value: Tensor) -> Tensor:
        """Return the weight of two values (an all-zero channel of a scaled weight stays zero)."""
        if not self.started:
            return value
        if self.kind == "none":
            return gradients.sign(value, self.gradient)
        return gradients.scaled_sign(value, self.shared_dims(value), self.gradient)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale of the weight seen by :meth:`initialize` or :meth:`remember`, and zeros."""
        scale = self.scale.detach().float()
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def remember(self, weight: Tensor) -> None:
        """Keep the scale of a weight for :meth:`scale_and_zero_point`: it moves with every optimizer step."""
        self.scale = self.scale_of(weight)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return ", ".join(filter(None, [f"scale={self.kind}, gradient={self.gradient}", super().extra_repr()]))


class BinaryActivation(BinaryQuantizerBase):
    """What inputs of two values have in common: packed kernels ask for the place of the step and the two values."""

    #: Whether values at or above the threshold are high (signs), or only values above it (steps).
    reaches = True

    seen: Tensor

    def __init__(self, form: NumberFormat) -> None:
        super().__init__(form)
        self.watching = False
        self.register_buffer("seen", torch.full((), torch.nan), persistent=False)

    def look(self, value: Tensor) -> None:
        """Keep in ``seen`` what matters of an input: called in training while ``watching``, before it is binary."""
        raise NotImplementedError

    def level(self) -> Tensor:
        """Return the high value, 0-d; the low one is its negative for signs and 0 for steps."""
        raise NotImplementedError

    def threshold(self) -> Tensor:
        """Return where the high value begins: 0-d, or ``[channels]``."""
        raise NotImplementedError

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the high value and 0. Rounding to the nearest level is not the rule here: see :meth:`threshold`."""
        scale = self.level().detach().float()
        return scale, torch.zeros_like(scale, dtype=torch.int32)


class SignActivation(BinaryActivation):
    """Inputs of -1 and +1 (BNN, Bi-Real).

    Args:
        gradient: One of :data:`~dwindle.quantization.quantizers.binary_gradients.SIGN_GRADIENTS`.

    Raises:
        ConfigError: There is no such gradient.
    """

    def __init__(self, gradient: str = "clipped") -> None:
        super().__init__(SIGNS)
        self.gradient = gradients.check_name("gradient", gradient, gradients.SIGN_GRADIENTS)
        self.register_buffer("one", torch.ones(()), persistent=False)

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Nothing is learned."""

    def look(self, value: Tensor) -> None:
        """Keep the least value: signs of inputs that are never negative say nothing."""
        self.seen.copy_(value.amin())

    def forward(self, value: Tensor) -> Tensor:
        """Return the signs."""
        if self.watching and self.training:
            self.look(value.detach())
        return gradients.sign(value, self.gradient) if self.started else value

    def level(self) -> Tensor:
        """Return 1."""
        return self.get_buffer("one")

    def threshold(self) -> Tensor:
        """Return 0."""
        return torch.zeros_like(self.level())


class StepActivation(BinaryActivation):
    """Inputs of 0 and ``s``: ``s`` where ``x > t s``.

    Learned (NNCF, https://arxiv.org/abs/2002.08679, section 3.2), ``s = exp(log_scale)`` is one number and
    ``t = sigmoid(logit)`` one for each channel. Fixed, ``s = 1`` and ``t = 1/2``, it is DoReFa's activation of
    one bit, ``round(clip(x, 0, 1))`` with ties to even (https://arxiv.org/abs/1606.06160, eq. 11).

    Args:
        channels: Number of channels; 1 for one threshold.
        channel_dim: Their dimension, counted from the end (-1 in front of a linear layer, -3 of a 2-d convolution).
        learned: Whether scale and thresholds are trained.
    """

    reaches = False

    def __init__(self, channels: int = 1, channel_dim: int = -1, *, learned: bool = True) -> None:
        super().__init__(BITS)
        self.channels, self.channel_dim, self.learned = channels, channel_dim, learned
        if learned:
            self.log_scale = nn.Parameter(torch.zeros(()))
            self.logit = nn.Parameter(torch.zeros(channels))
        else:
            self.register_buffer("log_scale", torch.zeros(()), persistent=False)
            self.register_buffer("logit", torch.zeros(1), persistent=False)

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the scale: the least of the largest thousandth of the sample, or ``high`` without one.

        Raises:
            ConfigError: There is nothing above zero, or a number is not finite.
        """
        if not self.learned:
            return
        value = high.detach().float().amax() if sample is None else largest_thousandth(sample.detach())
        if not bool(torch.isfinite(value)) or not bool(value > 0):
            raise ConfigError(
                f"a step needs inputs above zero, its scale would be {float(value):g}; use signs for this input"
            )
        with torch.no_grad():
            self.log_scale.copy_(value.log())

    def look(self, value: Tensor) -> None:
        """Keep the least of the largest thousandth: the first scale."""
        self.seen.copy_(largest_thousandth(value))

    def forward(self, value: Tensor) -> Tensor:
        """Return the two values."""
        if self.watching and self.training:
            self.look(value.detach())
        if not self.started:
            return value
        threshold = self.logit.sigmoid()
        if self.channels > 1:
            threshold = threshold.reshape(-1, *[1] * (-1 - self.channel_dim))
        return gradients.step(value, self.log_scale.exp(), threshold)

    def level(self) -> Tensor:
        """Return ``s``."""
        return self.log_scale.detach().exp()

    def threshold(self) -> Tensor:
        """Return ``t s``, ``[channels]``."""
        return self.logit.detach().sigmoid() * self.log_scale.detach().exp()

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        own = f"channels={self.channels}, learned={self.learned}"
        return ", ".join(filter(None, [own, super().extra_repr()]))


def largest_thousandth(value: Tensor) -> Tensor:
    """Return the least of the largest thousandth of a tensor's numbers (at least one of them), 0-d float32."""
    flat = value.float().flatten()
    return flat.topk(max(flat.numel() // 1000, 1)).values[-1]
