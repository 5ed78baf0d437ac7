"""One file, put in its place whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replaced_when_whole"]


@contextlib.contextmanager
def replaced_when_whole(target: Path) -> Iterator[Path]:
    """Give the path of a new file; when the block ends well it takes the place of ``target``, else it vanishes.

    Args:
        target: The final path; its folder must exist. An old file stays until the new one is whole.
    """
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
