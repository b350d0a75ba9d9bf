"""walship's own connections are in ``apsw.connections()`` and run ``apsw.connection_hooks``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import apsw.bestpractice
import pytest

import walship
from support.databases import Database
from walship.replica.sealing import Sealer


@pytest.fixture(autouse=True)
def hooks() -> Iterator[None]:
    """The hooks are the process's own again at the end."""
    before, apsw.connection_hooks = apsw.connection_hooks, list(apsw.connection_hooks)
    yield
    apsw.connection_hooks = before


def _others(own: apsw.Connection) -> list[apsw.Connection]:
    return [connection for connection in apsw.connections() if connection is not own]


def _close_others(own: apsw.Connection) -> None:
    for connection in _others(own):
        while True:
            try:
                connection.close(True)
                break
            except apsw.ThreadingViolationError:
                continue  # at work in walship's thread for a moment


@pytest.mark.parametrize("seal", ["take", "gate", "close"])
def test_the_application_closes_all_connections(seal: str, tmp_path: Path) -> None:
    """Closing whatever ``apsw.connections()`` lists costs nothing: it is opened again."""
    database = Database(tmp_path, sync_interval=0.0 if seal == "take" else 3600.0)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        for n in range(5):
            _close_others(connection)
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            if seal == "gate":
                _close_others(connection)
                connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
            database.assert_replica_equals_now()
        connection.execute("INSERT INTO t VALUES (7)")
        _close_others(connection)
    database.assert_replica_equals_file()
    assert len(database.full_copies()) <= 1


def test_closed_connections_hold_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that went with a connection of ours are not taken for stolen ones."""
    monkeypatch.setattr("walship.replica.uploader.TICK_S", 0.01)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        with database.opened():
            reader = database.connect()
            connection.close(True)
            _close_others(reader)
            for _ in range(20):
                threading.Event().wait(0.01)
                assert walship.replication(reader).status().state == "ok"
            reader.execute("INSERT INTO t VALUES (1)")
            database.assert_replica_equals_now()
            reader.close(True)
    database.assert_replica_equals_file()


def test_the_application_closes_the_connection_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy whose connection is closed says why in the status, and is made again."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        encode = Sealer.encode

        def closing(*args: object) -> None:
            monkeypatch.setattr(Sealer, "encode", encode)
            _close_others(connection)
            encode(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(Sealer, "encode", closing)
        database.engine().capture.record.require_full_copy("the test wants one")
        database.assert_replica_equals_now()
        assert walship.replication(connection).status().ok
    database.assert_replica_equals_file()


def test_another_thread_uses_all_connections(tmp_path: Path) -> None:
    """Statistics of all connections, gathered in another thread, are in nobody's way."""
    database = Database(tmp_path)
    stop = threading.Event()
    read = 0

    def gather(own: apsw.Connection) -> None:
        nonlocal read
        while not stop.is_set():
            for other in _others(own):
                try:
                    other.execute("PRAGMA integrity_check").fetchall()
                    read += 1
                except apsw.Error:
                    continue  # in use itself, or closed meanwhile
            stop.wait(0.002)

    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        thread = threading.Thread(target=gather, args=(connection,))
        thread.start()
        try:
            for n in range(100):
                connection.execute("INSERT INTO t VALUES (?)", (n,))
                if n % 5 == 0:
                    connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
                if n % 9 == 0:
                    database.sync()
        finally:
            stop.set()
            thread.join()
        assert read
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_hooks_write_nothing_through_ours(tmp_path: Path) -> None:
    """Hooks that write, as some of those that APSW recommends, find ours not to be writable."""
    database = Database(tmp_path)
    apsw.bestpractice.apply(
        tuple(f for f in apsw.bestpractice.recommended if f.__name__ != "library_logging")
    )

    def count(connection: apsw.Connection) -> None:
        if not connection.readonly("main"):
            connection.execute("CREATE TABLE IF NOT EXISTS openings (vfs)")
            connection.execute("INSERT INTO openings VALUES (?)", (connection.open_vfs,))

    apsw.connection_hooks.append(count)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        for n in range(3):
            _close_others(connection)
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            database.engine().capture.record.require_full_copy("the test wants one")
            database.sync()
        assert connection.execute("SELECT vfs FROM openings").fetchall() == [("walship",)]
        apsw.connection_hooks.clear()
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_a_hook_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that fails for connections of ours is named in the status, and mended by its end."""
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_LONGEST_S", 0.1)
    database = Database(tmp_path)

    def hook(connection: apsw.Connection) -> None:
        if connection.open_vfs != "walship":
            raise ValueError("not with me")

    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        _close_others(connection)
        apsw.connection_hooks.append(hook)
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(walship.NotYetReplicated, match=r"connection_hooks.*not with me"):
            walship.replication(connection).sync(0.5)
        apsw.connection_hooks.clear()
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
