"""The small layers: a chain of plain torch modules that answers like the layer it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.config.errors import ConfigError
from dwindle.factorization.forms import LayerForm, Part, empty_weight, full_ranks, parts_of

__all__ = [
    "FactorizedConvolution",
    "FactorizedLayer",
    "FactorizedLinear",
    "composed_kernel",
    "make_layer",
    "reads_seen",
]

_CONVOLUTIONS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

#: Layers whose product was read, while somebody looks.
_watched: list[set[int]] = []


@contextmanager
def reads_seen() -> Iterator[set[int]]:
    """Give a set to which the id of each layer is added whose ``weight`` is read inside."""
    seen: set[int] = set()
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched.remove(seen)


class FactorizedLayer(nn.Sequential):
    """A chain of torch's own linear layers or convolutions in the place of one.

    Everything that works on modules (optimizers, pruning, quantization, export) sees the parts. Code that asks for the
    old layer's numbers finds them: ``weight`` is the product of the parts, made anew each time it is read, with its
    gradient; ``bias`` is the last part's own.

    Args:
        parts: The modules.
        method: What made them.
        transposed: ``weight`` is ``[in, out]``.
    """

    __jit_unused_properties__ = ("weight", "bias", "ranks")

    def __init__(self, parts: Sequence[nn.Module], method: str, *, transposed: bool = False) -> None:
        super().__init__(*parts)
        self.method = method
        self.transposed = transposed

    def __getitem__(self, index: Any) -> Any:
        """Return one part, or a plain chain of some."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same, of the old shape."""
        for seen in _watched:
            seen.add(id(self))
        kernel = composed_kernel(list(self))
        return kernel.t() if self.transposed else kernel

    @property
    def bias(self) -> Tensor | None:
        """The bias, a parameter of the last part."""
        found: Tensor | None = self[-1].bias  # type: ignore[assignment]
        return found

    @property
    def ranks(self) -> tuple[int, ...]:
        """The widths between the parts: one rank, or for Tucker-2 those of outputs and of inputs."""
        widths = [_channels(part)[1] for part in self][:-1]
        return (widths[1], widths[0]) if self.method == "tucker" else (widths[0],)

    def extra_repr(self) -> str:
        """Return the method and the ranks."""
        return f"{self.method}, rank {'x'.join(map(str, self.ranks))}"

    def __repr__(self) -> str:
        inside = ", ".join(repr(part) for part in self)
        return f"{type(self).__name__}({self.extra_repr()}: {inside})"


class FactorizedLinear(FactorizedLayer):
    """Two linear layers in the place of one (of ``nn.Linear``, or of Hugging Face's Conv1D)."""

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return _channels(self[0])[0]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return _channels(self[-1])[1]

    @property
    def nx(self) -> int:
        """Size of the input, as Hugging Face's Conv1D calls it."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Size of the output, as Hugging Face's Conv1D calls it."""
        return self.out_features


class FactorizedConvolution(FactorizedLayer):
    """A chain of convolutions in the place of one."""

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return _channels(self[0])[0]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return _channels(self[-1])[1]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Size of the one kernel."""
        return self._largest("kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of all parts together."""
        return self._largest("stride")

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of the one kernel."""
        return self._largest("dilation")

    @property
    def padding(self) -> tuple[int, ...] | str:
        """Padding of all parts together."""
        named = [part.padding for part in self if isinstance(part.padding, str)]
        return str(named[0]) if named else self._largest("padding")

    @property
    def padding_mode(self) -> str:
        """What is padded with."""
        modes = [str(part.padding_mode) for part in self if part.padding_mode != "zeros"]
        return modes[0] if modes else "zeros"

    @property
    def groups(self) -> int:
        """Always 1."""
        return 1

    def _largest(self, name: str) -> tuple[int, ...]:
        return tuple(max(sizes) for sizes in zip(*(getattr(part, name) for part in self), strict=True))


def _channels(part: nn.Module) -> tuple[int, int]:
    """Return the channels that a part reads and gives."""
    weight: Any = part.weight
    groups = getattr(part, "groups", 1)
    return int(weight.shape[1]) * int(groups), int(weight.shape[0])


def composed_kernel(parts: Sequence[nn.Module]) -> Tensor:
    """Return the kernel ``[out, in, ...]`` of the one convolution that a chain computes.

    No two parts may have the same dimension of the kernel.
    """
    kernel: Any = parts[0].weight
    for part in parts[1:]:
        own: Any = part.weight
        if own.shape[1] == 1 and getattr(part, "groups", 1) == own.shape[0]:
            kernel = kernel * own
        else:
            kernel = torch.einsum("or...,ri...->oi...", own, kernel)
    result: Tensor = kernel
    return result


def make_layer(
    method: str,
    form: LayerForm,
    ranks: Sequence[int],
    weights: Sequence[Tensor] | None,
    bias: Tensor | None,
    like: Tensor,
) -> FactorizedLayer:
    """Return the chain for a layer.

    Args:
        method: The method.
        form: The layer.
        ranks: From 1 to those of :func:`full_ranks`, where there is such a bound.
        weights: Of the parts; None leaves them without values.
        bias: A parameter that the last part takes over, or None.
        like: The old weight: dtype, device, and whether it is trained.

    Raises:
        ConfigError: The ranks do not fit.
    """
    full = full_ranks(method, form)
    if len(ranks) != len(full) or any(rank < 1 for rank in ranks):
        raise ConfigError(f"rank {list(ranks)} does not fit {method!r}, which takes {len(full)} from 1 on")
    if method != "cp" and any(rank > most for rank, most in zip(ranks, full, strict=True)):
        raise ConfigError(f"rank {list(ranks)} is above the full rank {list(full)}")
    parts = parts_of(method, form, ranks)
    modules = []
    for number, part in enumerate(parts):
        value = empty_weight(part, form, like) if weights is None else weights[number].to(like)
        module = _module(part, form)
        module.weight = nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
        modules.append(module)
    if bias is not None:
        modules[-1].register_parameter("bias", bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias))
    if not form.kernel:
        return FactorizedLinear(modules, method, transposed=form.transposed)
    return FactorizedConvolution(modules, method)


def _module(part: Part, form: LayerForm) -> nn.Module:
    """Return a module without values."""
    if not form.kernel:
        return nn.Linear(part.inputs, part.outputs, bias=False, device="meta")
    padding: Any = form.padding
    if isinstance(padding, str):
        padding = padding if padding == "same" and part.dims else 0
    else:
        padding = tuple(own if dim in part.dims else 0 for dim, own in enumerate(form.padding))

    def only(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size if dim in part.dims else 1 for dim, size in enumerate(sizes))

    module: nn.Module = _CONVOLUTIONS[len(form.kernel)](
        part.inputs,
        part.outputs,
        only(form.kernel),
        stride=only(form.stride),
        padding=padding,
        dilation=only(form.dilation),
        groups=part.outputs if part.depthwise else 1,
        bias=False,
        padding_mode=form.padding_mode if part.dims else "zeros",
        device="meta",
    )
    return module
