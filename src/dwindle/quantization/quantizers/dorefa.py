"""Weights, activations and gradients of k bits (DoReFa-Net, Zhou et al. 2016, arXiv 1606.06160)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dwindle.config.errors import ConfigError
from dwindle.quantization.numbers import NumberFormat
from dwindle.quantization.quantizers.base import Quantizer
from dwindle.quantization.quantizers.rounding import Gradient, learned_round

_CLIP = Gradient("closed")


class DorefaWeightQuantizer(Quantizer):
    """Squeezes weights by ``tanh`` into [-1, 1] and rounds them: ``2 quantize(tanh w / (2 max|tanh w|) + 1/2) - 1``.

    Gradients pass through the rounding, and by the chain rule through ``tanh`` and the maximum. Levels are those of
    the (symmetric) form, so zero is one of them: ``2^k - 1`` levels, where the paper's ``2^k`` leave zero out.
    What integer kernels hold is the *result* of this module as levels, not the rounded parameter itself. Weights come
    out in [-1, 1], as in the paper: made for networks whose normalization takes up the size.

    Args:
        form: Symmetric signed levels.
        axis: Not supported by the paper's maximum over the layer; must be None.
        activation: Must be False.

    Raises:
        ConfigError: Other levels, or an axis.
    """

    scale: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = False) -> None:
        super().__init__(form, axis)
        if activation:
            raise ConfigError("this quantizer is for weights; DorefaActivationQuantizer is for activations")
        if not form.symmetric or not form.signed or form.lowest != -form.highest:
            raise ConfigError(
                f"DoReFa weights need symmetric levels such as -7..7, got {form.lowest}..{form.highest}"
            )
        if axis is not None:
            raise ConfigError(
                "DoReFa weights have one scale for a layer; quant_granularity must be 'default'"
            )
        self.register_buffer("scale", torch.tensor(1.0 / form.highest))

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Do nothing: the range is [-1, 1]."""

    def forward(self, value: Tensor) -> Tensor:
        """Squeeze and round; a weight of zeros stays zero.

        Args:
            value: A weight.
        """
        return learned_round(squeeze(value), self.scale, None, self.form, gradient=_CLIP)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the fixed step ``1 / highest`` and zero."""
        return self.scale.float(), torch.zeros((), dtype=torch.int32, device=self.scale.device)


class DorefaActivationQuantizer(Quantizer):
    """Clips activations to [0, 1] and rounds them to ``2^k`` levels; the gradient passes inside.

    Args:
        form: Unsigned affine levels.
        axis: Must be None.
        activation: Must be True.

    Raises:
        ConfigError: Other levels, or an axis.
    """

    scale: Tensor

    def __init__(self, form: NumberFormat, axis: int | None = None, *, activation: bool = True) -> None:
        super().__init__(form, axis)
        if not activation:
            raise ConfigError("this quantizer is for activations; DorefaWeightQuantizer is for weights")
        if form.signed or form.symmetric or axis is not None:
            raise ConfigError("DoReFa activations need unsigned affine levels and one scale, such as uint4")
        self.register_buffer("scale", torch.tensor(1.0 / form.highest))

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Do nothing: the range is [0, 1]."""

    def forward(self, value: Tensor) -> Tensor:
        """Clip and round.

        Args:
            value: Any floating tensor.
        """
        return learned_round(value, self.scale, None, self.form, gradient=_CLIP)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the fixed step ``1 / highest`` and zero."""
        return self.scale.float(), torch.zeros((), dtype=torch.int32, device=self.scale.device)


class GradientQuantizer(nn.Module):
    """Passes a tensor on as it is, and rounds the gradient that comes back to ``bits`` bits with noise.

    Args:
        bits: 2 to 16.

    Raises:
        ConfigError: Another number of bits.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ConfigError(f"gradients are rounded to 2 to 16 bits, not {bits}")
        self.bits = bits

    def forward(self, value: Tensor) -> Tensor:
        """Return the value.

        Args:
            value: Any floating tensor whose first dimension counts samples.
        """
        result: Tensor = _RoundGradient.apply(value, 2**self.bits - 1)
        return result

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"bits={self.bits}"


def squeeze(weight: Tensor) -> Tensor:
    """Return ``tanh w / max|tanh w|``, in [-1, 1]; zeros stay zeros.

    Args:
        weight: Any floating tensor. Of several largest values the first carries the gradient of the maximum.
    """
    result: Tensor = _Squeeze.apply(weight)
    return result


def round_gradient(gradient: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Return ``2 m (quantize(g / (2 m) + 1/2 + noise / steps) - 1/2)``, with m the largest size in each sample.

    Args:
        gradient: Shape ``(samples, ...)``.
        noise: Uniform in [-1/2, 1/2], the same shape.
        steps: ``2^bits - 1``.

    Returns:
        The rounded gradient; samples of zeros stay zero.
    """
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient.reshape(-1, 1)
    most = rows.abs().amax(1, keepdim=True)
    safe = torch.where(most > 0, most, 1.0)
    place = (rows / (2 * safe) + 0.5) * steps + noise.reshape(rows.shape)
    rounded = place.round().clamp(0, steps) / steps - 0.5
    return (2 * most * rounded).reshape(gradient.shape)


class _Squeeze(torch.autograd.Function):
    """See :func:`squeeze`; by hand, because the derivative of a maximum takes many passes otherwise."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        squeezed = weight.tanh()
        low, high = squeezed.aminmax()
        most = torch.maximum(-low, high)
        most = torch.where(most > 0, most, torch.ones_like(most))
        ctx.save_for_backward(squeezed, most)
        return squeezed / most

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        squeezed, most = ctx.saved_tensors
        flow = upstream / most
        flat = squeezed.reshape(-1)
        largest = flat.abs().argmax().reshape(1)
        share = (flow * squeezed).sum() / most * flat.index_select(0, largest).sign()
        moved = flow.reshape(-1).index_add(0, largest, -share).reshape(flow.shape)
        return torch.ops.aten.tanh_backward(moved, squeezed)


class _RoundGradient(torch.autograd.Function):
    """Identity whose gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, steps: int) -> Tensor:
        ctx.steps = steps
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        wide = upstream.float() if upstream.dtype in (torch.float16, torch.bfloat16) else upstream
        noise = torch.rand_like(wide) - 0.5
        return round_gradient(wide, noise, ctx.steps).to(upstream.dtype), None
