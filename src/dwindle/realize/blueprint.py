"""What a model's config builds: which of its integers size which dimensions, observed by building.

Nothing is known here of any family of models or of what its settings are called. An integer of the config is
changed, the model's own class builds the model anew on the meta device, and what has another size then is what
the integer sizes.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: Where an integer stands in a config: keys of nested configs, then perhaps a place in a list.
Setting = tuple[str | int, ...]

#: A size of a model: a dimension of a tensor, an integer of a module, the length of a list of modules.
Size = tuple[Any, ...]
Sizes = dict[Size, int]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_LONGEST = 64


def describes_itself(model: nn.Module) -> bool:
    """Whether a model has a config from which its class builds it, and saves that config beside its weights."""
    config = getattr(model, "config", None)
    return (
        callable(getattr(model, "save_pretrained", None))
        and callable(getattr(config, "to_dict", None))
        and callable(getattr(config, "to_json_string", None))
        and callable(getattr(type(config), "from_dict", None))
    )


def is_config(held: Any) -> bool:
    """Whether an object is a config (or a nested one)."""
    return (
        callable(getattr(held, "to_dict", None)) and hasattr(held, "__dict__") and not isinstance(held, type)
    )


def settings_of(config: Any, prefix: Setting = ()) -> Iterator[tuple[Setting, int | None]]:
    """Yield every integer above one of a config and its nested configs, and every setting that is None."""
    known = config.to_dict()
    for key, held in vars(config).items():
        if key.startswith("_") or key not in known:
            continue
        if is_config(held):
            yield from settings_of(held, (*prefix, key))
        elif held is None or (type(held) is int and held > 1):
            yield (*prefix, key), held
        elif isinstance(held, list | tuple) and len(held) <= _LONGEST:
            for place, item in enumerate(held):
                if type(item) is int and item > 1:
                    yield (*prefix, key, place), item


def holder_of(config: Any, setting: Setting) -> tuple[Any, str, int | None]:
    """Return the (nested) config that holds a setting, its key, and its place in a list."""
    place = setting[-1] if isinstance(setting[-1], int) else None
    *path, key = setting if place is None else setting[:-1]
    for part in path:
        config = getattr(config, str(part))
    return config, str(key), place


def write_setting(config: Any, setting: Setting, number: int) -> None:
    """Change one integer of a config, in place."""
    holder, key, place = holder_of(config, setting)
    if place is None:
        vars(holder)[key] = number
    else:
        items = list(vars(holder)[key])
        items[place] = number
        vars(holder)[key] = type(vars(holder)[key])(items)


def label_of(setting: Setting) -> str:
    """How to print a setting: ``text_config.hidden_size``, ``hidden_sizes[1]``."""
    text = ".".join(str(part) for part in setting if not isinstance(part, int))
    return text + "".join(f"[{part}]" for part in setting if isinstance(part, int))


def sizes_of(model: nn.Module) -> Sizes:
    """Return every size of a model: dimensions, integers of modules, lengths of lists of modules.

    Tensors that are saved with the weights are of the kind ``"tensor"``, others ``"computed"``.
    """
    found: Sizes = {}
    saved = set(model.state_dict())
    for tensors in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in tensors:
            kind = "tensor" if name in saved else "computed"
            found[(kind, name, -1)] = tensor.dim()
            for dim, size in enumerate(tensor.shape):
                found[(kind, name, dim)] = int(size)
    for path, module in model.named_modules():
        if isinstance(module, _LISTS):
            found[("list", path)] = len(module)
        for key, held in vars(module).items():
            if type(held) is int:
                found[("attribute", path, key, None)] = held
            elif isinstance(held, list | tuple) and len(held) <= 16:
                for place, item in enumerate(held):
                    if type(item) is int:
                        found[("attribute", path, key, place)] = item
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings, log lines and draws from the user's random numbers."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Blueprint:
    """Builds a model's class from changed copies of its config.

    Args:
        model: A model for which :func:`describes_itself`.
        limit: How many models may be built on the meta device in all.
    """

    def __init__(self, model: nn.Module, limit: int = 400) -> None:
        self.kind: Callable[[Any], nn.Module] = type(model)
        self.config: Any = copy.deepcopy(model.config)
        self.name = type(model).__name__
        self.remaining = limit
        #: Lists with one entry a block, as they are after blocks were removed, by their keys.
        self.lists: dict[tuple[str, ...], Any] = {}
        self._memory: dict[frozenset[tuple[Setting, int]], Sizes | None] = {}
        self._responses: dict[Setting, tuple[int, Sizes] | None] = {}

    def starting_from(self, values: Mapping[Setting, int]) -> Blueprint | None:
        """Return a blueprint whose config has other integers from the start; None where the class refuses them.

        Args:
            values: The integers.
        """
        twin = copy.copy(self)
        twin._memory, twin._responses = {}, {}
        for resized in (True, False):
            try:
                twin.config = self.changed_config(values, resized=resized)
            except Exception:  # the config's own checks, in whatever form
                continue
            if twin.sizes({}) is not None:
                return twin
        return None

    def changed_config(self, values: Mapping[Setting, int], *, resized: bool = False) -> Any:
        """Return the config with some integers changed, as it comes back from a file.

        Args:
            values: The integers.
            resized: Also give lists that are as long as a changed integer was its new length.
        """
        config = copy.deepcopy(self.config)
        for setting, number in values.items():
            holder, key, place = holder_of(config, setting)
            before = vars(holder)[key]
            if resized and place is None and type(before) is int:
                self._resize(holder, tuple(map(str, setting[:-1])), before, number)
            write_setting(config, setting, number)
        fresh = type(config).from_dict(json.loads(config.to_json_string()))
        attention = getattr(config, "_attn_implementation", None)
        if attention is not None:
            fresh._attn_implementation = attention
        return fresh

    def _resize(self, holder: Any, path: tuple[str, ...], before: int, number: int) -> None:
        for key, held in list(vars(holder).items()):
            if isinstance(held, list | tuple) and len(held) == before and not key.startswith("_"):
                known = self.lists.get((*path, key))
                fits = known is not None and len(known) == number
                vars(holder)[key] = (
                    known if fits else type(held)((list(held) * (number // before + 1))[:number])
                )

    def build(self, values: Mapping[Setting, int], device: str = "meta") -> nn.Module:
        """Build the model of a changed config; whatever its code raises is raised."""
        failure: Exception | None = None
        for resized in (True, False) if self.lists else (False, True):
            try:
                with _quietly(), torch.device(device):
                    return self.kind(self.changed_config(values, resized=resized))
            except Exception as error:  # the class's own checks, in whatever form
                failure = failure or error
        assert failure is not None
        raise failure

    def sizes(self, values: Mapping[Setting, int]) -> Sizes | None:
        """Sizes of the model of a changed config; None where its class refuses it."""
        key = frozenset(values.items())
        if key not in self._memory:
            if self.remaining <= 0:
                return None
            self.remaining -= 1
            try:
                self._memory[key] = sizes_of(self.build(values))
            except Exception:
                self._memory[key] = None
        return self._memory[key]

    def response(self, setting: Setting, number: int | None) -> tuple[int, Sizes] | None:
        """Change one integer and see: the number tried, and the sizes it then has. None where nothing builds.

        Args:
            setting: Which.
            number: Its present value.
        """
        if setting not in self._responses:
            self._responses[setting] = None
            tries = [48] if number is None else [2 * number, number // 2, 3 * number, number + 1, number - 1]
            for trial in tries:
                sizes = self.sizes({setting: trial}) if trial > 0 else None
                if sizes is None:
                    continue
                if self._responses[setting] is None:
                    self._responses[setting] = (trial, sizes)
                if (self.sizes({}) or {}).keys() <= sizes.keys():
                    self._responses[setting] = (trial, sizes)  # a number that leaves everything in its place
                    break
        return self._responses[setting]
