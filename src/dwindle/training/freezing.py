"""Freezing: parts of a model stand still for a time, their weights and their running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dwindle.config.entries import EXCLUSION_KEYS, SELECTION_KEYS, Entry, parse_entries
from dwindle.config.errors import ConfigError, did_you_mean
from dwindle.config.selection import ModuleIndex, excluded_by, selected_modules
from dwindle.simulate.simulators import RESERVED

__all__ = ["Freezing", "frozen"]


class Freezing:
    """A compressor that changes nothing, and lets chosen modules stand still while it is attached.

    Their parameters get no gradients, so optimizers pass them over (momentum and weight decay included), and their
    normalizations use running statistics and leave them as they are, also where the loop calls ``model.train()``.
    Afterwards each parameter requires a gradient again where it did before. With
    :class:`dwindle.training.Staged` it begins and ends at a step or an epoch:

        fit(..., compressors=[pruner, Staged(Freezing(model, [{"op_names": ["head"]}]), stop=500)])

    Under ``DistributedDataParallel`` a stage that begins or ends while it trains needs ``find_unused_parameters=True``.

    Args:
        model: The model.
        config_list: Entries that select modules (``op_types``, ``op_names``, ``op_names_re``, and ``exclude_...`` of
            each); everything below a selected module is selected too, and all below an excluded one is not.
        statistics: Whether running statistics of normalizations stand still too.

    Raises:
        ConfigError: An entry has another key, or selects nothing.
    """

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], *, statistics: bool = True
    ) -> None:
        self.model, self.statistics = model, statistics
        self.op_names = _selected(model, config_list)
        self._before: list[tuple[nn.Parameter, bool]] = []
        self._handles: list[RemovableHandle] = []
        self._frozen = False

    @property
    def is_frozen(self) -> bool:
        """Whether the modules stand still now."""
        return self._frozen

    def attach(self) -> None:
        """Let the modules stand still."""
        if self._frozen:
            return
        self._frozen = True
        modules = dict(self.model.named_modules())
        for name in self.op_names:
            for parameter in modules[name].parameters(recurse=False):
                self._before.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimizer would go on with what is left there
            if self.statistics and getattr(modules[name], "running_mean", None) is not None:
                self._handles += _in_evaluation(modules[name])

    def detach(self) -> None:
        """Let them move again."""
        for handle in self._handles:
            handle.remove()
        for parameter, wanted in reversed(self._before):
            parameter.requires_grad_(wanted)
        self._before, self._handles, self._frozen = [], [], False

    def rest(self) -> None:
        """Let them move again, at the end of a stage."""
        self.detach()

    def step(self) -> None:
        """The optimizer has made one step."""

    def loss(self) -> float:
        """What to add to the loss: nothing."""
        return 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters: none."""
        yield from ()

    def status(self) -> dict[str, float]:
        """How many parameters stand still."""
        return {"frozen parameters": float(sum(parameter.numel() for parameter, _ in self._before))}

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ConfigError: A key is missing.
        """
        if "frozen" not in state:
            raise ConfigError("the state of a Freezing needs 'frozen'")
        if state["frozen"]:
            self.attach()
        else:
            self.detach()


@contextlib.contextmanager
def frozen(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], *, statistics: bool = True
) -> Iterator[list[str]]:
    """Let chosen modules of a model stand still inside a ``with`` block.

    Args:
        model: The model.
        config_list: As in :class:`Freezing`.
        statistics: As there.

    Yields:
        Names of the modules.

    Raises:
        ConfigError: An entry has another key, or selects nothing.
    """
    freezing = Freezing(model, config_list, statistics=statistics)
    freezing.attach()
    try:
        yield freezing.op_names
    finally:
        freezing.detach()


def _selected(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the modules that entries select, with all below them."""
    known = (*SELECTION_KEYS, *EXCLUSION_KEYS)
    for index, item in enumerate(config_list if isinstance(config_list, list | tuple) else ()):
        for key in item if isinstance(item, Mapping) else ():
            if key not in known:
                raise ConfigError(
                    f"config_list[{index}]: key {key!r} is not known for freezing{did_you_mean(str(key), known)}"
                )
    index_of_modules = ModuleIndex(model)
    chosen: set[str] = set()
    for entry in parse_entries(config_list, "pruning", model):
        chosen |= _below(entry, index_of_modules)
    return [name for name in index_of_modules.by_name if name in chosen]


def _below(entry: Entry, modules: ModuleIndex) -> set[str]:
    def with_all_below(names: set[str]) -> set[str]:
        return {
            name
            for name in modules.by_name
            if any(not own or name == own or name.startswith(own + ".") for own in names)
        }

    kept = with_all_below(set(selected_modules(entry, modules))) - with_all_below(excluded_by(entry, modules))
    return {name for name in kept if RESERVED not in name.split(".")}


def _in_evaluation(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Let each call of a module run in evaluation mode; the flag itself is as the loop sets it."""
    flags: list[bool] = []

    def enter(own: nn.Module, args: Any) -> None:
        flags.append(own.training)
        own.training = False

    def leave(own: nn.Module, args: Any, output: Any) -> None:
        own.training = flags.pop()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
