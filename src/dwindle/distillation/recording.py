"""Hooks that keep what went into and came out of modules during the last forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dwindle.config.errors import ConfigError

__all__ = ["CallRecorder", "TargetRecorder", "plain_copy", "tensors_in"]


class CallRecorder:
    """Keeps the arguments and the output of the last call of a model that is made for training.

    Calls without gradients (evaluation) are not kept. A copy of the model (``deepcopy``, pickle) carries a
    recorder that is empty and asleep, so copies are cheap and independent.
    """

    def __init__(self) -> None:
        self.awake = True
        self.clear()

    def clear(self) -> None:
        """Forget the last call."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None
        self.complete = False
        self.autocast: dict[str, torch.dtype | None] = {}
        self._versions: list[tuple[Tensor, int]] = []

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the two hooks on a model."""
        return [
            model.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: keep the arguments."""
        if not self.awake or not torch.is_grad_enabled():
            return
        self.clear()
        self.args, self.kwargs = args, dict(kwargs)
        tensors = list(tensors_in((args, kwargs)))
        self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        for device in {tensor.device.type for tensor in tensors}:
            enabled = torch.is_autocast_enabled(device)
            self.autocast[device] = torch.get_autocast_dtype(device) if enabled else None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keep the output."""
        if self.awake and torch.is_grad_enabled():
            self.output = output
            self.complete = True

    def check_inputs_unchanged(self) -> None:
        """Raise when the model wrote into its own inputs, which the teacher is to see too.

        Raises:
            ConfigError: An input tensor was changed in place.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise ConfigError(
                "the inputs of the model were changed in place after it was called, so the teacher cannot "
                "see what the model saw; change a copy instead"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> CallRecorder:
        return _asleep(CallRecorder())

    def __reduce__(self) -> tuple[Any, ...]:
        return _asleep_call_recorder, ()


class TargetRecorder:
    """Keeps the inputs or outputs of chosen modules, every call of the last forward pass in order.

    Args:
        targets: Pairs of a module's name and ``_input_0``, ``_input_name``, ``_output_0`` and so on.
        role: Whose modules they are, for messages: ``"student"`` or ``"teacher"``.
    """

    def __init__(self, targets: Iterable[tuple[str, str]], role: str):
        self.targets = sorted(set(targets))
        self.role = role
        self.awake = True
        self.values: dict[tuple[str, str], list[Tensor]] = {}

    def attach(self, model: nn.Module, *, only_with_gradients: bool) -> list[RemovableHandle]:
        """Put hooks on the modules; a new call of ``model`` itself begins a new record."""
        handles: list[RemovableHandle] = []
        if not self.targets:
            return handles
        modules = dict(model.named_modules())
        handles.append(model.register_forward_pre_hook(_Begin(self, only_with_gradients), prepend=True))
        for module_name, target in self.targets:
            kind = _KeepInput if target.startswith("_input_") else _KeepOutput
            hook = kind(self, module_name, target, only_with_gradients)
            module = modules[module_name]
            if isinstance(hook, _KeepInput):
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        return handles

    def clear(self) -> None:
        """Forget what was kept."""
        self.values = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetRecorder:
        return _asleep(TargetRecorder(self.targets, self.role))

    def __reduce__(self) -> tuple[Any, ...]:
        return _asleep_target_recorder, (self.targets, self.role)


class _Begin:
    """Pre-hook of the whole model: a new forward pass begins."""

    def __init__(self, recorder: TargetRecorder, only_with_gradients: bool):
        self.recorder, self.only_with_gradients = recorder, only_with_gradients

    def listening(self) -> bool:
        return self.recorder.awake and (torch.is_grad_enabled() or not self.only_with_gradients)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.listening():
            self.recorder.clear()


class _Keep(_Begin):
    """Common to the two hooks that keep a tensor of one target."""

    def __init__(self, recorder: TargetRecorder, module_name: str, target: str, only_with_gradients: bool):
        super().__init__(recorder, only_with_gradients)
        self.module_name, self.target = module_name, target

    def keep(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ConfigError(
                f"target {self.target!r} of the {self.recorder.role}'s module {self.module_name!r} is no "
                f"floating tensor, it is a {type(value).__name__}"
            )
        self.recorder.values.setdefault((self.module_name, self.target), []).append(plain_copy(value))

    def missing(self, present: str) -> ConfigError:
        return ConfigError(
            f"the {self.recorder.role}'s module {self.module_name!r} has no target {self.target!r}; {present}"
        )


class _KeepOutput(_Keep):
    """Forward hook of one module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # type: ignore[override]
        if not self.listening():
            return
        key = self.target.removeprefix("_output_")
        if isinstance(output, Tensor):
            entries: dict[str, Any] = {"0": output}
        elif isinstance(output, Mapping):
            entries = {str(index): value for index, value in enumerate(output.values())}
            entries.update({str(name): value for name, value in output.items()})
        elif isinstance(output, list | tuple):
            entries = {str(index): value for index, value in enumerate(output)}
        else:
            entries = {"0": output}
        if key not in entries:
            raise self.missing(f"its outputs are {', '.join('_output_' + name for name in entries)}")
        self.keep(entries[key])


class _KeepInput(_Keep):
    """Forward pre-hook of one module."""

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.listening():
            return
        key = self.target.removeprefix("_input_")
        entries: dict[str, Any] = {str(index): value for index, value in enumerate(args)}
        entries.update(kwargs)
        names = list(inspect.signature(module.forward).parameters)
        entries.update(dict(zip(names, args, strict=False)))
        if key.isdigit() and key not in entries and int(key) < len(names) and names[int(key)] in kwargs:
            entries[key] = kwargs[names[int(key)]]
        if key not in entries:
            raise self.missing(f"its inputs are {', '.join('_input_' + name for name in entries)}")
        self.keep(entries[key])


def plain_copy(value: Tensor) -> Tensor:
    """Return a copy that an in-place change behind a module does not reach, with its graph.

    What was made under inference mode comes back as a normal tensor: autograd may keep it for the backward pass.
    """
    if not value.is_inference():
        return value.clone()
    with torch.inference_mode(False):
        return value.clone()


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def _asleep(recorder: Any) -> Any:
    recorder.awake = False
    return recorder


def _asleep_call_recorder() -> CallRecorder:
    return _asleep(CallRecorder())


def _asleep_target_recorder(targets: list[tuple[str, str]], role: str) -> TargetRecorder:
    return _asleep(TargetRecorder(targets, role))
