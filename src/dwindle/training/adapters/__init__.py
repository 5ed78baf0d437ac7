"""Adapters: one line that lets a training framework drive a :class:`~dwindle.training.CompressionRun`.

A run needs three things of a loop (design, D6): to be told when the optimizer has made a step, its loss added, and its
own parameters optimized. In a loop of one's own these are two lines; an adapter does the three where a framework owns
the loop, and puts the run's state into the framework's checkpoints::

    with dw.compress(model, [pruner, distiller]) as run:
        follow_trainer(trainer, run)                        # Hugging Face
        trainer.train()

    with dw.compress(module.model, [pruner]) as run:
        Trainer(callbacks=[CompressionCallback(run)]).fit(module)        # Lightning

    with dw.compress(model, [pruner]) as run:
        run = follow_accelerator(accelerator, run, optimizer, schedule)  # Accelerate, before accelerator.prepare
        ...

Names are imported when they are first used, and with them the framework.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "AcceleratedRun": "accelerate",
    "follow_accelerator": "accelerate",
    "follow_trainer": "hugging_face",
    "CompressionCallback": "lightning",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'dwindle.training.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.training.adapters.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
