"""Which machine this is, and where measurements of it are kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
from functools import cache
from pathlib import Path

__all__ = ["cache_folder", "fingerprint", "version_of"]

#: Environment variable that names the folder of caches.
VARIABLE = "DWINDLE_CACHE"


@cache
def fingerprint() -> str:
    """Return what tells processors apart whose kernels differ: model, instruction sets and architecture."""
    return hashlib.sha256(f"{_processor()} {platform.machine()} {sys.platform}".encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of caches: ``$DWINDLE_CACHE``, or ``dwindle`` in the platform's folder for them."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dwindle"


def version_of(library: str) -> str:
    """Return the version of an installed library, or ``"unknown"``."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    """Model and instruction sets, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer", "cache size")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith(wanted)]
    return "\n".join(lines) or platform.processor()
