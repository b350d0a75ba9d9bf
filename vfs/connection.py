"""The front door: `connect`, `configure`, `replication`, and the connection they speak of."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import apsw

from walship.replica.config.settings import DatabaseSettings, ReplicaSettings, database_file
from walship.replica.config.sources import (
    CONFIG_PLACES,
    database_settings,
    default_replica,
    find_config,
    load_config,
)
from walship.replica.engine import Engine, Status
from walship.replica.errors import ClosedError, ConfigError, ReplicaError
from walship.replica.marks import Mark
from walship.replica.sqlite import RefusedError, refuse_asynchronous, require_sqlite
from walship.replica.verify import Verification

from .durable import make_durable
from .registry import VFS_NAME, canonical, registry
from .replicating import install
from .services import services
from .turns import Turns

__all__ = ["Connection", "Replication", "configure", "connect", "replication"]

#: Between two attempts at WAL mode; the one who wins needs a few milliseconds.
_WAL_MODE_PAUSE_S = 0.005

ReplicaLike = str | os.PathLike[str] | Mapping[str, Any]


class Connection(apsw.Connection):
    """An ``apsw.Connection`` out of whose ``with`` block our own errors come as they are.

    One whose commits wait for the replica queues with the others of this process for the write
    lock, for as long as the busy timeout says; with ``PRAGMA busy_timeout`` it no longer does.
    """

    _turns: Turns | None = None

    def set_busy_timeout(self, milliseconds: int) -> None:
        if self._turns is None or milliseconds <= 0:
            super().set_busy_timeout(milliseconds)
        else:
            self.set_busy_handler(self._turns.busy_handler(milliseconds / 1000))

    def queue_with(self, turns: Turns, busy_timeout_s: float) -> None:
        """Take part in a queue for the write lock from now on."""
        self._turns = turns
        self.set_busy_timeout(int(busy_timeout_s * 1000))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            return super().__exit__(kind, value, traceback)
        except apsw.Error as error:
            ours = _ours(error)
            if ours is None:
                raise
            raise ours from error


def _ours(error: BaseException) -> ReplicaError | None:
    """Our exception behind one of apsw's: RELEASE inside ``with`` replaces it by its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ReplicaError):
            return None if seen is error else seen
        seen = seen.__context__
    return None


class Replication:
    """Replication of one database, as the application sees it.  Thread-safe."""

    def __init__(self, engine: Engine, connection: apsw.Connection | None = None) -> None:
        self._engine = engine
        self._connection = None if connection is None else weakref.ref(connection)

    def __repr__(self) -> str:
        status = self.status()
        return f"<walship.Replication {status.path} -> {status.replica} ({status.state})>"

    @property
    def engine(self) -> Engine:
        """The engine behind it; not part of what stays the same from release to release."""
        return self._engine

    def wait(self, timeout: float | None = None) -> int:
        """Another name of `sync`."""
        return self.sync(timeout)

    def sync(self, timeout: float | None = None) -> int:
        """Wait until everything committed so far is in the replica.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            The TXID that holds the newest commit.

        Raises:
            NotYetReplicated: the time ended first; what is committed is local and will be shipped.
            RefusedError: the connection is in a write transaction, which would wait for itself.
            ReplicaError: it can never be shipped; the message says why.
        """
        self._refuse_write_transaction("sync()")
        return self._engine.sync(timeout)

    def _refuse_write_transaction(self, what: str) -> None:
        connection = None if self._connection is None else self._connection()
        if connection is not None and _is_writing(connection):
            raise RefusedError(f"{what} inside a write transaction: commit it first")

    def status(self) -> Status:
        """How replication stands now; makes no request and never raises."""
        return self._engine.status()

    def mark(self, label: str, timeout: float | None = None, *, replace: bool = False) -> Mark:
        """Give what is committed now a name, under which it can be restored (``label=``).

        Waits until the replica has it, then makes the mark, durably in the replica.  What other
        threads commit meanwhile may be in the marked state or not.  As long as the mark exists,
        retention keeps what its state needs: `unmark` it when it is not wanted any more.

        Args:
            label: up to 100 letters, digits, ".", "_" and "-"; the first a letter or digit.
            timeout: seconds to wait for the replica; None waits as long as it takes.
            replace: move the mark if there is one of that label.

        Returns:
            The mark: TXID and time.

        Raises:
            ConfigError: the label cannot be used, or is in use.
            NotYetReplicated: the time ended first; there is no mark.
            RefusedError: the connection is in a write transaction, or the database is empty.
            StoreError: the replica did not take the mark; try again.
            ReplicaError: it can never be shipped; the message says why.
        """
        self._refuse_write_transaction("mark()")
        return self._engine.mark(label, timeout, replace=replace)

    def unmark(self, label: str) -> Mark:
        """Remove a mark; its state may go with the next retention.  Returns what it was.

        Raises:
            ConfigError: there is no such mark.
            StoreError: the replica did not answer.
        """
        return self._engine.unmark(label)

    def verify(self, timeout: float | None = None) -> Verification:
        """Restore the replica for trial, check it, and compare it with the database.

        It is done by a process of its own, and commits go on meanwhile; this waits for the outcome.
        Scratch space of the size of the database is needed in the state directory.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            What was found; also what kept it from being done (outcome "failed").

        Raises:
            ClosedError: the last connection was closed meanwhile.
        """
        found = self._engine.validation.verify(timeout)
        if found is None:
            raise ClosedError(f"{self._engine.name} was closed while its replica was verified")
        return found

    def on_verify_failed(self, callback: Callable[[Verification], object]) -> None:
        """Have a function called when a verification finds the replica damaged or different.

        It is called in the thread that verifies: with ``validation-interval``, one of the process
        that uploads.  So register it in each process.  What it raises goes to the log.
        """
        self._engine.validation.on_failed(callback)


