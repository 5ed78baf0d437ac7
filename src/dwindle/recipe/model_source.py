"""Finds a model by its name: ``package.module:callable``, ``timm/NAME``, ``hf/PATH``, or a dwindle directory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dwindle.config.callables import call_checked, import_callable
from dwindle.config.errors import ConfigError, MissingDependencyError, did_you_mean

__all__ = ["call_checked", "import_callable", "is_saved_directory", "load_model"]


def load_model(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Make or load a model.

    Args:
        name: ``package.module:callable`` (called with ``arguments``; modules beside the working directory are
            found too), ``timm/NAME``, ``hf/PATH`` (a local directory or a name in the local cache), or a
            directory that dwindle wrote.
        arguments: Keyword arguments of the callable, of ``timm.create_model`` or of ``from_pretrained``. For
            ``hf/`` also ``class`` (default ``AutoModel``), and ``weights: false`` to build the model from its
            ``config.json`` with random weights.

    Raises:
        ConfigError: The name means nothing, or what it means is not a model.
        MissingDependencyError: A library is not installed.
    """
    options = dict(arguments or {})
    if is_saved_directory(name):
        from dwindle.export import load

        if options:
            raise ConfigError(f"the saved model {name!r} takes no arguments, got {', '.join(options)}")
        model = load(name)
    elif name.startswith("timm/"):
        model = _timm_model(name.removeprefix("timm/"), options)
    elif name.startswith("hf/"):
        model = _hugging_face_model(name.removeprefix("hf/"), options)
    elif ":" in name:
        model = call_checked(import_callable(name, "model"), options, name)
    else:
        hint = f"; there is a directory {name!r}, but dwindle did not write it" if Path(name).is_dir() else ""
        raise ConfigError(
            f"cannot tell which model {name!r} is{hint}. A model is named package.module:callable, timm/NAME, "
            "hf/PATH, or a directory that dwindle wrote"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def is_saved_directory(name: str) -> bool:
    """Tell whether ``name`` is a directory that dwindle wrote."""
    return (Path(name) / "manifest.json").is_file()


def _timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"the model 'timm/{name}' needs timm and a torchvision that fits this torch, which could not be "
            f"imported ({error}). Install them with: pip install timm torchvision"
        ) from error
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ConfigError(f"timm has no model {name!r}{did_you_mean(name, known)}")
    return timm.create_model(name, **options)


def _hugging_face_model(path: str, options: dict[str, Any]) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
        class_name = options.pop("class", "AutoModel")
        if not hasattr(transformers, class_name):
            raise ConfigError(
                f"transformers has no class {class_name!r}"
                + did_you_mean(class_name, [entry for entry in dir(transformers) if entry.startswith("Auto")])
            )
        if not options.pop("weights", True):
            config = transformers.AutoConfig.from_pretrained(path)
            return getattr(transformers, class_name).from_config(config, **options)
        return getattr(transformers, class_name).from_pretrained(path, **options)
    except (ImportError, ModuleNotFoundError) as error:
        raise MissingDependencyError(
            f"the model 'hf/{path}' needs transformers, which could not be imported ({error}). "
            'Install it with: pip install "dwindle[hf]"'
        ) from error
    except OSError as error:
        raise ConfigError(f"transformers found no model at {path!r}: {str(error).splitlines()[0]}") from error


def _register() -> None:
    """Let saved models name their maker as ``hf/PATH`` too."""
    from dwindle.export import register_source

    register_source("hf", lambda path, arguments: _hugging_face_model(path, dict(arguments)))


_register()
