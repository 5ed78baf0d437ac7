"""Rows of tensors on disk, found by the name of their content: safetensors files, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dwindle.config.errors import ConfigError
from dwindle.training.atomic_file import replaced_when_whole

__all__ = ["AnswerStore"]

FORMAT = "dwindle-teacher-1"

_RECOUNT = 64
"""Writes from one look at all files to the next."""

Row = dict[str, Tensor]


class AnswerStore:
    """A directory of answers to one question (a teacher with its weights, and what is recorded of it).

    Answers to other questions may lie in the same directory. When it is full, their oldest files go first; when only
    answers to this question are left, nothing more is stored: data are gone through from front to back again and
    again, and throwing out what was used longest ago would throw out what comes next.

    Args:
        directory: Made when something is stored.
        question: Names the question; letters and digits.
        max_bytes: The directory never holds more.
    """

    def __init__(self, directory: str | os.PathLike[str], question: str, max_bytes: int):
        if max_bytes < 0:
            raise ConfigError(f"max_bytes must not be negative, got {max_bytes}")
        self.root, self.folder, self.max_bytes = Path(directory), Path(directory) / question, max_bytes
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"cache {str(self.root)!r} is a file, not a directory")
        self._places: dict[str, tuple[Path, int]] = {}
        self.full = False
        self._bytes, self._writes = 0, 0
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, keys: Sequence[str]) -> dict[str, Row]:
        """Return the rows of these keys that can be read; each file is opened once."""
        wanted: dict[Path, list[str]] = {}
        for key in dict.fromkeys(keys):
            if key in self._places:
                wanted.setdefault(self._places[key][0], []).append(key)
        found: dict[str, Row] = {}
        for path, own in wanted.items():
            try:
                with safe_open(path, framework="pt") as opened:
                    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                    for key in own:
                        row = self._places[key][1]
                        found[key] = {name: part[row : row + 1][0] for name, part in slices.items()}
            except (SafetensorError, OSError):
                self._drop(path)
        return {key: row for key, row in found.items() if key in self._places}

    def write(self, keys: Sequence[str], answer: Row) -> bool:
        """Store one answer to several keys; return whether there was room.

        Args:
            keys: One for each row.
            answer: Tensors with one row a key in dimension 0.
        """
        if self.full or not keys:
            return False
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in answer.items()}
        size = (
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + 1024 + 64 * len(keys)
        )
        if not self._make_room(size):
            self.full = True
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with replaced_when_whole(path) as part:
            save_file(tensors, part, metadata={"format": FORMAT, "keys": json.dumps(list(keys))})
        self._places.update({key: (path, row) for row, key in enumerate(keys)})
        return True

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(metadata.get("format"))
            for row, key in enumerate(json.loads(metadata["keys"])):
                self._places[str(key)] = (path, row)
        except (SafetensorError, OSError, ValueError, KeyError):
            self._drop(path)

    def _drop(self, path: Path) -> None:
        """Forget a file that is damaged."""
        self._places = {key: place for key, place in self._places.items() if place[0] != path}
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """See that there is room; the files are counted now and then (others may write too), and when it gets tight."""
        if self._writes % _RECOUNT == 0 or self._bytes + size > self.max_bytes:
            files = []
            for path in self.root.rglob("*.safetensors"):
                with contextlib.suppress(OSError):
                    state = path.stat()
                    files.append((state.st_mtime, state.st_size, path))
            self._bytes = sum(own for _, own, _ in files)
            for _, own, path in sorted(files):
                if self._bytes + size <= self.max_bytes:
                    break
                if path.parent != self.folder:
                    path.unlink(missing_ok=True)
                    self._bytes -= own
        self._writes += 1
        self._bytes += size
        return self._bytes <= self.max_bytes


def stacked(rows: Sequence[Row], device: torch.device) -> Row:
    """Return rows as tensors with these rows in dimension 0."""
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
