"""Where studies are kept: an SQLite file, a journal file, a database server, or only the memory."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalStorage

from dwindle.config.errors import ConfigError, DwindleError
from dwindle.search.studies.journal_file import JournalFile
from dwindle.search.studies.leases import DatabaseLeases, JournalLeases, Leases, MemoryLeases

__all__ = ["OpenStorage", "open_storage", "quiet"]

_JOURNAL = "journal:"
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class OpenStorage:
    """An opened storage.

    Attributes:
        place: What another process opens it by; None for the memory of this one.
        optuna: Optuna's object.
        leases: Who works on which trial.
    """

    place: str | None
    optuna: BaseStorage
    leases: Leases


def open_storage(place: str | os.PathLike[str] | None, *, existing: bool = False) -> OpenStorage:
    """Open a storage, and make it where it is not there.

    Args:
        place: The path of an SQLite file; ``journal:PATH`` for a journal file (which several machines may share over a
            network file system); the URL of a database that SQLAlchemy knows (``postgresql://...``); None for the
            memory.
        existing: Do not make a file.

    Raises:
        ConfigError: The place means nothing, or there is no such file.
        DwindleError: The database cannot be reached, or is no storage of Optuna.
    """
    if place is None:
        return OpenStorage(None, optuna.storages.InMemoryStorage(), MemoryLeases())
    text = os.fspath(place)
    file = _file_of(text)
    if file is not None:
        if existing and not file.exists():
            raise ConfigError(f"there is no storage {text!r}: {str(file)!r} does not exist")
        if file.is_dir():
            raise ConfigError(f"the storage {text!r} is a directory; give a file")
        file.parent.mkdir(parents=True, exist_ok=True)
    if text.startswith(_JOURNAL):
        path = os.path.abspath(text.removeprefix(_JOURNAL))
        try:
            with quiet():
                journal = JournalStorage(JournalFile(path))
        except (ValueError, KeyError) as error:
            raise DwindleError(f"{text!r} is no journal of Optuna: {error}") from error
        return OpenStorage(_JOURNAL + path, journal, JournalLeases(journal, JournalFile(path)))
    url = text if "://" in text else _SQLITE + os.path.abspath(text)
    backend = _database(url)
    return OpenStorage(url, optuna.storages.get_storage(backend), DatabaseLeases(backend))


def _file_of(text: str) -> Path | None:
    """The file of a storage; None for a server."""
    if text.startswith(_JOURNAL):
        return Path(text.removeprefix(_JOURNAL))
    if text.startswith(_SQLITE):
        return Path(text.removeprefix(_SQLITE))
    if "://" in text:
        return None
    scheme = text.partition(":")[0]
    if ":" in text and len(scheme) > 1 and "/" not in scheme:
        raise ConfigError(
            f"cannot tell which storage {text!r} is; give the path of an SQLite file, journal:PATH, or a database URL"
        )
    return Path(text)


def _database(url: str) -> RDBStorage:
    """Open a database; several processes may make its tables at the same time."""
    is_sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 120}} if is_sqlite else {}
    for attempt in range(10):
        try:
            with quiet():
                storage = RDBStorage(url, engine_kwargs=options)
            break
        except ImportError as error:
            raise ConfigError(
                f"the storage {url!r} needs a database driver that is not installed: {error}"
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
            # Of two that make the same tables at the same time one fails, and finds them at its second look.
            if attempt == 9:
                raise DwindleError(f"the storage {url!r} cannot be used: {error}") from error
            time.sleep(0.1 * (attempt + 1))
    if is_sqlite:
        _set_up_sqlite(storage.engine)
    return storage


def _set_up_sqlite(engine: sqlalchemy.Engine) -> None:
    """Let each transaction of SQLite lock before it reads, and let none wait for the disk.

    Python's driver begins a transaction at the first write, so what was read before may be old by then: two workers
    could both find a trial running, and both finish it. With a write-ahead log nothing that was committed is lost when
    processes are killed; when the whole machine fails, the latest trials may be.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: object) -> None:
        connection.isolation_level = None
        with contextlib.suppress(sqlite3.OperationalError):  # another process sets it at this moment
            connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute("PRAGMA synchronous=NORMAL")

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begun(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were opened before know nothing of this


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's own messages and its notes on experimental features away."""
    import warnings

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
