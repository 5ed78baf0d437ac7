"""``nni.trace``: here nothing needs to be traced."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def trace(cls_or_func: T = None, *, kw_only: bool = True, inherit_signature: bool = True) -> Any:  # type: ignore[assignment]
    """Return what it is given, so that ``nni.trace(torch.optim.Adam)(model.parameters())`` is the optimizer itself.

    NNI rebuilds optimizers after it has wrapped a model; here parameters keep their identity while they are masked.

    Args:
        cls_or_func: A class or a function; None for use as a decorator with arguments.
        kw_only: Taken and not needed.
        inherit_signature: Taken and not needed.
    """
    return (lambda given: given) if cls_or_func is None else cls_or_func
