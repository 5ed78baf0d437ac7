"""Counts multiply-accumulate operations (MACs) of one forward pass.

One MAC is one multiplication and one addition of a matrix product, a convolution or an attention product.
Counted are ``mm``, ``addmm``, ``bmm``, ``baddbmm``, ``mv``, ``dot`` and their kin, every convolution
(groups, strides and transposition included), both products of scaled dot product attention (in full, causal
or not), recurrent layers (their matrix products) and bilinear layers. Torch's own table of formulas is used
where it is right (each entry there is two FLOPs a MAC); the operators that it silently counts as zero have
a formula of their own here: attention on the CPU, oneDNN and cuDNN recurrent kernels, matrix-vector
products, bilinear products, int8 products. The fused transformer encoder kernel is switched off while
counting.

Not counted: elementwise work (activations, norms, softmax, residual additions), pooling, interpolation,
embedding look-ups, sorting, Fourier transforms and the additions of biases. Custom operators and known
heavy operators without a formula are not counted either, but they are named in :attr:`MacCount.uncounted`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dwindle.graph.modes import in_mode
from dwindle.graph.nested_values import flatten

aten = torch.ops.aten


@dataclass
class MacCount:
    """What one forward pass costs.

    Attributes:
        total: MACs of the whole forward pass of the given inputs (all samples of the batch together).
        by_module: MACs spent inside each module, its children included; ``""`` is the model itself. A
            module that is called several times has the sum. Empty when it was not asked for.
        by_operator: MACs by operator name, such as ``aten.convolution``.
        uncounted: Operators met that do arithmetic this counter has no formula for.
    """

    total: int = 0
    by_module: dict[str, int] = field(default_factory=dict)
    by_operator: dict[str, int] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)


def count_macs(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the MACs of ``model(*args, **kwargs)``; made to be called in a loop.

    The forward pass runs in evaluation mode on the meta device, where nothing is computed, and on the real
    tensors only when the model's code needs values. The model is left as it was.

    Args:
        model: The model, on any device.
        args: Positional inputs (real, meta or fake tensors).
        kwargs: Keyword inputs.

    Returns:
        Multiply-accumulate operations of the whole batch.
    """
    return _count(model, tuple(args), dict(kwargs or {}), by_module=False).total


def count_macs_by_module(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> MacCount:
    """Count the MACs of ``model(*args, **kwargs)``, and how they are spread over modules and operators.

    Args:
        model: The model, on any device.
        args: Positional inputs.
        kwargs: Keyword inputs.
    """
    return _count(model, tuple(args), dict(kwargs or {}), by_module=True)


def _count(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_module: bool) -> MacCount:
    with in_mode(model, training=False), counting_kernels():
        try:
            return _count_on_meta(model, args, kwargs, by_module=by_module)
        except Exception:  # the model's own code may raise anything when it meets a tensor without values
            return _count_running(model, args, kwargs, by_module=by_module)


def _count_running(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_module: bool
) -> MacCount:
    counter = _Counter()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _module_hooks(model, counter if by_module else None),
        counter,
    ):
        model(*args, **kwargs)
    return counter.result()


def _count_on_meta(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_module: bool
) -> MacCount:
    twins: dict[int, Tensor] = {}

    def on_meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            twins[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
        return twins[id(tensor)]

    state = {
        name: on_meta(tensor)
        for tensors in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in tensors
    }
    leaves, rebuild = flatten({"args": args, "kwargs": kwargs})
    call = rebuild([on_meta(tensor) for _, tensor in leaves])
    counter = _Counter()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _module_hooks(model, counter if by_module else None),
        counter,
    ):
        torch.func.functional_call(model, state, call["args"], call["kwargs"], tie_weights=False)
    return counter.result()


