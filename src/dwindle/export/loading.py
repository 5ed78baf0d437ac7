"""``dw.load``: gives back a model that ``dw.save`` wrote."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dwindle.config.errors import FileFormatError
from dwindle.config.history import history as history_of
from dwindle.config.history import record
from dwindle.export.manifest import MANIFEST, PROGRAM, STATE, read_manifest
from dwindle.export.program_file import read_program
from dwindle.export.replay import replay
from dwindle.export.source import build, checked, describe_source
from dwindle.export.state_file import read_state


def load(
    directory: str | Path,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    *,
    trust_source: bool = False,
) -> nn.Module:
    """Load a model that :func:`dwindle.save` wrote.

    All files are checked against their checksums first. The uncompressed model is then made (by ``model``,
    or by what the manifest names), every structural step of its history is repeated on it, and the numbers
    are loaded strictly. Nothing is unpickled.

    Args:
        directory: The directory.
        model: A callable that makes the uncompressed model, an instance of it (which is copied, not
            changed), or ``"package.module:callable"``. None: what the manifest names. Not needed for a
            model saved as a program.
        trust_source: With ``model=None``, follow the manifest's name even when it does not plainly name a
            maker of modules. Only for files you trust: it is any function of this machine, called with
            arguments of the file.

    Returns:
        The model on the CPU, its modules in the training or evaluation mode they were saved in.

    Raises:
        FileFormatError: Something is missing, truncated, altered, foreign or newer, or the model given is
            another one; the message names the file, or the module and parameter.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if PROGRAM in manifest["files"]:
        return _load_program(directory / PROGRAM, manifest)
    if STATE not in manifest["files"]:
        raise FileFormatError(f"{directory / MANIFEST} names neither {STATE} nor {PROGRAM}")
    fresh = replay(_make(model, manifest, trust_source), manifest["history"])
    state: dict[str, Any] = dict(read_state(directory / STATE, manifest["aliases"], manifest.get("packed")))
    _check_fit(fresh, state, manifest)
    _match_dtypes(fresh, state)
    fresh.load_state_dict({**state, **manifest["extra_state"]}, strict=True)
    _restore_flags(fresh, manifest)
    _restore_history(fresh, manifest["history"])
    return fresh


def _make(
    model: nn.Module | Callable[[], nn.Module] | str | None, manifest: Mapping[str, Any], trust_source: bool
) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if isinstance(model, str):
        source = manifest["source"] or {"kwargs": {}}
        named = describe_source(model, source["kwargs"] if source.get("callable") == model else None)
        assert named is not None  # only for the type checker: a name always gives a description
        return build(named, trusted=True)
    if model is not None:
        return checked(model(), getattr(model, "__name__", "the callable given"))
    if manifest["source"] is None:
        raise FileFormatError(
            f"this model ({manifest['model_class']}) was saved without the name of its maker; pass "
            "dw.load(directory, model=...) with a callable that makes the uncompressed model"
        )
    return build(manifest["source"], trusted=trust_source)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Compare names and shapes before any number is changed, so that the message can name them."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    problems = []
    saved = {name: state[name] for name in manifest["tensors"] if name in state}
    for name, tensor in saved.items():
        if name in own and own[name].shape != tensor.shape:
            module, _, parameter = name.rpartition(".")
            problems.append(
                f"module {module or '(the model itself)'!r}, parameter {parameter!r}: shape "
                f"{tuple(own[name].shape)} in the model given, {tuple(tensor.shape)} in the file"
            )
    lacking = [name for name in saved if name not in own]
    surplus = [name for name in own if name not in state]
    if lacking:
        problems.append(f"the model given lacks {_some(lacking)}")
    if surplus:
        problems.append(f"the file lacks {_some(surplus)}")
    if problems:
        kept = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise FileFormatError(
            f"the model given ({type(model).__name__}) does not fit the saved one "
            f"({manifest['model_class']}): {kept}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _match_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the saved dtype (and real memory), keeping them the objects they are."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise FileFormatError(
                f"{name!r} of the model given is on the meta device; make the model on the CPU"
            )
        if name in state and tensor.dtype is not state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _restore_flags(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    frozen, other = set(manifest["frozen"]), set(manifest["other_mode"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name not in frozen and (parameter.is_floating_point() or parameter.is_complex())
        )
    for name, module in model.named_modules():
        module.training = manifest["training"] != (name in other)


def _restore_history(model: nn.Module, history: list[dict[str, Any]]) -> None:
    """Record what the repeated steps have not recorded themselves."""
    for entry in history[len(history_of(model)) :]:
        record(model, entry)


def _load_program(path: Path, manifest: Mapping[str, Any]) -> nn.Module:
    module = read_program(path).module()
    frozen = set(manifest["frozen"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    # A captured program knows one mode; torch refuses even the harmless eval().
    module.eval = types.MethodType(_stay, module)  # type: ignore[method-assign]
    module.train = types.MethodType(_refuse_training, module)  # type: ignore[method-assign]
    _restore_history(module, manifest["history"])
    return module


def _stay(module: nn.Module) -> nn.Module:
    return module


def _refuse_training(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise NotImplementedError(
            "a model saved as a program runs in evaluation mode only (its parameters may still be trained)"
        )
    return module
