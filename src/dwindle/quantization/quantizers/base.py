"""The base of quantizers: a module that rounds one tensor to levels and knows its scale."""

from __future__ import annotations

from torch import Tensor, nn

from dwindle.quantization.numbers import NumberFormat


class Quantizer(nn.Module):
    """Rounds a tensor to the levels of a number format, in training and in evaluation alike.

    A subclass writes :meth:`initialize`, :meth:`forward` and :meth:`scale_and_zero_point`. Whatever it learns are
    parameters, whatever it follows are buffers; both move and are saved with the model. A forward reads nothing back
    to the host and can be compiled.

    Args:
        form: The levels.
        axis: The dimension with one scale for each index, or None for one scale.

    Attributes:
        form: The levels.
        axis: See there.
    """

    def __init__(self, form: NumberFormat, axis: int | None = None) -> None:
        super().__init__()
        self.form, self.axis = form, axis

    def initialize(self, low: Tensor, high: Tensor, sample: Tensor | None = None) -> None:
        """Set the range at the beginning.

        Args:
            low: Smallest values seen, of the shape of the scale (one value, or one for each index of ``axis``).
            high: Largest values.
            sample: Values of the tensor itself (a weight, or a batch of an activation) where they are at hand.
        """
        raise NotImplementedError

    def forward(self, value: Tensor) -> Tensor:
        """Return the rounded tensor, of the same shape and dtype.

        Args:
            value: Any floating tensor.
        """
        raise NotImplementedError

    def behind(self, value: Tensor, bounds: tuple[float, float]) -> Tensor:
        """Return the same as for ``value.clamp(*bounds)``: an activation function and its quantizer in one.

        A subclass that can do both in fewer passes over memory does.

        Args:
            value: Any floating tensor.
            bounds: What the activation function clips to; ``(0, inf)`` is a ReLU.
        """
        return self(value.clamp(*bounds))  # type: ignore[no-any-return]

    def end_at(self, bound: float) -> None:
        """Let no level stand for more than a bound, so that runtimes can leave out the clipping before.

        Methods whose scales are powers of two, or follow what they see, have nothing to do.

        Args:
            bound: Above zero: what the activation function before clips to.
        """

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return what integer kernels need for the same result as :meth:`forward` in evaluation.

        Returns:
            ``scale`` float32 and ``zero_point`` int32, one value or one for each index of ``axis``, without gradient.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of it."""
        return f"{self.form.lowest}..{self.form.highest}, axis={self.axis}"
