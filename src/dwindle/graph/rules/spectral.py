"""Complex numbers as pairs, Fourier transforms, and views of memory."""

from __future__ import annotations

from dwindle.graph.nodes import Node
from dwindle.graph.rules.registry import Scope, freeze_everything, normalize_dims, rule


@rule("view_as_complex", "_view_as_complex")
def to_complex(node: Node, scope: Scope) -> None:
    """(..., 2) to complex numbers."""
    data = next(node.inputs())
    scope.freeze(data.axes[-1:], "real and imaginary parts")
    node.output.axes = list(data.axes[:-1])


@rule("view_as_real", "_view_as_real")
def to_real(node: Node, scope: Scope) -> None:
    """Complex numbers to (..., 2)."""
    data = next(node.inputs())
    node.output.axes = [*data.axes, scope.leaf(2, "real and imaginary parts")]


@rule(
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn",
    "fft_fftshift", "fft_ifftshift", "_fft_r2c", "_fft_c2r", "_fft_c2c",
)  # fmt: skip
def fourier(node: Node, scope: Scope) -> None:
    """Transformed dimensions are frozen before and after; the others pass."""
    data = next(node.inputs())
    dims = normalize_dims(node.argument("dim"), len(data.axes))
    reason = "mixed by a Fourier transform"
    scope.freeze([data.axes[dim] for dim in dims], reason)
    node.output.axes = [
        scope.leaf(size, reason) if dim in dims else axis
        for dim, (axis, size) in enumerate(zip(data.axes, node.output.shape, strict=True))
    ]


@rule("stft", "istft")
def short_time(node: Node, scope: Scope) -> None:
    """Windows of a signal and their spectra: nothing of them may go."""
    freeze_everything(node, scope, f"{node.name} mixes its input by Fourier transforms")


@rule("as_strided")
def windows(node: Node, scope: Scope) -> None:
    """Windows over memory: a dimension with the size and the step of one of the input is that dimension."""
    data = next(node.inputs())
    sizes, steps = [int(size) for size in node.args[1]], [int(step) for step in node.args[2]]
    reason = "cut into windows of memory"
    if node.strides is None or node.argument("storage_offset"):
        freeze_everything(node, scope, reason)
        return
    own = list(zip(data.shape, node.strides, strict=True))
    axes = []
    used = set()
    for size, step in zip(sizes, steps, strict=True):
        places = [place for place, pair in enumerate(own) if pair == (size, step) and place not in used]
        used.update(places[:1])
        axes.append(data.axes[places[0]] if places else scope.leaf(size, reason))
    scope.freeze([axis for place, axis in enumerate(data.axes) if place not in used], reason)
    node.output.axes = axes
    scope.observe_each(sizes, axes)


@rule("as_strided_scatter", "set_")
def strided(node: Node, scope: Scope) -> None:
    """Looks at memory, not at dimensions."""
    freeze_everything(node, scope, f"{node.name} addresses memory, not dimensions")
