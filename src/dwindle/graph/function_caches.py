"""Keeps what a recording or a proof computes out of the caches of the user's functions.

A function under ``functools.lru_cache`` that makes a tensor (an index table, say) would otherwise keep the one it made
on the meta device, or under inference mode, and hand it to the user's model ever after.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_known: tuple[int, list[Any]] = (0, [])


def _cached_functions() -> list[Any]:
    """Every cached function of the process; looked for anew when modules were imported since."""
    global _known
    if _known[0] != len(sys.modules):
        kind = functools._lru_cache_wrapper
        _known = (len(sys.modules), [held for held in gc.get_objects() if type(held) is kind])
    return _known[1]


@contextmanager
def function_caches_kept() -> Iterator[None]:
    """Empty on exit the caches that computed something inside, so that it is computed again where it is wanted."""
    before = [(function, function.cache_info().misses) for function in _cached_functions()]
    try:
        yield
    finally:
        for function, misses in before:
            if function.cache_info().misses != misses and not str(
                getattr(function, "__module__", "")
            ).startswith("torch"):
                function.cache_clear()
