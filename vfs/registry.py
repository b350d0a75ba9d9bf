"""Which paths are replicated, and the engines that serve them: one per path and process.

Also what concerns the whole process: draining at exit, forks, and the guard that keeps the
standard ``sqlite3`` module (another SQLite library) away from files that are open here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote
from weakref import WeakValueDictionary

import apsw

from walship.replica.config.directories import DirectorySettings
from walship.replica.config.settings import DatabaseSettings
from walship.replica.engine import Engine, restore_if_missing
from walship.replica.errors import ConfigError, ReplicaError
from walship.replica.host import Host
from walship.replica.sqlite import (
    RefusedError,
    is_asynchronous,
    strangers_on,
)

from .files import MainFile
from .turns import Turns

__all__ = ["VFS_NAME", "Registry", "canonical", "registry"]

log = logging.getLogger("walship")

VFS_NAME: Final = "walship"
#: Longest that all databases together may take to drain when the interpreter exits, seconds.
_EXIT_DRAIN_S: Final = 30.0


class Services(Protocol):
    """What else runs in a process that has a database open."""

    def start(self) -> None:
        """A database is open, the first one of this process.  Never raises."""

    def close_in_child(self) -> None:
        """This is a forked child: nothing runs in it yet."""


class Registry:
    """Which paths are replicated, and the engines that serve them.  Thread-safe.

    Args:
        host: where the engines run.
    """

    def __init__(self, host: Host | None = None) -> None:
        self.host = host or Host()
        # Guards the dictionaries; held while an engine is opened, so that there is only one.
        self._lock = threading.RLock()
        self._settings: dict[str, DatabaseSettings] = {}
        self._directories: dict[tuple[Path, str], DirectorySettings] = {}
        self._engines: dict[str, Engine] = {}
        self._files: dict[str, set[MainFile]] = {}
        # Connections between `acquire` and `add`: they keep an engine alive too.
        self._opening: Counter[str] = Counter()
        self._turns: WeakValueDictionary[str, Turns] = WeakValueDictionary()
        self._poisoned: set[str] = set()
        self._guarded = False
        self._exiting = False
        self.services: Services | None = None
        #: Databases that this process is to replicate and cannot open, with the reason, by path.
        self.unopened: Callable[[], Mapping[str, Exception]] = dict
        self._has_services = False

    # -- configuration ------------------------------------------------------------------------

    def configure(
        self, *databases: DatabaseSettings, directories: Iterable[DirectorySettings] = ()
    ) -> None:
        """Settings for connections to these databases that are opened from now on; all or none.

        Args:
            databases: they win over directories.
            directories: for the databases in them that have no settings of their own; those that
                were given first win.

        Raises:
            ConfigError: a path is open with another replica.
        """
        with self._lock:
            for settings in databases:
                engine = self._engines.get(canonical(settings.path))
                if engine is not None and not same_replica(engine.settings, settings):
                    raise ConfigError(
                        f"{engine.path} is open and shipped to {engine.status().replica}: close it "
                        "before giving it another replica"
                    )
            for settings in databases:
                self._settings[canonical(settings.path)] = settings
            for directory in directories:
                self._directories[directory.directory, directory.pattern] = directory

    def settings_for(self, path: str) -> DatabaseSettings | None:
        """What is configured for a canonical path, or None."""
        with self._lock:
            settings = self._settings.get(path)
            if settings is not None:
                return settings
            found = (directory.database(path) for directory in self._directories.values())
            return next(filter(None, found), None)

    def engine(self, path: str) -> Engine | None:
        """The engine that serves a path now, or None."""
        with self._lock:
            return self._engines.get(canonical(path))

    def engines(self) -> list[Engine]:
        """All engines at work.  Does not wait for a database that is being opened, or restored."""
        return list(self._engines.values())

    def turns(self, path: str) -> Turns:
        """The queue for the write lock of a database; it lasts as long as somebody has it."""
        with self._lock:
            return self._turns.setdefault(canonical(path), Turns(self.host.clock))

    # -- connections --------------------------------------------------------------------------

    def acquire(self, path: str) -> Engine | None:
        """The engine for a connection that is opening ``path``; None if it is not replicated.

        Raises:
            RefusedError: it must not be opened here.
            ReplicaError: its replica cannot be used.
        """
        with self._lock:
            if path in self._poisoned:
                raise RefusedError(
                    f"{path} was open when this process was forked: open databases after the fork"
                )
            engine = self._engines.get(path)
            if engine is None:
                settings = self.settings_for(path)
                if settings is None or settings.replica is None:
                    return None
                self._refuse_second_name(path)
                self._guard(path)
                if settings.restore == "if-missing":
                    restore_if_missing(settings, self.host)
                engine = Engine.open(settings, self.host)
                self._refuse_shared_replica(engine)
                self._engines[path] = engine
                self._files[path] = set()
                self._start_services()
            else:
                engine.after_open()
            self._opening[path] += 1
        try:
            engine.wait_ready()
        except BaseException:
            self.abandon(path, engine)
            raise
        return engine

    def _start_services(self) -> None:
        if not self._has_services and self.services is not None:
            self._has_services = True
            self.services.start()

    def abandon(self, path: str, engine: Engine) -> None:
        """A connection that called `acquire` could not be opened."""
        with self._lock:
            self._opening[path] -= 1
            if not self._is_unused(path, engine):
                return
            self._forget(path)
        engine.abandon()

    def _is_unused(self, path: str, engine: Engine) -> bool:
        return (
            self._engines.get(path) is engine and not self._files[path] and not self._opening[path]
        )

    def _forget(self, path: str) -> None:
        del self._engines[path], self._files[path], self._opening[path]

    def _refuse_shared_replica(self, engine: Engine) -> None:
        for other in self._engines.values():
            if other.status().replica == engine.status().replica:
                engine.uploader.stop()
                engine.release()
                raise ConfigError(
                    f"{engine.path} and {other.path} may not share one replica "
                    f"({other.status().replica}): give each its own path"
                )

    def _refuse_second_name(self, path: str) -> None:
        """SQLite knows a log by its database's name: under two names each would have its own."""
        for other in self._engines:
            with contextlib.suppress(OSError):
                if os.path.samefile(path, other):
                    raise RefusedError(
                        f"{path} and {other}, which is open, are one file (a hard link): open it "
                        "under one of its names only"
                    )

    def add(self, path: str, file: MainFile) -> None:
        """A connection to ``path`` is open; ``file`` is its main file."""
        with self._lock:
            self._opening[path] -= 1
            self._files[path].add(file)
        file.is_last = lambda: len(self._files.get(path, ())) == 1

    def main_file(self, path: str) -> MainFile | None:
        """Some open main file of ``path`` (SQLite opens the WAL in the thread that uses it)."""
        with self._lock:
            files = self._files.get(path)
            return next(iter(files)) if files else None

    def remove(self, path: str, file: MainFile) -> None:
        """A connection was closed; the last one drains, up to shutdown-sync-timeout.

        Nobody is kept waiting meanwhile: a connection that opens the path now keeps the engine.
        """
        with self._lock:
            engine = self._engines.get(path)
            if engine is None:
                return
            self._files[path].discard(file)
            if self._exiting or not self._is_unused(path, engine):
                return
            engine.after_last_close()
            if not engine.depart():
                # Whoever opens the path here from now on comes in as every other process does.
                self._forget(path)
                engine.close(drained=True)
                return
        drained = engine.ship(engine.settings.shutdown_sync_timeout_s)
        with self._lock:
            if not self._is_unused(path, engine):
                engine.come_back()
                return
            self._forget(path)
            engine.close(drained)

    # -- the rest of the process --------------------------------------------------------------

    def _guard(self, path: str) -> None:
        """See to it that nothing in this process spoils a database that is about to be opened.

        Once per process: exit handler, fork handlers, and the hook that sees ``sqlite3``.

        Raises:
            RefusedError: the ``sqlite3`` module has it open already.
        """
        refuse_foreign_library(path)
        if self._guarded:
            return
        self._guarded = True
        atexit.register(self._at_exit)
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "sqlite3.connect" or not self._engines:
            return
        path = path_of_uri(args[0])
        if path is not None and canonical(path) in self._engines:
            raise RefusedError(
                f"{path} is replicated and open in this process: opening it with the standard "
                "sqlite3 module too would drop its locks and delete its WAL; use walship.connect"
            )

    def _at_exit(self) -> None:
        """Drain in this thread, close nothing of the application's.

        Connections that are still open are destroyed with the interpreter: they may not checkpoint
        then, for half of Python is gone by that time.  The WAL stays, and the next start goes on.
        """
        clock = self.host.clock
        deadline = clock.monotonic() + _EXIT_DRAIN_S
        for engine in self.engines():
            left = deadline - clock.monotonic()
            limit = min(engine.settings.shutdown_sync_timeout_s, max(0.0, left))
            if not engine.leave(limit):
                log.warning(
                    "%s: the program ended before everything was in the replica; the rest is "
                    "shipped after the next open",
                    engine.name,
                )
        self._exiting = True
        for connection in apsw.connections():
            with contextlib.suppress(apsw.Error):
                if connection.open_vfs == VFS_NAME and not is_asynchronous(connection):
                    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def _before_fork(self) -> None:
        self._lock.acquire()
        for engine in self._engines.values():
            engine.before_fork()

    def _after_fork_in_parent(self) -> None:
        for engine in self._engines.values():
            engine.after_fork_in_parent()
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        engines, self._engines, self._files = self._engines, {}, {}
        self._opening = Counter()
        self._turns = WeakValueDictionary()
        self._lock = threading.RLock()
        self.host.forget()
        self._has_services = False
        if self.services is not None:
            self.services.close_in_child()
        for path, engine in engines.items():
            engine.after_fork_in_child()
            for connection in apsw.connections():
                if not close_inherited(connection, path):
                    self._poisoned.add(path)


