"""The gate: a WAL is destroyed only when it is drained, and that takes no network."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
from support.databases import WAIT_S, Database, Stores, dump
from walship.replica.capture import Capture
from walship.replica.sealing import Sealer
from walship.replica.spool import Spool
from walship.replica.sqlite import SpoolError


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Stores:
    """Stores that can be stopped."""
    return Stores(monkeypatch)


def _commit(connection: walship.Connection, n: int) -> None:
    connection.execute("REPLACE INTO t VALUES (?, randomblob(700))", (n % 20,))


def _prepared(database: Database, stores: Stores) -> walship.Connection:
    """An open database that is in the replica, whose store then stops answering."""
    connection = database.connect(shutdown_sync_timeout="0s", open_timeout="0s")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
    _commit(connection, 0)
    database.sync()
    stores.block(("put",))
    stores.threads.clear()
    return connection


def _wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds; fails if it never does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def _wal_size(database: Database) -> int:
    path = f"{database.path}-wal"
    return os.path.getsize(path) if os.path.exists(path) else 0


def _restart(database: Database, connection: walship.Connection) -> walship.Connection:
    salts = Path(f"{database.path}-wal").read_bytes()[16:24]
    connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    _commit(connection, 100)
    assert Path(f"{database.path}-wal").read_bytes()[16:24] != salts
    return connection


def _truncate(database: Database, connection: walship.Connection) -> walship.Connection:
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert _wal_size(database) == 0
    return connection


def _delete(database: Database, connection: walship.Connection) -> walship.Connection:
    connection.close(True)
    assert not os.path.exists(f"{database.path}-wal")
    return database.connect(shutdown_sync_timeout="0s", open_timeout="0s")


DESTROYERS: dict[str, Callable[[Database, walship.Connection], walship.Connection]] = {
    "restart": _restart,
    "truncate": _truncate,
    "delete": _delete,
}


@pytest.mark.parametrize("way", sorted(DESTROYERS))
def test_destroying_the_wal_needs_no_network(
    way: str, tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store that never answers, each way to destroy a WAL drains it and goes through."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    sent = database.segments()
    here = threading.get_ident()
    for n in range(12):
        _commit(connection, n)
        if n % 3 == 2:
            connection = DESTROYERS[way](database, connection)
    assert here not in stores.threads, "the application's thread spoke to the store"
    _wait_for(lambda: stores.last.waiting > 0)
    expected = dump(database.path)
    if way != "delete":  # closing a store lets go of the requests that it blocks
        assert database.segments() == sent
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()
    assert dump(database.restore()) == expected
    assert len(database.full_copies()) <= 1


@pytest.mark.parametrize("way", sorted(DESTROYERS))
def test_mixed_with_another_way(way: str, tmp_path: Path, stores: Stores) -> None:
    """Two ways to destroy a WAL directly after each other, with and without commits between."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    for other in sorted(DESTROYERS):
        _commit(connection, 1)
        connection = DESTROYERS[way](database, connection)
        if other != "restart":
            connection = DESTROYERS[other](database, connection)
        _commit(connection, 2)
        connection = DESTROYERS[other](database, connection)
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()


@pytest.mark.parametrize("way", ["restart", "truncate"])
def test_no_request_of_any_kind_is_waited_for(way: str, tmp_path: Path, stores: Stores) -> None:
    """The same when the store answers no listing and no reading request either."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    stores.block()
    for n in range(9):
        _commit(connection, n)
        if n % 3 == 2:
            connection = DESTROYERS[way](database, connection)
    assert threading.get_ident() not in stores.threads
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()


def test_full_speed_while_the_store_is_away(tmp_path: Path, stores: Stores) -> None:
    """During an outage commits go on, the WAL is recycled, and the spool does not pile up."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    sent = database.segments()
    connection.wal_autocheckpoint(20)
    salts = set()
    most = 0
    for n in range(3000):
        _commit(connection, n)
        if n % 20 == 0:
            salts.add(Path(f"{database.path}-wal").read_bytes()[16:24])
            most = max(most, _wal_size(database))
    assert len(salts) > 30, "the WAL was not recycled"
    assert most < 1_000_000
    assert walship.replication(connection).status().replicated_txid == len(sent)
    assert database.segments() == sent
    _wait_for(lambda: stores.last.waiting > 0)
    stores.release()
    database.sync()
    segments = database.segments()
    assert len(segments) < 20, "gates raised the number of objects"
    connection.close(True)
    database.assert_replica_equals_file()


