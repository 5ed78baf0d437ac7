"""Who holds a trial: a name that no other worker has, and on the same machine the way to tell that it is dead."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["is_alive", "new_owner"]


def new_owner() -> str:
    """Return a name for a worker of this process, without spaces."""
    place = _place(os.getpid())
    return uuid.uuid4().hex[:12] + ("" if place is None else f"@{place}")


def is_alive(owner: str) -> bool | None:
    """Tell whether the process of a worker is alive; None when that cannot be known from here.

    Args:
        owner: What :func:`new_owner` returned in some process.
    """
    place = owner.partition("@")[2]
    here = _place(os.getpid())
    if not place or here is None:
        return None
    machine, pid, start = place.split("/")
    if machine != here.split("/")[0]:
        return None
    return _place(int(pid)) == f"{machine}/{pid}/{start}"


def _place(pid: int) -> str | None:
    """``machine/process/start``, which no two processes share; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
        names = os.stat("/proc/self/ns/pid").st_ino
        # The name of the command stands in parentheses and may hold anything; all else is separated by spaces.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (OSError, ValueError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else f"{boot}.{names}/{pid}/{start}"
