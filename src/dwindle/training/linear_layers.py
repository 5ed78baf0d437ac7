"""Linear layers as matrices: ``output = matrix @ column`` for Linear, convolutions and Hugging Face's Conv1D.

Methods that work layer by layer (Wanda, SparseGPT) look at a layer as a least-squares problem; here its weight becomes
one matrix for each group of the convolution, and its input becomes the columns that the matrix is multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.config import Granularity
from dwindle.config.errors import DwindleError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Columns of one piece hold at most so many numbers.
_PIECE = 1 << 24


def is_linear_layer(module: nn.Module) -> bool:
    """Whether the module is a Linear, a convolution (not transposed) or Hugging Face's Conv1D."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Hugging Face's Conv1D: a linear layer that holds ``[in, out]``; known by its name, as it is not torch's."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def to_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a tensor of the weight's shape as ``[groups, rows, columns]``: outputs by what they read.

    Args:
        module: The layer.
        weight: Its weight, or anything of that shape.
    """
    if _is_transposed(module):
        return weight.t().unsqueeze(0)
    groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(module: nn.Module, matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo :func:`to_matrix`.

    Args:
        module: The layer.
        matrix: ``[groups, rows, columns]``.
        shape: The weight's shape.
    """
    return matrix[0].t() if _is_transposed(module) else matrix.reshape(shape)


def columns(module: nn.Module, value: Tensor) -> Iterator[Tensor]:
    """Yield what the matrix of a layer is multiplied with, in pieces of bounded size.

    Args:
        module: The layer.
        value: Its input, of one call.

    Yields:
        ``[groups, samples, columns]`` in float32 at least; a sample is one place of the output.
    """
    value = value.detach()
    if value.dtype.itemsize < 4:
        value = value.float()
    if not isinstance(module, _CONVOLUTIONS):
        for piece in value.reshape(-1, value.shape[-1]).split(max(1, _PIECE // max(value.shape[-1], 1))):
            yield piece.unsqueeze(0)
        return
    if value.dim() == module.weight.dim() - 1:
        value = value.unsqueeze(0)
    size = value[0].numel() * math.prod(module.kernel_size)
    for images in value.split(max(1, _PIECE // max(size, 1))):
        yield _patches(module, images)


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, images: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies: ``[groups, samples, columns]``."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = functional.pad(images, module._reversed_padding_repeated_twice, mode=mode)
    count = len(module.kernel_size)
    steps = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (kernel, stride, dilation) in enumerate(steps, start=2):
        images = images.unfold(dim, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    batch, channels = images.shape[:2]
    grouped = images.reshape(batch, module.groups, channels // module.groups, *images.shape[2:])
    places = range(3, 3 + count)
    ordered = grouped.permute(1, 0, *places, 2, *range(3 + count, 3 + 2 * count))
    return ordered.reshape(module.groups, -1, channels // module.groups * math.prod(module.kernel_size))


def sums_of_squares(module: nn.Module, value: Tensor) -> tuple[Tensor, int]:
    """Return the sum of squares of each column over the samples of one call, and how many samples there are.

    Returns:
        ``[groups, columns]`` and the number.
    """
    pieces = [(piece.square().sum(1), piece.shape[1]) for piece in columns(module, value)]
    return torch.stack([squares for squares, _ in pieces]).sum(0), sum(count for _, count in pieces)


def sums_of_products(module: nn.Module, value: Tensor) -> tuple[Tensor, int]:
    """Return ``X' X`` of the samples X of one call, and how many samples there are.

    Returns:
        ``[groups, columns, columns]`` and the number.
    """
    total: Tensor | None = None
    samples = 0
    with torch.autocast(value.device.type, enabled=False):  # the products would be rounded to half precision
        for piece in columns(module, value):
            product = piece.transpose(1, 2) @ piece
            total = product if total is None else total.add_(product)
            samples += piece.shape[1]
    if total is None:
        raise ValueError("a call without any sample")  # split() always gives one piece
    return total, samples


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper Cholesky factor U of the inverse: ``inv(H + damping * mean(diag H)) = U' U``.

    Args:
        hessian: ``X X'``, symmetric, ``[columns, columns]``.
        damping: Share of the mean of the diagonal that is added to the diagonal; multiplied by ten, up to four
            times, where rounding leaves no positive matrix.

    Raises:
        DwindleError: It has no factor even so.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    level = mean if mean > 0 else 1.0
    for power in range(5):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**power * level)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
    raise DwindleError("the inputs of this layer give no positive definite matrix; try a larger damping")


def block_ids(module: nn.Module, granularity: Granularity, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the number of the block that each entry of the matrix belongs to, ``[groups, rows, columns]``.

    Args:
        module: The layer.
        granularity: Blocks of its weight. For an N:M pattern a block is one window of M neighbours.
        shape: The weight's shape.
    """
    if granularity.kind == "pattern":
        moved = [*shape]
        axis = granularity.axis % len(moved)
        moved[axis] //= granularity.window
        windows = torch.arange(math.prod(moved)).reshape(moved)
        return to_matrix(module, windows.repeat_interleave(granularity.window, axis))
    own = granularity.block_shape(shape)
    numbers = torch.arange(math.prod(own)).reshape(own)
    return to_matrix(module, granularity.expand(numbers, shape).contiguous())


def input_of(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor | None:
    """Return the tensor that a linear layer was called with; None when there is none or it is empty."""
    given = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
    return None if given is None or not given.numel() else given