def test_the_spool_is_bounded_by_the_database(tmp_path: Path, stores: Stores) -> None:
    """However long the store is away, what waits is merged to about the database's size."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    connection.wal_autocheckpoint(20)
    for n in range(6000):
        _commit(connection, n)
    limit = 10 * database.path.stat().st_size + 2_000_000
    _wait_for(lambda: database.engine().status().pending_bytes <= limit)
    spool = sum(f.stat().st_size for f in (tmp_path / ".app.db-walship").iterdir())
    assert spool < 40_000_000
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()


def test_large_transactions_through_the_gate(tmp_path: Path, stores: Stores) -> None:
    """A piece too large for the journal is sealed in a file of its own and removed once sent."""
    database = Database(tmp_path)
    connection = _prepared(database, stores)
    for n in range(4):
        connection.execute("REPLACE INTO t VALUES (?, randomblob(900000))", (n,))
        connection = DESTROYERS[("restart", "truncate", "delete", "restart")[n]](
            database, connection
        )
    state = tmp_path / ".app.db-walship"
    assert list(state.glob("*.ltx"))
    stores.release()
    database.sync()
    assert not list(state.glob("*.ltx"))
    connection.close(True)
    database.assert_replica_equals_file()


def test_a_gate_during_the_first_copy(
    tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits and WAL restarts while the first copy is being read follow as further segments."""
    database = Database(tmp_path, page_size=512)
    with database.opened() as plain:
        plain.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        for n in range(50):
            plain.execute("INSERT INTO t VALUES (?, randomblob(2000))", (n,))
    for name in (tmp_path / ".app.db-walship").iterdir():
        name.unlink()
    database.replica = tmp_path / "another"
    reached, go_on = threading.Event(), threading.Event()
    encode = Sealer.encode

    def held(*args: Any) -> None:
        if not reached.is_set():
            reached.set()
            assert go_on.wait(20)
        encode(*args)

    monkeypatch.setattr(Sealer, "encode", held)
    with database.opened() as connection:
        assert reached.wait(20)
        monkeypatch.setattr(Sealer, "encode", encode)
        for n in range(30):
            connection.execute("REPLACE INTO t VALUES (?, randomblob(900))", (n,))
            if n % 7 == 3:
                connection.set_busy_timeout(0)
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        go_on.set()
        database.assert_replica_equals_now()
        connection.execute("DELETE FROM t WHERE id % 2")
    database.assert_replica_equals_file()


def _retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back off for milliseconds only."""
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_REFUSED_S", 0.001)
    monkeypatch.setattr("walship.replica.uploader.BACKOFF_LONGEST_S", 0.01)


class _FullDisk:
    """Makes the spool fail as a full disk does, while in force."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        append = Spool._append

        def failing(spool: Spool, *args: object, **keywords: object) -> None:
            if self.full:
                raise SpoolError("cannot write the spool: No space left on device")
            append(spool, *args, **keywords)  # type: ignore[arg-type]

        monkeypatch.setattr(Spool, "_append", failing)


