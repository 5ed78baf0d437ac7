"""Whole experts: which go, what a plan says of it, and the masked model in which routers never choose them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.graph.analysis import Analysis
from dwindle.graph.blocks import Block
from dwindle.graph.experts import Mixture
from dwindle.graph.expressions import Attribute, variables
from dwindle.graph.tagging import config_objects
from dwindle.pruning.axis_importance import AxisImportance
from dwindle.realize.choose import best_indices, is_named
from dwindle.realize.plan import AttributeChange, Plan

#: Names of numbers that count experts, and of those that count something else about them.
_COUNTS = re.compile(r"expert")
_OTHER_NUMBERS = re.compile(r"per_tok|top|shared|active|chosen|select|capacity|idx|index|size|dim|group")
#: Operators whose size is the number of experts, whatever the attribute is called.
_SIZED = frozenset({"one_hot", "histc", "bincount"})
_LINEAR = frozenset({"linear", "addmm", "mm", "matmul", "einsum"})
_CHOICES = frozenset({"topk", "argmax", "max", "sort", "argsort"})


@dataclass(slots=True)
class ExpertCut:
    """The experts of one mixture that stay.

    Attributes:
        mixture: The mixture.
        keep: Which of its experts stay.
    """

    mixture: Mixture
    keep: torch.Tensor


def choose_experts(
    mixtures: Sequence[Mixture],
    tensors: Mapping[str, torch.Tensor],
    importance: AxisImportance,
    ratio: float,
    by_name: Mapping[str, float],
    ignore: Sequence[str],
) -> list[ExpertCut]:
    """Return which experts stay: the same share of every mixture, the most important ones.

    An expert's score is the mean over all tensors that have an entry for it, its row of the router included, each
    divided by its mean. At least as many stay as the router chooses for one token.

    Args:
        mixtures: The mixtures.
        tensors: Parameter values by name.
        importance: Scores the indices of single weights.
        ratio: Share of the experts that goes.
        by_name: Shares by pattern, in place of ``ratio`` for mixtures that match.
        ignore: Patterns of mixtures that stay.
    """
    cuts = []
    for mixture in mixtures:
        if mixture.reason is not None or any(_matches(mixture, pattern, tensors) for pattern in ignore):
            continue
        own = next(
            (share for pattern, share in by_name.items() if _matches(mixture, pattern, tensors)), ratio
        )
        count = max(1, mixture.chosen, int(mixture.size * (1 - own) + 0.5))
        if count < mixture.size:
            keep = best_indices(expert_scores(mixture, tensors, importance), count)
            cuts.append(ExpertCut(mixture, keep.nonzero().flatten()))
    return cuts


def _matches(mixture: Mixture, pattern: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    names = [
        *mixture.tensors,
        *(name for path in mixture.lists for name in tensors if name.startswith(path + ".")),
    ]
    return is_named(mixture.path, pattern) or any(is_named(name, pattern) for name in names)


def left_mixtures(analysis: Analysis, blocks: Sequence[Block]) -> list[Mixture]:
    """Return the mixtures that are in none of the residual blocks that go.

    Args:
        analysis: What was recorded.
        blocks: The blocks that go.
    """
    gone = tuple(f"{block.path}." for block in blocks)
    return [mixture for mixture in analysis.mixtures if not f"{mixture.path}.".startswith(gone)]


def expert_scores(
    mixture: Mixture, tensors: Mapping[str, torch.Tensor], importance: AxisImportance
) -> torch.Tensor:
    """Return the importance of each expert of a mixture.

    Args:
        mixture: The mixture.
        tensors: Parameter values by name.
        importance: Scores the indices of single weights.
    """
    every: list[torch.Tensor] = []
    for name, dim in mixture.tensors.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
            every.append(importance.of_weight(name, tensor.detach(), dim).double().cpu())
    for path in mixture.lists:
        places: dict[str, dict[int, float]] = {}
        for place, entry in enumerate(_entries(path, tensors, mixture.size)):
            for inner, (name, tensor) in entry.items():
                if tensor.dim() > 1 and tensor.is_floating_point():
                    own = importance.of_weight(name, tensor.detach(), 0)
                    places.setdefault(inner, {})[place] = float(own.double().mean())
        every += [
            torch.tensor([found[place] for place in sorted(found)], dtype=torch.float64)
            for found in places.values()
        ]
    total = torch.zeros(mixture.size, dtype=torch.float64)
    for scores in every:
        if scores.numel() == mixture.size and float(scores.mean()) > 0:
            total += scores / scores.mean()
    return total


def _entries(
    path: str, tensors: Mapping[str, torch.Tensor], size: int
) -> list[dict[str, tuple[str, torch.Tensor]]]:
    """Tensors of each entry of a list with their names, by their names inside the entry."""
    entries: list[dict[str, tuple[str, torch.Tensor]]] = [{} for _ in range(size)]
    for name, tensor in tensors.items():
        key, _, rest = name.removeprefix(path + ".").partition(".")
        number = re.search(r"(\d+)$", key)
        if name.startswith(path + ".") and number is not None and rest and int(number[1]) < size:
            entries[int(number[1])][rest] = (name, tensor)
    return entries


def write_experts(
    plan: Plan, model: nn.Module, analysis: Analysis, cuts: Sequence[ExpertCut], left: Sequence[Mixture]
) -> Plan:
    """Write into a plan which entries of tensors and lists go, and the numbers that count experts.

    Args:
        plan: The plan.
        model: The model.
        analysis: What was recorded of it.
        cuts: Which experts stay.
        left: The mixtures that the small model has.

    Returns:
        A plan of the experts alone.
    """
    own = Plan()
    _write(own, model, analysis, cuts, left)
    for name, dims in own.keep.items():
        plan.keep.setdefault(name, {}).update(dims)
    plan.attributes += own.attributes
    plan.entries += own.entries
    plan.cuts += own.cuts
    return own


def _write(
    plan: Plan, model: nn.Module, analysis: Analysis, cuts: Sequence[ExpertCut], left: Sequence[Mixture]
) -> None:
    counts: dict[tuple[str, str], set[int]] = {}
    changes: dict[tuple[str, str], int] = {}
    seen: dict[int, str] = {}
    for mixture in left:
        cut = next((own for own in cuts if own.mixture is mixture), None)
        new = cut.keep.numel() if cut is not None else mixture.size
        for path, key in _numbers(model, analysis, mixture, seen):
            counts.setdefault((path, key), set()).add(new)
            changes[path, key] = mixture.size
    for (path, key), found in counts.items():
        new = max(found)
        if new != changes[path, key]:  # mixtures of several sizes: the largest
            plan.attributes.append(AttributeChange(path, key, None, changes[path, key], new))
    for cut in cuts:
        mixture = cut.mixture
        for name, dim in mixture.tensors.items():
            plan.keep.setdefault(name, {})[dim] = cut.keep
        stays = set(cut.keep.tolist())
        gone: list[str] = []
        for path in mixture.lists:
            for key in model.get_submodule(path)._modules:
                number = re.search(r"(\d+)$", key)
                if number is not None and int(number[1]) not in stays:
                    gone.append(f"{path}.{key}")
        plan.entries += gone
        places = [f"{name}[{dim}]" for name, dim in mixture.tensors.items()] + mixture.lists
        plan.cuts.append(
            {"kind": "expert", "before": mixture.size, "after": cut.keep.numel(), "parameters": places}
        )


def _numbers(
    model: nn.Module, analysis: Analysis, mixture: Mixture, seen: dict[int, str]
) -> Iterator[tuple[str, str]]:
    """Attributes, on modules and configs inside and around a mixture, that count its experts."""
    around = [mixture.path]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    inside = [
        f"{mixture.path}.{path}" if mixture.path else path
        for path, _ in model.get_submodule(mixture.path).named_modules()
        if path
    ]
    observed = _observed(analysis, mixture)
    for path in [*around, *inside]:
        module = model.get_submodule(path)
        for name, owner in [("", module), *config_objects(module)]:
            where = seen.setdefault(id(owner), ".".join(part for part in (path, name) if part))
            for key, held in vars(owner).items():
                named = _COUNTS.search(key) and not _OTHER_NUMBERS.search(key)
                if type(held) is int and held == mixture.size and (named or (where, key) in observed):
                    yield where, key


def _observed(analysis: Analysis, mixture: Mixture) -> set[tuple[str, str]]:
    """Attributes that were seen to size what counts the experts."""
    found = set()
    for trace in analysis.traces:
        for node in trace.nodes:
            own = node.module == mixture.path or node.module.startswith(mixture.path + ".")
            if node.name not in _SIZED or not own:
                continue
            for expression in node.sizes or []:
                for variable in variables(expression):
                    if isinstance(variable, Attribute) and variable.number == mixture.size:
                        owner = variable.label.rpartition(".")[0]
                        found.add((owner, variable.key))
    return found


class MaskedRouters(TorchDispatchMode):
    """Makes routers give removed experts minus infinity, and choices never take them.

    Args:
        routers: For each router: its weight, the number of experts, and which of them stay.
    """

    def __init__(self, routers: Mapping[str, tuple[torch.Tensor, int, torch.Tensor]]) -> None:
        super().__init__()
        self.gone: dict[int, tuple[str, torch.Tensor]] = {}
        self.taken: dict[str, set[int]] = {name: set() for name in routers}
        for name, (weight, size, keep) in routers.items():
            gone = torch.ones(size, dtype=torch.bool)
            gone[keep] = False
            self.gone[weight.untyped_storage().data_ptr()] = name, gone
        self.now: tuple[str, torch.Tensor] | None = None
        self.used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _LINEAR:
            if self.used:  # the experts run: the choice is made
                self.now, self.used = None, False
            result = func(*args, **(kwargs or {}))
            flat = [item for own in args for item in (own if isinstance(own, list | tuple) else [own])]
            for item in flat:
                if isinstance(item, torch.Tensor):
                    found = self.gone.get(item.untyped_storage().data_ptr())
                    if found is not None and result.shape[-1] == found[1].numel():
                        self.now, self.used = found, False
                        return result.masked_fill(found[1].to(result.device), float("-inf"))
            return result
        data = args[0] if args else None
        if name in _CHOICES and self.now is not None and isinstance(data, torch.Tensor) and data.dim():
            router, gone = self.now
            if data.shape[-1] == gone.numel() and data.is_floating_point():
                data = data.masked_fill(gone.to(data.device), float("-inf"))
                result = func(data, *args[1:], **(kwargs or {}))
                self.used = True
                indices = result[1] if isinstance(result, tuple | list) else result
                if name in ("topk", "argmax", "max") and indices.dtype is torch.int64:
                    self.taken[router].update(indices.flatten().tolist())
                return result
        return func(*args, **(kwargs or {}))


Masking = Callable[[nn.Module], Any]


def masking(cuts: Sequence[ExpertCut]) -> Masking:
    """Return a function that gives, for a model, the context in which its routers never choose removed experts.

    Args:
        cuts: Which experts stay.
    """

    @contextmanager
    def masked(model: nn.Module) -> Iterator[MaskedRouters]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        routers = {
            cut.mixture.router: (parameters[cut.mixture.router], cut.mixture.size, cut.keep) for cut in cuts
        }
        mode = MaskedRouters(routers)
        with mode if routers else nullcontext():
            yield mode

    return masked
