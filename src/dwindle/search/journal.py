"""An append-only file of JSON lines that survives being killed at any moment, and the checksum of what it is about.

Every line is written in one piece and flushed to the disk before the work goes on. A process that is killed in the
middle of a line leaves a torn end, which is cut off when the file is opened again; everything before it stands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dwindle.config.errors import ConfigError, FileFormatError

__all__ = ["Journal", "checksum"]


class Journal:
    """The lines of one file.

    Args:
        path: The file, in a folder that is made when it is not there. None keeps nothing.
        format: What stands in the first line.
        identity: What must agree for earlier lines to be valid.
        what: What a line is, for messages: ``"trial"``.

    Attributes:
        earlier: The entries that were there.

    Raises:
        ConfigError: The file is about something else; the message says what differs.
        FileFormatError: The file is damaged before its end.
    """

    def __init__(self, path: Path | None, format: str, identity: Mapping[str, Any], what: str) -> None:
        self.path = path
        self.earlier: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = list(_read(path, what))
        if not entries:
            self.append({"format": format, "identity": dict(identity)})
            return
        _check(path, entries[0], format, json.loads(json.dumps(dict(identity))), what)
        self.earlier = entries[1:]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write a line, and wait until it is on the disk."""
        if self.path is None:
            return
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named tensors, whatever their order; what is no tensor, or has no values, is left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of a file, after cutting off a torn last line."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FileFormatError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(entry, dict):
            raise FileFormatError(f"{path}, line {number} is no entry of a {what} file")
        yield entry


def _check(path: Path, head: Mapping[str, Any], format: str, identity: Mapping[str, Any], what: str) -> None:
    if head.get("format") != format:
        raise FileFormatError(f"{path} is no {what} file of dwindle (format {head.get('format')!r})")
    kept = head["identity"]
    different = sorted(key for key in {*kept, *identity} if kept.get(key) != identity.get(key))
    if different:
        raise ConfigError(
            f"{path} holds the {what}s of another search: {', '.join(different)} differ; "
            "give another folder, or remove this one"
        )
