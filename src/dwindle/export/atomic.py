"""Puts files and directories in their place whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def sibling_directory(target: Path) -> Iterator[Path]:
    """Give a fresh directory beside ``target`` (so that a rename stays on one file system); gone afterwards.

    Args:
        target: The path that will be written. Its parent is created when it is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(files: Sequence[Path], target: Path, stale: Iterable[Path] = ()) -> list[Path]:
    """Move finished files to the place of ``target``, so that no moment shows a model with foreign
    companions.

    A single file is replaced in one step. With companions named after their content, these come first and
    the model last. With companions whose name the format prescribes (OpenVINO's ``.bin``) the old model
    file is taken away before they are replaced: a process killed in the middle leaves no model rather than
    a wrong one.

    Args:
        files: Finished files in one directory on the same file system, the model first, under their final
            names.
        target: Final path of the model file.
        stale: Companions of the old model; removed at the end unless they are among the new ones.

    Returns:
        The final paths, the model first.
    """
    finals = [target, *(target.parent / file.name for file in files[1:])]
    for file in files:
        flush(file)
    if any(final.exists() and final not in stale for final in finals[1:]):
        target.unlink(missing_ok=True)
    for file, final in reversed(list(zip(files, finals, strict=True))):
        os.replace(file, final)
    for old in set(stale) - set(finals):
        old.unlink(missing_ok=True)
    flush(target.parent)
    return finals


def replace_directory(new: Path, target: Path) -> None:
    """Move the directory ``new`` to ``target``, replacing a directory that is there.

    On Linux the two are exchanged in one step of the file system, so ``target`` is at every moment the old
    or the new directory as a whole. Where the system has no such step, the old one is first moved aside: a
    process killed between the two moves leaves no ``target``, and the old directory under a name ending in
    ``.old``.

    Args:
        new: A finished directory on the same file system.
        target: Where it goes.
    """
    for entry in new.iterdir():
        flush(entry)
    flush(new)
    if not target.exists():
        os.rename(new, target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
        os.rename(target, aside)
        os.rename(new, target)
        shutil.rmtree(aside, ignore_errors=True)
    flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically; False when the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def flush(path: Path) -> None:
    """Ask the system to put a file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse this for directories; the rename is still atomic
        pass
    finally:
        os.close(descriptor)
