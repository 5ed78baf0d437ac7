"""A second proof that shares nothing with the first: an eager masked copy in plain torch, beside the small model.

Nothing of the graph, the axes or the surgery is imported. Of a plan only plain data is read: which indices of which
dimension of which parameter stay. On *exact* axes (``dw.prune(..., exact=True)``) the small model must equal a copy of
the original whose removed parameter entries are zero. Buffers (running statistics) are never masked: the scale and
shift of a norm carry the same axis and are zero already.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.architectures.example import Example

#: For each parameter, for each dimension that shrank, the indices that stayed: tensors, or lists as saved in JSON.
PlanKeep = Mapping[str, Mapping[Any, Any]]

BATCHES = (1, 2, 3)
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Comparison:
    """What was compared.

    Attributes:
        difference: Largest difference of an output element in evaluation mode, relative to the largest output.
        training_difference: Likewise in training mode (batch statistics, no dropout); None where the original is
            not deterministic there, or does not run.
        moved: How far masking moved the outputs of the original: a proof on outputs that do not move is empty.
        batches: Batch sizes that were run.
    """

    difference: float
    training_difference: float | None
    moved: float
    batches: list[int]


def independent_difference(
    original: nn.Module, small: nn.Module, plan_keep: PlanKeep, example: Example
) -> float:
    """Return the largest relative difference between the small model and the plainly masked original.

    Args:
        original: A copy of the model from before it was pruned (``copy.deepcopy(model)``).
        small: The result, ``result.model``.
        plan_keep: ``result.plan.keep``, or the ``keep`` of its JSON form.
        example: The inputs; its model is not used.
    """
    found = compare(original, small, plan_keep, example)
    return max(found.difference, found.training_difference or 0.0)


def compare(
    original: nn.Module,
    small: nn.Module,
    plan_keep: PlanKeep,
    example: Example,
    *,
    producers_only: bool = False,
    training: bool = True,
    batches: tuple[int, ...] = BATCHES,
) -> Comparison:
    """Compare in evaluation mode, and in training mode where the original is deterministic.

    Args:
        original: As for :func:`independent_difference`; neither model is changed.
        small: Likewise.
        plan_keep: Likewise.
        example: Likewise.
        producers_only: Mask only what *makes* a channel, not the weights that read it. That is the stronger
            reference where removed channels arrive as zeros (no sigmoid and the like on the way): that readers lose
            the right columns then follows, it is not assumed.
        training: Whether to compare in training mode at all.
        batches: Batch sizes in evaluation mode.
    """
    whole, reduced = _precise(original), _precise(small)
    _enliven(whole, reduced, plan_keep)
    # a list of images has no batch dimension: then as the example is
    inputs = [*_inputs(example, batches), *_inputs(example, ())]
    plain = [_run_or_none(whole, args, kwargs) for _, (args, kwargs) in inputs]
    mask_parameters(whole, plan_keep, producers_only=producers_only)
    masked, worst, moved, ran = whole, 0.0, 0.0, []
    for (size, (args, kwargs)), unmasked in zip(inputs, plain, strict=True):
        if size == 0 and ran:
            break
        expected = _run_or_none(masked, args, kwargs)
        if expected is None or unmasked is None:
            continue  # code that fixes the batch size
        worst = max(worst, _difference(expected, _run(reduced, args, kwargs)))
        moved = max(moved, _difference(expected, unmasked))
        ran.append(size)
    if not ran:
        raise ValueError("the masked original runs on none of the inputs")
    return Comparison(worst, _training(masked, reduced, example) if training else None, moved, ran)


def _training(masked: nn.Module, small: nn.Module, example: Example) -> float | None:
    """Difference in training mode; None where the masked original does not run or is random there."""
    worst: float | None = None
    for _, (args, kwargs) in _inputs(example, (4,)):
        twins = [copy.deepcopy(masked).train() for _ in range(2)]
        try:
            expected, again = (_run(twin, args, kwargs, seed=seed) for seed, twin in enumerate(twins))
        except Exception:
            continue
        if _difference(expected, again) == 0.0:
            found = _run(copy.deepcopy(small).train(), args, kwargs, seed=2)
            worst = max(worst or 0.0, _difference(expected, found))
    return worst


# masking


def mask_parameters(model: nn.Module, plan_keep: PlanKeep, *, producers_only: bool = False) -> None:
    """Set the removed entries of every parameter to zero; buffers are left alone."""
    parameters = _named_tensors(model)
    readers = _reading_dims(model) if producers_only else {}
    with torch.no_grad():
        for name, dims in plan_keep.items():
            tensor = parameters.get(name)
            if not isinstance(tensor, nn.Parameter):
                continue
            for dim, index in dims.items():
                if int(dim) in readers.get(id(tensor), ()):
                    continue
                gone = torch.ones(tensor.shape[int(dim)], dtype=torch.bool)
                gone[torch.as_tensor(index)] = False
                tensor.data.movedim(int(dim), 0)[gone] = 0


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and plain tensor attribute by name; parametrized ones by the name of the user."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key, held in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
            if isinstance(held, torch.Tensor):
                name = prefix + key
                if "parametrizations." in name and name.endswith(".original"):
                    name = name.replace("parametrizations.", "").removesuffix(".original")
                found[name] = held
    return found


def _reading_dims(model: nn.Module) -> dict[int, set[int]]:
    """Dimensions of weights that read channels, by what torch's own modules do with their weights."""
    found: dict[int, set[int]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                found.setdefault(id(parameter), set()).add(0)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or (
                isinstance(module, nn.RNNBase) and name.startswith("weight_")
            ):
                found.setdefault(id(parameter), set()).add(1)
    return found


def enliven(model: nn.Module) -> nn.Module:
    """Give constant tensors random values, in place: do it before pruning where weights may be scaled by it.

    A zero bias times a factor is still zero, so that afterwards nobody can tell whether it was scaled.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in _named_tensors(model).values()}.values():
            constant = tensor.numel() > 1 and not bool((tensor != tensor.flatten()[0]).any())
            if tensor.is_floating_point() and constant:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.add_((0.1 + 0.5 * noise).to(tensor.dtype))
    return model


def _enliven(whole: nn.Module, small: nn.Module, plan_keep: PlanKeep) -> None:
    """Give tensors that are constant (fresh norms, zero-initialised heads) random values, the same in both models.

    Only where the small tensor is what plain slicing of the whole one gives: other values were computed.
    """
    generator = torch.Generator().manual_seed(1)
    twins = _named_tensors(small)
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in _named_tensors(whole).items():
            twin = twins.get(name)
            if twin is None or id(tensor) in seen or not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            seen.add(id(tensor))
            if bool((tensor != tensor.flatten()[0]).any()):
                continue
            if not torch.equal(_sliced(tensor, plan_keep.get(name, {})), twin):
                continue
            noise = tensor + 0.1 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.data.copy_(noise)
            twin.data.copy_(_sliced(noise, plan_keep.get(name, {})))


def _sliced(tensor: torch.Tensor, dims: Mapping[Any, Any]) -> torch.Tensor:
    for dim, index in dims.items():
        tensor = tensor.index_select(int(dim), torch.as_tensor(index))
    return tensor


# running


class _Wide(TorchDispatchMode):
    """Casts to narrower floats stay wide, and dropout does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            return args[0]
        if name == "scaled_dot_product_attention" and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])

        def widen(item: Any) -> Any:
            return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item

        if name == "_grouped_mm" and args[0].dtype is torch.float64:
            return _grouped_product(*args, **kwargs)
        return func(*(widen(item) for item in args), **{key: widen(item) for key, item in kwargs.items()})