@contextlib.contextmanager
def counting_kernels() -> Iterator[None]:
    """Switch off the fused transformer encoder kernel inside, so that its operators are seen one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _module_hooks(model: nn.Module, counter: _Counter | None) -> Iterator[None]:
    """Keep the counter's stack of running modules while inside."""
    if counter is None:
        yield
        return
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: counter.enter(name)))
        handles.append(module.register_forward_hook(lambda _m, _a, _o: counter.leave(), always_call=True))
        counter.macs_by_module[name] = 0
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter(TorchDispatchMode):
    """Adds up the MACs of every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.macs_by_module: dict[str, int] = {}
        self.macs_by_operator: dict[str, int] = {}
        self.uncounted: dict[str, None] = {}
        self._stack: list[str] = []

    def enter(self, name: str) -> None:
        self._stack.append(name)

    def leave(self) -> None:
        self._stack.pop()

    def result(self) -> MacCount:
        return MacCount(self.total, self.macs_by_module, self.macs_by_operator, list(self.uncounted))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in _SHAPE_KEEPING and args[0].device.type == "meta":
            return _SHAPE_KEEPING[packet](args[0])
        formula = _formula(packet)
        if formula is None and func is not aten.detach.default and packet not in flop_registry:
            with self:  # a composite operator is counted through the operators that it is made of
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if formula is not None:
            self._add(str(packet), formula(args, kwargs, out))
        elif _is_heavy(packet):
            self.uncounted[str(packet)] = None
        return out

    def _add(self, operator: str, macs: int) -> None:
        self.total += macs
        self.macs_by_operator[operator] = self.macs_by_operator.get(operator, 0) + macs
        for name in set(self._stack):
            self.macs_by_module[name] += macs


Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], int]


def _formula(packet: Any) -> Formula | None:
    """Return the formula for an operator: ours first, then torch's (two FLOPs a MAC), or None."""
    if packet in MAC_FORMULAS:
        return MAC_FORMULAS[packet]
    if packet in flop_registry:
        flops = flop_registry[packet]
        return lambda args, kwargs, out: flops(*args, **kwargs, out_val=out) // 2
    return None


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    query, key, value = args[:3]
    width = query.shape[-1] + value.shape[-1]  # one product for the scores, one for the mixture of values
    return math.prod(query.shape[:-1]) * key.shape[-2] * width


def _onednn_recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    inputs, input_weight, hidden_weight = args[:3]
    positions = inputs.shape[0] * inputs.shape[1]
    return positions * (math.prod(input_weight.shape) + math.prod(hidden_weight.shape))


def _cudnn_recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    inputs, weights = args[0], args[1]
    positions = math.prod(inputs.shape[:-1])
    return positions * sum(math.prod(weight.shape) for weight in weights if weight.dim() == 2)


def _matrix_vector(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    return math.prod(args[0].shape)


def _added_matrix_vector(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    return math.prod(args[1].shape)


def _matrix_matrix(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    return math.prod(args[0].shape) * args[1].shape[-1]


def _trilinear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    first, weight = args[:2]
    # sum over both inputs for each output: first the product with one input, then with the other
    samples = math.prod(first.shape[:-2]) if first.dim() > 2 else first.shape[0]
    outputs, left, right = weight.shape[-3:]
    return samples * outputs * (left * right + right)


def _table() -> dict[Any, Formula]:
    named: dict[str, Formula] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "mkldnn_rnn_layer": _onednn_recurrent,
        "_cudnn_rnn": _cudnn_recurrent,
        "miopen_rnn": _cudnn_recurrent,
        "mv": _matrix_vector,
        "dot": _matrix_vector,
        "vdot": _matrix_vector,
        "addmv": _added_matrix_vector,
        "addmv_": _added_matrix_vector,
        "_int_mm": _matrix_matrix,
        "_trilinear": _trilinear,
    }
    return {getattr(aten, name): formula for name, formula in named.items() if hasattr(aten, name)}


MAC_FORMULAS: dict[Any, Formula] = _table()
"""Formulas of this house, by operator packet; a project may add its own custom operators here."""


def _norm_on_meta(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = features.new_empty(features.shape[1] if features.dim() > 1 else 0)
    return torch.empty_like(features), channels, channels


# Meta kernels written in Python are slow (most of the time of a small convolutional net); these have no MACs
# and plain shapes.
_SHAPE_KEEPING: dict[Any, Callable[[Tensor], Any]] = {
    aten.native_batch_norm: _norm_on_meta,
    **{
        packet: torch.empty_like
        for packet in (
            aten.relu,
            aten.hardswish,
            aten.hardsigmoid,
            aten.silu,
            aten.gelu,
            aten.sigmoid,
            aten.elu,
        )
    },
    **{
        packet: lambda features: features
        for packet in (aten.relu_, aten.hardswish_, aten.hardsigmoid_, aten.silu_, aten.hardtanh_, aten.elu_)
    },
}

_HEAVY_WORDS = (
    "fft",
    "cdist",
    "_rnn",
    "conv",
    "grid_sampler",
    "linalg",
    "sparse",
    "multi_head",
    "encoder_layer",
)
_QUIET_NAMESPACES = ("aten", "prims", "prim", "profiler", "torchvision")


def _is_heavy(packet: Any) -> bool:
    """Tell whether an operator without a formula should be named to the user."""
    namespace, _, name = str(packet).partition(".")
    if namespace not in _QUIET_NAMESPACES:
        return True
    return any(word in name for word in _HEAVY_WORDS) and "backward" not in name
