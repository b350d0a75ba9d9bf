"""APSW's own asynchronous connections: they are replicated as any other, and only they may ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
import walship.aio
from support.databases import Database
from walship.vfs.commits import collect
from walship.vfs.registry import canonical, registry

pytestmark = pytest.mark.skipif(
    not hasattr(apsw.Connection, "as_async"), reason="this APSW has no asynchronous connections"
)


@contextlib.asynccontextmanager
async def _opened(database: Database) -> AsyncIterator[Any]:
    """An asynchronous connection to a database in WAL mode."""
    replica = {"path": str(database.replica), "sync_interval": 0.0}
    walship.configure(database.path, replica)
    connection: Any = await apsw.Connection.as_async(str(database.path), vfs="walship")
    try:
        await connection.set_busy_timeout(5000)
        await connection.pragma("journal_mode", "wal")
        yield connection
    finally:
        await connection.aclose()


def test_an_asynchronous_connection_is_replicated(tmp_path: Path) -> None:
    """What it commits arrives; when it is closed all is given up: threads, locks, files."""
    database = Database(tmp_path)

    async def use(n: int) -> None:
        async with _opened(database) as connection:
            await connection.execute(f"CREATE TABLE t{n} (x)")
            await connection.execute(f"INSERT INTO t{n} VALUES (1)")
            assert await walship.aio.wait(database.path, 30) > n
            await connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            await connection.execute(f"INSERT INTO t{n} VALUES (2)")

    for n in range(3):
        asyncio.run(use(n))
        assert registry.engine(canonical(database.path)) is None
        assert not [t for t in threading.enumerate() if t.name.startswith("walship")]
        database.assert_replica_equals_file()
    with database.opened() as connection:
        connection.execute("INSERT INTO t1 VALUES (3)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_no_descriptor_stays_behind(tmp_path: Path) -> None:
    """Beside an open asynchronous connection others are opened and closed without a trace."""
    database, other = Database(tmp_path), Database(tmp_path, "other.db")

    async def use() -> None:
        async with _opened(database) as connection:
            await connection.execute("CREATE TABLE t (x)")
            counts = set()
            for n in range(4):
                with other.opened() as synchronous:
                    synchronous.execute(f"CREATE TABLE t{n} (x)")
                    other.sync()
                counts.add(len(os.listdir("/dev/fd")))
            assert len(counts) == 1
            await walship.aio.wait(database.path, 30)

    asyncio.run(use())
    database.assert_replica_equals_file()
    other.assert_replica_equals_file()


def test_commits_of_a_context_are_noted(tmp_path: Path) -> None:
    """A request that writes through an asynchronous connection is known to have written."""
    database = Database(tmp_path)

    async def use() -> None:
        async with _opened(database) as connection:
            await connection.execute("CREATE TABLE t (x)")
            with collect() as commits:
                await (await connection.execute("SELECT * FROM t")).fetchall()
                assert not commits.take()
                await connection.execute("INSERT INTO t VALUES (1)")
                assert commits.take() == {database.engine()}

    asyncio.run(use())


@pytest.mark.parametrize(
    "ask",
    [walship.replication, walship.durable, walship.aio.durable, walship.aio.wait],
    ids=["replication", "durable", "aio.durable", "aio.wait"],
)
def test_what_cannot_be_asked_says_so(ask: Callable[[Any], Any], tmp_path: Path) -> None:
    """Where a connection would have to answer at once, an asynchronous one is refused, clearly."""
    database = Database(tmp_path)

    async def use() -> None:
        async with _opened(database) as connection:
            with pytest.raises(walship.RefusedError, match="asynchronous"):
                answer = ask(connection)
                if isinstance(answer, Coroutine):
                    await answer

    asyncio.run(use())


_FORK = """
    import asyncio, os, signal, sys, warnings
    import apsw, walship

    path, replica = sys.argv[1:3]
    walship.configure(path, {"path": replica, "sync_interval": 0.0})

    async def main():
        db = await apsw.Connection.as_async(path, vfs="walship")
        await db.pragma("journal_mode", "wal")
        await db.execute("CREATE TABLE t (x)")
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                apsw.Connection(path, vfs="walship")
            except walship.RefusedError as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        await db.execute("INSERT INTO t VALUES (1)")
        await db.aclose()

    asyncio.run(main())
    """


def test_a_fork_beside_an_asynchronous_connection(tmp_path: Path) -> None:
    """The child, which has no thread to ask the connection, may not open the database."""
    database = Database(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_FORK), database.path, database.replica],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != -signal.SIGALRM
    assert done.stdout == "0\n", done.stderr
    database.assert_replica_equals_file()
