"""Commits that wait: they return when the replica has them.

A wait never happens in the bell, where it would hold the connection's read mark and keep SQLite
from ever restarting the WAL, but in the WAL hook, which SQLite calls when all locks are gone, or
after the statement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from types import TracebackType
from typing import Final

import apsw

from walship.replica.clock import SystemClock
from walship.replica.engine import Engine
from walship.replica.sqlite import RefusedError, refuse_asynchronous
from walship.replica.waits import countable

from .commits import collect
from .registry import registry
from .turns import Turns

__all__ = ["DurableCursor", "durable", "make_durable", "wait_for"]

_clock: Final = SystemClock()


def wait_for(engines: Iterable[Engine], timeout: float | None) -> None:
    """Wait until everything committed so far to these databases is in their replicas.

    Args:
        timeout: seconds for all together; None waits as long as it takes.

    Raises:
        NotYetReplicated: the time ended first; what is committed is local and will be shipped.
        ReplicaError: it can never be shipped; the message says why.
    """
    deadline = None if timeout is None else _clock.monotonic() + timeout
    for engine in engines:
        left = None if deadline is None else max(0.0, deadline - _clock.monotonic())
        engine.sync(left)


class DurableCursor(apsw.Cursor):
    """A cursor whose early end waits too.

    SQLite calls no hook when ``INSERT .. RETURNING`` is not read to its end.  Nor is anybody asked
    when such a cursor is dropped rather than closed: then nothing waits.
    """

    #: Seconds; set by `make_durable` for each connection.
    timeout: float | None = None

    def close(self, force: bool = False) -> None:
        with collect() as commits:
            super().close(force)
        wait_for(commits.take(), self.timeout)


def make_durable(
    connection: apsw.Connection, turns: Turns, checkpoint_pages: int, timeout: float
) -> None:
    """Make every commit of a connection wait until the replica has it.

    Args:
        turns: of its database.
        checkpoint_pages: WAL pages from which on a commit also checkpoints, as SQLite's
            ``wal_autocheckpoint``, whose place the hook takes.
        timeout: seconds before `NotYetReplicated`.
    """

    # Once: to find it by its path takes longer than the commit.
    of_main = registry.engine(connection.db_filename("main"))

    def committed(connection: apsw.Connection, name: str, n_pages: int) -> int:
        turns.hand_on()
        if n_pages >= checkpoint_pages:
            with contextlib.suppress(apsw.BusyError, apsw.LockedError):  # the next commit tries
                connection.wal_checkpoint(name, apsw.SQLITE_CHECKPOINT_PASSIVE)
        engine = of_main if name == "main" else registry.engine(connection.db_filename(name))
        if engine is not None:
            engine.sync(timeout)
        return apsw.SQLITE_OK

    connection.set_wal_hook(committed)
    connection.cursor_factory = type("DurableCursor", (DurableCursor,), {"timeout": timeout})


class durable:
    """A transaction that ends when the replica has it.

        with walship.durable(db):
            db.execute("insert into orders ...")

    Like ``with db:``, and when that has committed it waits.  An exception inside rolls back, and
    nothing is waited for; neither is it where nothing was written.

    Args:
        connection: opened through the VFS.
        timeout: seconds; None waits as long as it takes.

    Raises:
        RefusedError: the connection is in a transaction already, which would wait for itself, or
            is asynchronous.
        NotYetReplicated: (at the end) the time ended first; the commit is local and will be
            shipped.
        ReplicaError: (at the end) it can never be shipped; the message says why.
    """

    def __init__(self, connection: apsw.Connection, timeout: float | None = None) -> None:
        refuse_asynchronous(connection, "commit, then `await walship.aio.wait(path)`")
        self._connection = connection
        self._timeout = countable(timeout)

    def __enter__(self) -> apsw.Connection:
        if self._connection.in_transaction:
            raise RefusedError("durable() inside a transaction would wait for itself: end it first")
        self._collecting = collect()
        self._commits = self._collecting.__enter__()
        self._connection.__enter__()
        return self._connection

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._connection.__exit__(kind, value, traceback)
            engines = self._commits.take()
        finally:
            self._collecting.__exit__(None, None, None)
        if kind is None:
            wait_for(engines, self._timeout)