#: The registry of this process.
registry: Final = Registry()


def canonical(path: str | os.PathLike[str]) -> str:
    """The path as SQLite's full path name: absolute, links resolved."""
    return os.path.realpath(os.fspath(path))


def same_replica(a: DatabaseSettings, b: DatabaseSettings) -> bool:
    """Whether two settings ship to the same place."""
    return a.replica is not None and b.replica is not None and a.replica.store == b.replica.store


def path_of_uri(name: Any) -> str | None:
    """File path of what ``sqlite3.connect`` was given; None for memory databases."""
    try:
        text = os.fsdecode(name)
    except TypeError:
        return None
    if text.startswith("file:"):
        text = unquote(text[5:].partition("?")[0].partition("#")[0])
        if text.startswith("//"):
            text = text[2:].partition("/")[2]
            text = "/" + text
    return None if text in ("", ":memory:") else text


def refuse_foreign_library(path: str) -> None:
    """Refuse a file that another SQLite library (the ``sqlite3`` module) has open in this process.

    The kernel's locks belong to the process: when that library closes the file, ours are gone.

    Raises:
        RefusedError: it has, or a connection of another thread may be on it, which cannot be asked.
    """
    standard = sys.modules.get("_sqlite3")
    if standard is None or not os.path.exists(path) or not strangers_on(path):
        return
    # Our library too keeps descriptors of closed connections for a while: look for theirs.
    if standard_has_open(standard.Connection, path):
        raise RefusedError(
            f"{path} is already open in this process, it seems through the standard sqlite3 "
            "module: two SQLite libraries on one file break its locks; close it there first"
        )


