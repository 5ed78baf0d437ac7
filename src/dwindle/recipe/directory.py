"""The directory of a run: which stages are finished, what they left, and who works in it.

A stage works in a hidden directory beside its own and is put in its place whole, by one rename, when its
record is written. So at any moment a stage is finished or not; there is nothing in between to be repaired
after a kill. A record carries a key made of the recipe's part and of everything before it; a stage whose key
is another than the recipe asks for is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.export.atomic import replace_directory

__all__ = ["DirectoryBusy", "RunDirectory", "StageDirectory", "fingerprint", "read_json", "write_json"]

FORMAT = "dwindle-run-1"
_MARKER = "run.json"
_RECORD = "record.json"


class DirectoryBusy(DwindleError):
    """Another process works in the directory of a run."""


class StageDirectory:
    """Where one stage of one seed works and leaves its output.

    Args:
        path: The final place.
        key: What the stage's result depends on, as a hash.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.draft = path.parent / f".{path.name}.partial"

    def record(self) -> dict[str, Any] | None:
        """Return the record of the finished stage, or None when it is not finished for this key."""
        try:
            record = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("key") == self.key else None

    def begin(self) -> Path:
        """Return the directory to work in; what a killed run of the same key left in it is kept."""
        mark = self.draft / "key"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != self.key:
            shutil.rmtree(self.draft, ignore_errors=True)
            self.draft.mkdir(parents=True)
            _write_text(mark, self.key)
        return self.draft

    def finish(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record and put the directory in its place; return the record."""
        complete = {"key": self.key, **record}
        write_json(self.draft / _RECORD, complete)
        (self.draft / "key").unlink(missing_ok=True)
        replace_directory(self.draft, self.path)
        return complete


class RunDirectory:
    """A directory that belongs to one recipe.

    Args:
        path: Where it is, or is to be.
    """

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def opened(self, recipe_name: str, *, fresh: bool = False) -> Iterator[RunDirectory]:
        """Hold the directory for one process.

        Args:
            recipe_name: The recipe it must belong to.
            fresh: Remove what an earlier run left.

        Raises:
            ConfigError: It belongs to another recipe, or is not a run directory at all.
            DwindleError: Another process works in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{str(self.path)!r} is a file; a run needs a directory")
        # The check comes before the lock too, so that a foreign directory is never written to.
        self._check(recipe_name, fresh=fresh)
        self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path / ".lock"):
            self._check(recipe_name, fresh=fresh)
            if fresh:
                self._clear()
            write_json(self.path / _MARKER, {"format": FORMAT, "recipe": recipe_name})
            yield self

    def stage(self, seed: int, position: int, label: str, key: str) -> StageDirectory:
        """Return the place of one stage of one seed."""
        safe = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in label)
        return StageDirectory(self.path / f"seed-{seed}" / f"{position:02d}-{safe}", key)

    def remove_other_than(self, wanted: set[Path]) -> None:
        """Remove the seeds and stages that the recipe no longer has."""
        for seed in self.path.glob("seed-*"):
            for entry in seed.iterdir():
                if entry not in wanted:
                    shutil.rmtree(entry, ignore_errors=True)
            if not any(seed.iterdir()):
                seed.rmdir()

    def _check(self, recipe_name: str, *, fresh: bool) -> None:
        if not self.path.is_dir() or all(entry.name == ".lock" for entry in self.path.iterdir()):
            return
        try:
            marker = json.loads((self.path / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            marker = {}
        if not isinstance(marker, dict) or marker.get("format") != FORMAT:
            raise ConfigError(
                f"{str(self.path)!r} is not empty and not the directory of a run; give another one with --output"
            )
        if marker.get("recipe") != recipe_name and not fresh:
            raise ConfigError(
                f"{str(self.path)!r} holds the run of the recipe {marker.get('recipe')!r}, not of {recipe_name!r}; "
                "give another directory with --output, or begin anew in this one with --fresh"
            )

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def fingerprint(*parts: Any) -> str:
    """Return a hash (64 hexadecimal digits) of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, atomically."""
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system lets go of it when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; two runs in one directory are then not noticed
        yield
        return
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DirectoryBusy(
                f"another process is working in {str(path.parent)!r}; wait for it, or give another directory "
                "with --output"
            ) from None
        yield
