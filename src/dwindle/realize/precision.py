"""Running a model at the precision of a proof: in float64 throughout, whatever narrower casts its code makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.graph.function_caches import function_caches_kept
from dwindle.graph.stand_ins import copied

#: Above this many parameter elements a proof runs in float32.
FLOAT64_LIMIT = 200_000_000


class _Widened(TorchDispatchMode):
    """Lets casts to narrower floats stay in float64, so that both sides are compared at full precision."""

    _NARROW = (torch.float32, torch.float16, torch.bfloat16)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(item: Any) -> Any:
            if isinstance(item, torch.dtype):
                return torch.float64 if item in self._NARROW else item
            return item

        args = tuple(widen(argument) for argument in args)
        kwargs = {key: widen(argument) for key, argument in (kwargs or {}).items()}
        if func is torch.ops.aten.conv2d.default and len(args) > 6 and args[6] == args[1].shape[0] > 1:
            return depthwise_convolution(*args)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is torch.float64:
            return grouped_product(*args, **kwargs)
        return func(*args, **kwargs)


def depthwise_convolution(
    data: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Depthwise 2-d convolution as a sum over kernel positions: torch's own is very slow in float64.

    Args:
        data: (N, C, H, W).
        weight: (C, 1, kernel height, kernel width).
        bias: (C,) or None.
        stride: Of height and width.
        padding: Likewise.
        dilation: Likewise.
        groups: C.
    """
    if weight.shape[1] != 1 or data.dim() != 4:
        return torch.ops.aten.conv2d.default(data, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = (
        [*pair] * 2 if len(pair) == 1 else pair for pair in (stride, padding, dilation)
    )
    padded = torch.nn.functional.pad(data, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    height = (padded.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (padded.shape[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    result = data.new_zeros(data.shape[0], groups, height, width)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            top, left = row * dilation[0], column * dilation[1]
            window = padded[
                :,
                :,
                top : top + stride[0] * (height - 1) + 1 : stride[0],
                left : left + stride[1] * (width - 1) + 1 : stride[1],
            ]
            result.addcmul_(window, weight[:, 0, row, column].view(1, -1, 1, 1))
    return result if bias is None else result + bias.view(1, -1, 1, 1)


def grouped_product(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Product of rows, sorted by group, with one matrix a group: torch's own has no float64.

    Args:
        left: (rows, in) or (groups, rows, in).
        right: (groups, in, out) or (in, out).
        offs: Where each group ends.
        bias: Added to the result.
        out_dtype: Not used: everything is float64.
    """
    if offs is None:
        result = left @ right
    else:
        ends = offs.tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        rows, columns = left.shape[-2], right.shape[-1]
        if left.dim() == 2 and right.dim() == 2:
            result = torch.stack([left[:, a:b] @ right[a:b] for a, b in spans])
        elif left.dim() == 2:
            result = left.new_zeros(rows, columns)
            for number, (a, b) in enumerate(spans):
                result[a:b] = left[a:b] @ right[number]
        else:
            result = left.new_zeros(rows, columns)
            for number, (a, b) in enumerate(spans):
                result[:, a:b] = left[number] @ right[:, a:b]
    return result if bias is None else result + bias


@contextmanager
def precise(dtype: torch.dtype) -> Iterator[None]:
    """Run in ``dtype``: factory functions and casts follow; no gradients; random state kept."""
    default = torch.get_default_dtype()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(False)
        with function_caches_kept(), torch.inference_mode(), torch.random.fork_rng(devices=[]):
            if dtype is torch.float64:
                with _Widened():
                    yield
            else:
                yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def proof_dtype(model: nn.Module) -> torch.dtype:
    """Precision of the proof for a model of this size."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    return torch.float64 if elements <= FLOAT64_LIMIT else torch.float32


def widened_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a deep copy in evaluation mode and in ``dtype`` (complex numbers in the complex type of that width)."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    twin = copied(model)._apply(widen).eval()
    for module in twin.modules():
        for key, held in vars(module).items():
            if isinstance(held, torch.Tensor):
                vars(module)[key] = widen(held)
    return twin