def standard_has_open(connection_type: type, path: str) -> bool:
    """Whether a connection of the ``sqlite3`` module has a file open, or may have.

    Not part of the caller: what is found here would live as long as the traceback of its error.
    """
    found = (it for it in gc.get_objects() if issubclass(type(it), connection_type))
    return any(may_be_on(connection, path) for connection in found)


def may_be_on(connection: Any, path: str) -> bool:
    """Whether a connection of the ``sqlite3`` module has a file as a database, or will not say."""
    try:
        cursor = connection.cursor()
        cursor.row_factory = None
        names = [row[2] for row in cursor.execute("PRAGMA database_list")]
    except Exception as error:
        return "closed" not in str(error)
    return any(name and canonical(name) == path for name in names)


def close_inherited(connection: apsw.Connection, path: str) -> bool:
    """After a fork: close a connection of the parent's without touching its WAL.

    Returns:
        False if it is in a transaction, or asynchronous, so that only a thread could tell which
            this process does not have: then nothing in it may open the path.
    """
    try:
        if connection.open_vfs != VFS_NAME:
            return True
        if is_asynchronous(connection):
            return False
        if path not in [connection.db_filename(name) for name in connection.db_names()]:
            return True
        if connection.in_transaction:
            return False
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close(True)
    except (apsw.Error, ReplicaError):
        return False
    return True
