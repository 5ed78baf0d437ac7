"""Repeats the steps of a model's history on a freshly made model, so that its shape fits the saved
numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dwindle.config.errors import FileFormatError, did_you_mean

Replay = Callable[[nn.Module, Mapping[str, Any]], nn.Module]

_REPLAYS: dict[str, Replay] = {}


def register_replay(kind: str, replay: Replay) -> None:
    """Register how a history entry of this kind is repeated.

    Args:
        kind: The entry's ``"kind"``, such as ``"shrink"``.
        replay: Called with the model so far and the entry; returns the model (changed in place or new).
            Values of parameters and buffers do not matter, they are loaded afterwards; their names, shapes
            and dtypes do.
    """
    _REPLAYS[kind] = replay


def replay(model: nn.Module, history: list[dict[str, Any]]) -> nn.Module:
    """Repeat all steps of a history, in order.

    Args:
        model: A freshly made model; it may be changed.
        history: Entries with a ``"kind"``.

    Raises:
        FileFormatError: A step is unknown, or does not fit this model.
    """
    for number, entry in enumerate(history, start=1):
        kind = str(entry.get("kind"))
        if kind not in _REPLAYS:
            raise FileFormatError(
                f"step {number} of this model's history is {kind!r}, which nothing here can repeat"
                f"{did_you_mean(kind, _REPLAYS)}; known are {', '.join(_REPLAYS)}. "
                "dwindle.export.register_replay teaches another kind"
            )
        try:
            model = _REPLAYS[kind](model, entry)
        except FileFormatError:
            raise
        except Exception as error:  # the step's own code says why it does not fit, in whatever class
            raise FileFormatError(
                f"the model given ({type(model).__name__}) is not the one that was compressed: step {number} "
                f"({kind!r}) of the history does not fit it: {error}"
            ) from error
    return model


def _shrink(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    changed = importlib.import_module("dwindle.realize").apply_plan(model, entry["plan"])
    return model if changed is None else changed


def _quantize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.quantization").replay(model, entry)


def _sparsify(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.realize").replay_sparse(model, entry)


def _pack_binary(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.realize").replay_binary(model, entry)


def _quantize_weights(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.quantization.weight_only").replay(model, entry)


def _pack_integers(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.realize").replay_integers(model, entry)


def _pack_weights(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.realize").replay_packed(model, entry)


def _factorize(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return importlib.import_module("dwindle.realize").replay_factorized(model, entry)


def _unchanged(model: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    return model


register_replay("shrink", _shrink)
register_replay("quantize", _quantize)
register_replay("sparsify", _sparsify)
register_replay("quantize_weights", _quantize_weights)
register_replay("pack_weights", _pack_weights)
register_replay("pack_integers", _pack_integers)
register_replay("pack_binary", _pack_binary)
register_replay("factorize", _factorize)
for _kind in ("train", "finetune", "distill", "note"):  # these change numbers only
    register_replay(_kind, _unchanged)
