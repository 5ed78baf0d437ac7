"""Who works on which trial: a word on each trial that can only be replaced by one who knows what it was.

A *lease* is one line, ``claims beat owner``: how often the trial was taken, a random word that every sign of life
renews, and its holder (``-``: nobody). Taking a trial, renewing and leaving it are all the same operation, compare and
swap, which each storage does in its own way, atomically over all processes and machines. So of two who want a trial one
gets it, and a worker that was taken for dead learns it at its next sign of life.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial

__all__ = ["FREE", "KEY", "DatabaseLeases", "JournalLeases", "Lease", "Leases", "MemoryLeases"]

KEY = "dwindle:lease"
FREE = "0 0 -"


@dataclass(frozen=True)
class Lease:
    """What a lease says.

    Attributes:
        claims: How often the trial was taken.
        beat: Renewed with every sign of life.
        owner: The worker; None when nobody holds the trial.
    """

    claims: int
    beat: str
    owner: str | None

    @classmethod
    def read(cls, text: str) -> Lease:
        """Read the line."""
        claims, beat, owner = text.split(" ")
        return cls(int(claims), beat, None if owner == "-" else owner)

    def text(self) -> str:
        """Return the line."""
        return f"{self.claims} {self.beat} {self.owner or '-'}"

    def taken(self, owner: str) -> Lease:
        """Return the lease after ``owner`` took the trial."""
        return Lease(self.claims + 1, _beat(), owner)

    def renewed(self) -> Lease:
        """Return the lease after a sign of life."""
        return Lease(self.claims, _beat(), self.owner)

    def given_back(self) -> Lease:
        """Return the lease after its holder left the trial on purpose, which does not count as a claim."""
        return Lease(self.claims - 1, _beat(), None)


def _beat() -> str:
    return uuid.uuid4().hex[:8]


class Leases(Protocol):
    """The leases of a storage."""

    def of(self, trial: FrozenTrial) -> str:
        """Return the lease of a trial that was just read from the storage."""

    def swap(self, trial_id: int, old: str, new: str) -> bool:
        """Replace a lease if it still is ``old``, atomically; tell whether that was so.

        Raises:
            UpdateFinishedTrialError: The trial is finished (not every storage looks).
        """


class DatabaseLeases:
    """Leases in a database: one conditional update of the row of the attribute.

    Args:
        storage: The storage, not wrapped.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self._engine = storage.engine
        names = ("trial_id", "key", "value_json")
        columns = [sqlalchemy.column(name, sqlalchemy.Text()) for name in names[1:]]
        self._table = sqlalchemy.table("trial_system_attributes", sqlalchemy.column(names[0]), *columns)

    def of(self, trial: FrozenTrial) -> str:
        """Return the lease of a trial that was just read from the storage."""
        return str(trial.system_attrs.get(KEY, FREE))

    def swap(self, trial_id: int, old: str, new: str) -> bool:
        """Replace a lease if it still is ``old``."""
        row = self._table.c
        change = (
            sqlalchemy.update(self._table)
            .where(row.trial_id == trial_id, row.key == KEY, row.value_json == f'"{old}"')
            .values(value_json=f'"{new}"')
        )
        with self._engine.begin() as connection:
            return connection.execute(change).rowcount == 1


class JournalLeases:
    """Leases in a journal: everybody reads the same lines in the same order, and counts a swap only where it fits.

    Args:
        storage: Writes.
        backend: Reads; an object of its own, for it remembers how far it has read.
    """

    def __init__(self, storage: BaseStorage, backend: BaseJournalBackend) -> None:
        self._storage, self._backend = storage, backend
        self._lines = 0
        self._leases: dict[int, str] = {}
        self._lock = threading.Lock()

    def of(self, trial: FrozenTrial) -> str:
        """Return the lease of a trial that was just read from the storage."""
        with self._lock:
            self._read()
            return self._leases.get(trial._trial_id, FREE)

    def swap(self, trial_id: int, old: str, new: str) -> bool:
        """Replace a lease if it still is ``old``."""
        self._storage.set_trial_system_attr(trial_id, KEY, [old, new])
        with self._lock:
            self._read()
            return self._leases.get(trial_id) == new

    def _read(self) -> None:
        for line in self._backend.read_logs(self._lines):
            self._lines += 1
            change: Any = line.get("system_attr", {}).get(KEY) if "trial_id" in line else None
            if change is not None and self._leases.get(line["trial_id"], FREE) == change[0]:
                self._leases[line["trial_id"]] = change[1]


class MemoryLeases:
    """Leases of a storage that only one process knows."""

    def __init__(self) -> None:
        self._leases: dict[int, str] = {}
        self._lock = threading.Lock()

    def of(self, trial: FrozenTrial) -> str:
        """Return the lease of a trial."""
        with self._lock:
            return self._leases.get(trial._trial_id, FREE)

    def swap(self, trial_id: int, old: str, new: str) -> bool:
        """Replace a lease if it still is ``old``."""
        with self._lock:
            if self._leases.get(trial_id, FREE) != old:
                return False
            self._leases[trial_id] = new
            return True
