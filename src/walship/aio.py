"""Waiting for the replica in asyncio, without a thread for each wait.

    await walship.aio.wait(db, timeout=10)

    async with walship.aio.durable(db):
        db.execute("insert into orders ...")

SQLite itself is not asynchronous: statements run in the thread that executes them.  Only the wait
for the object store, which takes far longer, lets other tasks run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from types import TracebackType

import apsw

from walship.replica.engine import Engine
from walship.replica.sqlite import RefusedError, refuse_asynchronous
from walship.replica.waits import countable
from walship.vfs.commits import collect
from walship.vfs.connection import replication

__all__ = ["durable", "wait", "wait_for_engines"]


async def wait(
    database: apsw.Connection | str | os.PathLike[str], timeout: float | None = None
) -> int:
    """Wait until everything committed so far is in the replica.

    Args:
        database: an open connection, or the path of a database that is open in this process.
        timeout: seconds; None waits as long as it takes.

    Returns:
        The TXID that holds the newest commit.

    Raises:
        NotYetReplicated: the time ended first; what is committed is local and will be shipped.
        ClosedError: the database is not open here, or has no replica.
        ReplicaError: it can never be shipped; the message says why.
    """
    return await _wait(replication(database).engine, timeout)


async def wait_for_engines(engines: Iterable[Engine], timeout: float | None) -> None:
    """Wait for several databases at once; ``timeout`` is for all together."""
    await asyncio.gather(*(_wait(engine, timeout) for engine in engines))


async def _wait(engine: Engine, timeout: float | None) -> int:
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(engine.sync_future())
    except TimeoutError:
        raise engine.not_yet(timeout) from None


class durable:
    """`walship.durable` for ``async with``: the wait at the end lets other tasks run.

    The transaction belongs to the connection: no other task may use it inside.

    Args:
        connection: opened through the VFS.
        timeout: seconds; None waits as long as it takes.

    Raises:
        RefusedError: the connection is in a transaction already, or is asynchronous.
        NotYetReplicated: (at the end) the time ended first; the commit is local and will be
            shipped.
    """

    def __init__(self, connection: apsw.Connection, timeout: float | None = None) -> None:
        refuse_asynchronous(connection, "commit, then `await walship.aio.wait(path)`")
        self._connection = connection
        self._timeout = countable(timeout)

    async def __aenter__(self) -> apsw.Connection:
        if self._connection.in_transaction:
            raise RefusedError("durable() inside a transaction would wait for itself: end it first")
        self._collecting = collect()
        self._commits = self._collecting.__enter__()
        self._connection.__enter__()
        return self._connection

    async def __aexit__(
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
            await wait_for_engines(engines, self._timeout)