@pytest.mark.parametrize("way", sorted(DESTROYERS))
def test_a_full_spool_lets_the_wal_go_and_copies_later(
    way: str, tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``spool-full: resync``: the application goes on, and the replica is equal again later."""
    _retry_at_once(monkeypatch)
    disk = _FullDisk(monkeypatch)
    database = Database(tmp_path, spool_full="resync")
    connection = _prepared(database, stores)
    _commit(connection, 1)
    disk.full = True
    _commit(connection, 2)
    if way == "delete":
        connection.close(True)
        disk.full = False
        connection = database.connect(shutdown_sync_timeout="0s", open_timeout="0s")
    else:
        connection = DESTROYERS[way](database, connection)
    _commit(connection, 3)
    disk.full = False
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()


@pytest.mark.parametrize("policy", ["fail", "block"])
def test_a_full_spool_can_fail_the_transaction(
    policy: str, tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``spool-full: fail`` and ``block``: the statement fails with the reason, nothing is lost."""
    _retry_at_once(monkeypatch)
    disk = _FullDisk(monkeypatch)
    database = Database(tmp_path, spool_full=policy, spool_full_timeout="0.2s")
    connection = _prepared(database, stores)
    _commit(connection, 1)
    connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    before = dump(database.path)
    disk.full = True
    with pytest.raises(walship.SpoolError, match="No space left"):
        _commit(connection, 2)
    assert not connection.in_transaction
    assert dump(database.path) == before
    disk.full = False
    _commit(connection, 2)
    stores.release()
    database.sync()
    connection.close(True)
    database.assert_replica_equals_file()
    assert len(database.full_copies()) <= 1


@pytest.mark.parametrize("policy", ["fail", "block"])
def test_a_full_spool_of_a_database_that_is_refused(
    policy: str, tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once nothing is shipped any more nothing makes room: the gate tells the reason for that."""
    disk = _FullDisk(monkeypatch)
    database = Database(tmp_path, spool_full=policy, spool_full_timeout="1h")
    connection = _prepared(database, stores)
    _commit(connection, 1)
    connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    disk.full = True
    database.engine()._refuse(walship.ContinuityError("somebody went on"), everywhere=False)
    with pytest.raises(walship.RefusedError, match="somebody went on"):
        _commit(connection, 2)
    assert not connection.in_transaction
    disk.full = False
    stores.release()
    connection.close(True)


@pytest.mark.parametrize("before, after", [(0.4, 0.0), (0.0, 0.4), (0.25, 0.25)])
def test_an_unreliable_store(
    before: float, after: float, tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that fail before or after their effect are repeated until all is there, once."""
    _retry_at_once(monkeypatch)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        database.sync()
        stores.fail(before, after)
        for n in range(60):
            _commit(connection, n)
            if n % 10 == 9:
                database.sync()
            if n % 17 == 0:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        stores.fail(0.0, 0.0)
        database.sync()
    faults = stores.last.faults
    assert faults["before"] + faults["after"] > 3
    database.assert_replica_equals_file()


def test_a_full_spool_is_sent_although_there_is_more(
    tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that fill the spool are sent; what came after them follows, and all is there."""
    _retry_at_once(monkeypatch)
    database = Database(tmp_path, max_spool_bytes=3_000, sync_interval=3600.0)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        database.sync()
        connection.execute("INSERT INTO t VALUES (1, randomblob(9000))")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("INSERT INTO t VALUES (2, randomblob(9000))")
        assert database.engine().status().pending_bytes > 3_000
        database.sync()
    database.assert_replica_equals_file()


def test_a_sync_beside_a_gate_ships_what_the_wal_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between SQLite's reset of the wal-index and the gate a sync ships what was committed."""
    database = Database(tmp_path, sync_interval=3600.0)
    at_the_gate, may_pass = threading.Event(), threading.Event()
    gate_discard = Capture.gate_discard

    def held(*args: object) -> None:
        at_the_gate.set()
        assert may_pass.wait(WAIT_S)
        gate_discard(*args)  # type: ignore[arg-type]

    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("INSERT INTO t VALUES (1, NULL)")
        database.sync()
        connection.execute("INSERT INTO t VALUES (2, NULL)")
        monkeypatch.setattr(Capture, "gate_discard", held)
        truncate = "PRAGMA wal_checkpoint(TRUNCATE)"
        other = threading.Thread(target=lambda: connection.execute(truncate).fetchall())
        other.start()
        assert at_the_gate.wait(WAIT_S)
        try:
            database.sync()
            restored = apsw.Connection(str(database.restore()))
            assert restored.execute("SELECT max(id) FROM t").get == 2
            restored.close()
        finally:
            may_pass.set()
            other.join()
        database.assert_replica_equals_now()


def test_a_restart_that_waits_at_the_gate(tmp_path: Path, stores: Stores) -> None:
    """SQLite has begun to start the WAL over, and waits for the gate: what the WAL holds is still
    seen, although the wal-index says that it is empty and nothing of it was sealed before."""
    database = Database(tmp_path)
    first = _prepared(database, stores)
    other = database.connect()
    first.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    capture = database.engine().capture
    with capture.mutex:  # nobody seals, and the gate waits
        _commit(first, 1)
        assert capture.state.position is not None
        assert capture.state.position.frame == 0
        first.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        thread = threading.Thread(target=_commit, args=(other, 2))
        thread.start()
        published = database.engine()._port.published
        _wait_for(lambda: (found := published()) is not None and found.mx_frame == 0)
        before = capture.state.txid
        capture.drain()
        assert capture.state.pieces
        assert capture.state.position.frame > 0
        assert capture.state.txid == before
    thread.join()
    stores.release()
    database.assert_replica_equals_now()
    other.close()
    first.close()
    database.assert_replica_equals_file()


def test_a_refused_gate_in_another_process(
    tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that could seal nothing has stopped SQLite half way; whoever looks next sees what the
    WAL holds, without knowing of that gate."""
    database = Database(tmp_path, spool_full="fail")
    first = _prepared(database, stores)
    first.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    capture = database.engine().capture
    with capture.mutex:
        _commit(first, 1)
        first.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        with monkeypatch.context() as full:
            full.setattr(Spool, "add_piece", _refuse)
            with pytest.raises(SpoolError):
                _commit(first, 2)
        assert not capture.state.pieces
        capture._known_end = None
        capture.drain()
        assert capture.state.pieces
    stores.release()
    database.assert_replica_equals_now()
    assert len({database.sync() for _ in range(5)}) == 1, "the same is shipped again and again"
    first.close()
    database.assert_replica_equals_file()


def _refuse(*_: object) -> None:
    raise SpoolError("no room, on purpose")
