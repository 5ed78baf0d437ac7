"""A plain copy of a model that ``fully_shard`` has cut up."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dwindle.simulate.host import without_wrapper
from dwindle.simulate.sharding import has_shards, reshard, whole

__all__ = ["gathered"]

_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def gathered(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model that ``fully_shard`` has cut up, with its whole parameters and its simulators.

    All processes must call it together, and each gets the whole model. What it returns computes as the model does, and
    can be analysed, realized, quantized, saved and exported as any other.

    Args:
        model: The model; not changed. One that is not cut up is given back itself.
    """
    if not has_shards(model):
        return model
    reshard(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = whole(parameter)
        if value.data_ptr() == parameter.data_ptr():
            value = value.clone()
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    with _unwrapped(model):
        return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """While inside, the modules have their own classes and none of the hooks that gather parameters."""
    from torch.distributed.fsdp import FSDPModule

    modules = list(model.modules())
    saved = [(module, type(module), dict(vars(module))) for module in modules]
    try:
        for module in modules:
            module.__class__ = without_wrapper(type(module), FSDPModule)
            for key, value in list(vars(module).items()):
                if key in _MARKS or key.startswith("__composable_api_state_key"):
                    del vars(module)[key]
                elif key.endswith("_hooks") and isinstance(value, Mapping):
                    vars(module)[key] = _foreign(value)
        yield
    finally:
        for module, kind, state in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)


def _foreign(hooks: Mapping[int, Any]) -> Mapping[int, Any]:
    """Return hooks without those of torch's own distribution."""
    kept = {number: hook for number, hook in hooks.items() if not _is_distribution(hook)}
    return type(hooks)(kept)  # type: ignore[call-arg]


def _is_distribution(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # hooks on state dicts are wrapped
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")
