"""Where a model comes from: the callable that makes it, named so that a saved model can be built again.

A saved model holds no code, only the name ``package.module:callable``. Loading calls it, so a name is only
followed when what it names is a class of modules, or a function that says in its signature that it returns
one; anything else could be any function of the machine, and needs the user's word.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dwindle.config.errors import ConfigError, FileFormatError, require

Resolver = Callable[[str, Mapping[str, Any]], nn.Module]
_RESOLVERS: dict[str, Resolver] = {}


def register_source(prefix: str, resolver: Resolver) -> None:
    """Register how models named ``prefix/NAME`` are built.

    Args:
        prefix: What stands before the slash, such as ``"timm"``.
        resolver: Called with the name after the slash and the keyword arguments; returns the model.
    """
    _RESOLVERS[prefix] = resolver


def _timm(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    return require("timm", "hf").create_model(name, **{"pretrained": False, **kwargs})


register_source("timm", _timm)


def describe_source(
    source: str | Callable[..., Any] | None, kwargs: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Bring the name of a model's maker into the form that the manifest stores.

    Args:
        source: ``"package.module:callable"``, ``"timm/NAME"``, or an importable callable itself.
        kwargs: Its keyword arguments; JSON values.

    Raises:
        ConfigError: The callable has no importable name, or the arguments are no JSON values.
    """
    if source is None:
        if kwargs:
            raise ConfigError("source_kwargs are given without a source")
        return None
    if not isinstance(source, str):
        qualified = getattr(source, "__qualname__", "")
        if not qualified or "<" in qualified:
            raise ConfigError(
                f"{source!r} cannot be named: give a function or class of a module, no lambda or inner one"
            )
        source = f"{source.__module__}:{qualified}"
    if ":" not in source and source.partition("/")[0] not in _RESOLVERS:
        raise ConfigError(f"the source {source!r} has not the form package.module:callable or timm/NAME")
    try:
        values = json.loads(json.dumps(dict(kwargs or {})))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"source_kwargs must be JSON values: {error}") from error
    return {"callable": source, "kwargs": values}


def build(source: Mapping[str, Any], *, trusted: bool) -> nn.Module:
    """Make the model that a manifest names.

    Args:
        source: ``{"callable": ..., "kwargs": ...}``.
        trusted: Follow any name, whatever it is.

    Raises:
        FileFormatError: The name leads nowhere, or is not trusted, or gives no module.
    """
    name, kwargs = str(source["callable"]), dict(source["kwargs"])
    prefix, slash, rest = name.partition("/")
    if slash and prefix in _RESOLVERS:
        return _RESOLVERS[prefix](rest, kwargs)
    maker = _find(name)
    if not trusted and not _makes_modules(maker):
        raise FileFormatError(
            f"this model says it is made by {name!r}, neither a module class nor a function annotated as "
            "returning one, so it is not called unasked. If you know it, pass model=... or trust_source=True"
        )
    return checked(maker(**kwargs), name)


def _find(name: str) -> Any:
    module_name, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise FileFormatError(
            f"the maker of this model, {name!r}, cannot be found ({error}); pass model=... instead"
        ) from error
    return found


def _makes_modules(maker: Any) -> bool:
    if isinstance(maker, type):
        return issubclass(maker, nn.Module)
    if not inspect.isfunction(maker):
        return False
    try:
        returned = typing.get_type_hints(maker).get("return")
    except Exception:  # annotations are code, which may fail in any way
        return False
    return isinstance(returned, type) and issubclass(returned, nn.Module)


def checked(model: Any, name: str) -> nn.Module:
    """Return ``model``, or raise when it is no module."""
    if not isinstance(model, nn.Module):
        raise FileFormatError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