def _is_writing(connection: apsw.Connection) -> bool:
    try:
        return connection.txn_state() == apsw.SQLITE_TXN_WRITE
    except apsw.ConnectionClosedError:
        return False


def connect(
    path: str | os.PathLike[str],
    replica: ReplicaLike | None = None,
    *,
    restore: Literal["if-missing", "never"] | None = None,
    page_size: int | None = None,
    busy_timeout: float | None = None,
    durability: Literal["async", "replica"] | None = None,
    durability_timeout: float | None = None,
    flags: int = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE,
    **settings: Any,
) -> Connection:
    """Open a database whose commits are shipped to a replica.

    The database is put into WAL mode.  Without a replica (here, in `configure` or in
    ``WALSHIP_REPLICA``) it is an ordinary one, and nothing leaves the machine.

    Args:
        path: the database file.
        replica: URL, directory, or mapping of replica settings.
        restore: "if-missing" (default) restores from the replica first when the file is missing
            and the replica has data; "never" does not.
        page_size: bytes, for a new database only: a power of two from 512 to 65536.
        busy_timeout: seconds to wait for another connection's lock, default 5.
        durability: "replica" makes every commit of this connection wait until the replica has it;
            "async" (default) returns at once.
        durability_timeout: seconds such a commit waits before `NotYetReplicated`, default 30.
        flags: as for ``apsw.Connection``.
        **settings: any replica or database setting of the configuration file, with underscores.

    Raises:
        ConfigError: a setting cannot be used.
        RefusedError: the database cannot be replicated, or not from this process.
        ContinuityError: database and replica do not continue each other.
        StoreError: the file is missing and the replica could not be asked for it.
        RestoreError: restoring failed.
        apsw.Error: SQLite could not open the database.
    """
    require_sqlite()
    name = _database(path)
    own = {
        "page_size": page_size,
        "busy_timeout": busy_timeout,
        "durability": durability,
        "durability_timeout": durability_timeout,
    }
    found = _settings(name, replica, restore, own, settings)
    if found.replica is not None:
        registry.configure(found)
    install()
    connection = Connection(name, flags=flags, vfs=VFS_NAME)
    try:
        connection.set_busy_timeout(int(found.busy_timeout_s * 1000))
        connection.wal_autocheckpoint(found.min_checkpoint_page_count)
        _prepare(connection, name, found.page_size, found.busy_timeout_s)
        if found.durability == "replica" and found.replica is not None:
            pages = found.min_checkpoint_page_count
            turns = registry.turns(name)
            connection.queue_with(turns, found.busy_timeout_s)
            make_durable(connection, turns, pages, found.durability_timeout_s)
    except BaseException:
        connection.close(True)
        raise
    return connection


def _database(path: str | os.PathLike[str]) -> str:
    """The file that is meant, as SQLite names it.

    Raises:
        ConfigError: it is no file, but a directory, a URL, or a database in memory.
    """
    return canonical(database_file(os.fsdecode(path)))