def _grouped_product(
    rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Rows of each group times the matrix of that group; torch's kernel has no double precision."""
    starts = [0, *ends.tolist()[:-1]]
    parts = [rows[a:b] @ weight for a, b, weight in zip(starts, ends.tolist(), weights, strict=True)]
    rest = rows.new_zeros(rows.shape[0] - int(ends[-1]), weights.shape[-1])
    return torch.cat([*parts, rest])


@contextmanager
def _wide() -> Iterator[None]:
    default, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(torch.float64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), _Wide():
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


def _precise(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode and double precision, plain tensor attributes too."""
    twin = copy.deepcopy(model).double().eval()
    for module in twin.modules():
        for key, held in vars(module).items():
            if isinstance(held, torch.Tensor) and held.is_floating_point():
                vars(module)[key] = held.double()
    return twin


def _inputs(example: Example, batches: tuple[int, ...] = BATCHES) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Random inputs like the example's, at several batch sizes where all tensors share their first dimension."""
    leaves, spec = pytree.tree_flatten((tuple(example.args), dict(example.kwargs)))
    firsts = {item.shape[0] for item in leaves if isinstance(item, torch.Tensor) and item.dim()}
    own = firsts.pop() if len(firsts) == 1 else 0
    generator = torch.Generator().manual_seed(2)
    for size in batches if own and batches else (0,):

        def noise(item: Any, size: int = size) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            if own and size and item.dim():
                item = item.repeat(-(-size // own), *[1] * (item.dim() - 1))[:size]
            if item.is_floating_point():
                return torch.randn(item.shape, generator=generator, dtype=torch.float64)
            if item.dtype is torch.bool or item.numel() < 2:
                return item.clone()
            return item.flatten()[torch.randperm(item.numel(), generator=generator)].view(item.shape)

        yield size, pytree.tree_unflatten([noise(item) for item in leaves], spec)


def _run(model: nn.Module, args: Any, kwargs: Any, seed: int = 0) -> list[torch.Tensor]:
    args, kwargs = pytree.tree_map(
        lambda item: item.clone() if isinstance(item, torch.Tensor) else item, (args, kwargs)
    )
    torch.manual_seed(seed)
    with _wide():
        output = model(*args, **kwargs)
        if isinstance(output, Mapping) and any("logits" in str(key) for key in output):
            # hidden states and caches beside the logits may shrink with the model
            output = [
                held for key, held in output.items() if "logits" in key or "pred" in key or key == "loss"
            ]
        return [item.clone() for item in _tensors(output)]


def _run_or_none(model: nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor] | None:
    try:
        return _run(model, args, kwargs)
    except Exception:
        return None


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for item in pytree.tree_leaves(tree):
        if isinstance(item, torch.Tensor):
            yield item
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            for entry in dataclasses.fields(item):
                yield from _tensors(getattr(item, entry.name))


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest element of its tensor; infinite where shapes differ."""
    if len(expected) != len(found) or not expected:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or a.isnan().any() or b.isnan().any():
            return float("inf")
        if a.numel():
            a, b = a.double(), b.double()
            gap = torch.where(a == b, torch.zeros_like(a), (a - b).abs()).max()
            finite = a[a.isfinite()].abs()
            scale = float(finite.max()) if finite.numel() else 1.0
            worst = max(worst, float(gap) / max(scale, 1e-12))
    return worst
