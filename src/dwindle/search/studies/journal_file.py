"""Optuna's journal file, made to survive writers that are killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

__all__ = ["JournalFile"]


class JournalFile(JournalFileBackend):
    """A journal whose lock dies with its holder, and whose torn last line is cut off by the next writer.

    Optuna's own lock is a file that a killed process leaves behind (others wait half a minute for it), and a line that
    was cut short by a kill makes its journal unreadable. The format is the same.

    Args:
        path: The file; made when it is not there.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, lock_obj=_lock(path))
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines in one piece and wait until they are on the disk."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()
        try:
            with Path(self.path).open("r+b") as stream:
                _cut_torn_end(stream)
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            self._lock.release()


def _cut_torn_end(stream: IO[bytes]) -> None:
    """Cut off what stands behind the last line end, and stay there."""
    end = stream.seek(0, os.SEEK_END)
    whole = end
    while whole:
        begin = max(0, whole - 65536)
        stream.seek(begin)
        found = stream.read(whole - begin).rfind(b"\n")
        if found >= 0:
            whole = begin + found + 1
            break
        whole = begin
    if whole < end:
        stream.truncate(whole)
    stream.seek(whole)


class _SystemLock:
    """A lock on the file itself; the system lets go of it when the process dies, however it dies."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        import fcntl

        stream = Path(self._path).open("rb")  # noqa: SIM115
        fcntl.flock(stream, fcntl.LOCK_EX)
        self._stream = stream
        return True

    def release(self) -> None:
        """Let others in."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _lock(path: str) -> Any:
    try:
        import fcntl  # noqa: F401
    except ImportError:  # no such locks on Windows
        return JournalFileOpenLock(path)
    return _SystemLock(path)