def _settings(
    name: str,
    replica: ReplicaLike | None,
    restore: Literal["if-missing", "never"] | None,
    own: dict[str, Any],
    settings: dict[str, Any],
) -> DatabaseSettings:
    """What was configured for the path, or what these arguments say."""
    configured = registry.settings_for(name)
    given = dict(settings)
    if restore is not None:
        given["restore"] = restore
    if configured is None or replica is not None:
        if replica is None and not _names_replica(given):
            replica_settings: ReplicaLike | ReplicaSettings | None = default_replica()
        else:
            replica_settings = replica
        found = database_settings(name, replica_settings, **given)
    elif given:
        raise ConfigError(
            f"{name} is configured already: give {', '.join(sorted(given))} together with its "
            "replica"
        )
    else:
        found = configured
    # These belong to the connection, whatever the database's settings say.
    given_own = {key: value for key, value in own.items() if value is not None}
    read = database_settings(name, **given_own)
    for key in given_own:
        attribute = key if hasattr(read, key) else f"{key}_s"
        found = replace(found, **{attribute: getattr(read, attribute)})
    return found


def _names_replica(given: Mapping[str, Any]) -> bool:
    """Whether keywords alone say where the replica is."""
    return any(name in given for name in ("url", "bucket"))


def _prepare(
    connection: Connection, name: str, page_size: int | None, busy_timeout_s: float
) -> None:
    if connection.readonly("main"):
        return
    if page_size is not None:
        connection.pragma("page_size", page_size)
    mode = _wal_mode(connection, registry.host.clock.monotonic() + busy_timeout_s)
    if mode != "wal":
        raise RefusedError(f"{name} cannot be replicated: it stays in journal mode {mode!r}")
    # Reads something once, so that the WAL is open and a damaged file is noticed here.
    connection.pragma("user_version")


def _wal_mode(connection: Connection, deadline: float) -> str:
    """Put the database into WAL mode; returns the mode it is in then.

    The busy timeout does not help where several open a new database at once: each holds a shared
    lock and wants an exclusive one, which SQLite answers with "locked" at once.
    """
    clock = registry.host.clock
    while True:
        try:
            return str(connection.pragma("journal_mode", "wal"))
        except apsw.BusyError:
            if clock.monotonic() >= deadline:
                raise
            clock.sleep(_WAL_MODE_PAUSE_S)


def configure(
    path: str | os.PathLike[str] | None = None,
    replica: ReplicaLike | None = None,
    *,
    strict: bool = False,
    expand_env: bool = True,
    **settings: Any,
) -> None:
    """Say how a database, or those of a configuration file, are replicated from now on.

    With this, ``apsw.Connection(path, vfs="walship")`` replicates, and `connect` needs no replica.
    Databases in the file's directories (``dir``) are found when they are opened, also new ones.
    The file's ``addr`` and ``heartbeat-url`` are served and sent while this process has databases.

    Args:
        path: a database file; or, without a replica, a configuration file (``.yml``).  Without a
            path it is the file that ``WALSHIP_CONFIG`` or ``LITESTREAM_CONFIG`` names, else the
            first that exists of ``walship.yml`` in the working directory, ``/etc/walship.yml`` and
            ``/etc/litestream.yml``.
        replica: URL, directory, or mapping of replica settings.
        strict: an unknown key in the file is an error, not a warning.
        expand_env: replace ``$NAME`` and ``${NAME}`` in the file's values.
        **settings: any replica or database setting of the configuration file, with underscores;
            with a database only.

    Raises:
        ConfigError: a setting cannot be used, or there is no configuration file.
    """
    install()
    if path is None:
        if replica is not None:
            raise ConfigError("configure: which database has this replica? Give its path first")
        path = find_config()
        if path is None:
            raise ConfigError(
                "configure: there is no configuration file: name it, here or in WALSHIP_CONFIG "
                f"(looked for: {', '.join(CONFIG_PLACES)})"
            )
    elif replica is not None or not os.fspath(path).endswith((".yml", ".yaml")):
        registry.configure(database_settings(_database(path), replica, **settings))
        return
    if settings:
        raise ConfigError(
            f"{', '.join(sorted(settings))}: settings of databases belong into {os.fspath(path)}"
        )
    found = load_config(path, strict=strict, expand_env=expand_env)
    registry.configure(*found.databases, directories=found.directories)
    if found.addr is not None or found.heartbeat_url is not None:
        services.configure(found)


def replication(database: apsw.Connection | str | os.PathLike[str]) -> Replication:
    """Replication of an open database, by connection or by path.

    Raises:
        ClosedError: the database is not open here, or has no replica.
        RefusedError: the connection is asynchronous; give the path.
    """
    if isinstance(database, apsw.Connection):
        refuse_asynchronous(database, "give the path of its database")
        path = database.db_filename("main")
    else:
        path = _database(database)
    engine = registry.engine(path) if path else None
    if engine is None:
        raise ClosedError(
            f"{path or 'this database'} is not replicated here: open it with "
            "walship.connect(path, replica=...) first"
        )
    connection = database if isinstance(database, apsw.Connection) else None
    return Replication(engine, connection)
