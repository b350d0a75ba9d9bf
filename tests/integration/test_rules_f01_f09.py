"""SQLite's own rules F1 to F9: errors out of the VFS, and the bell."""

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
from support.databases import Database, Stores, dump
from support.killing import run_writer
from walship.replica.check import integrity_check
from walship.replica.engine import Engine
from walship.replica.uploader import Uploader
from walship.vfs import files
from walship.vfs.files import MainFile, WalFile
from walship.vfs.replicating import ReplicatingVFS

_WRITE = files._write
_TRUNCATE = files._truncate
_SYNC = files.sync_descriptor

ERRORS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("on purpose"),
    "OSError": lambda: OSError(5, "on purpose"),
    "MemoryError": MemoryError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(3),
    "BusyError": lambda: apsw.BusyError("on purpose"),
    "SQLError": lambda: apsw.SQLError("on purpose"),
    "IOError": lambda: apsw.IOError("on purpose"),
    "FullError": lambda: apsw.FullError("on purpose"),
    "SpoolError": lambda: walship.SpoolError("on purpose"),
}


class Trap:
    """Raises once where a callback does its work.

    Attributes:
        skip: how often the place is passed first; None: the trap is off.
        sprung: whether it raised.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
        self.skip: int | None = None
        self.sprung = False
        self.error: Callable[[], BaseException] = KeyboardInterrupt
        if place == "sync":
            monkeypatch.setattr(files, "sync_descriptor", self._sync)
        elif place == "truncate":
            monkeypatch.setattr(files, "_truncate", self._truncate)
        elif place == "gate":
            gate = Engine.gate_restart

            def gated(engine: Engine, *args: Any) -> None:
                self._pass()
                gate(engine, *args)

            monkeypatch.setattr(Engine, "gate_restart", gated)
        else:
            self._place = place
            monkeypatch.setattr(files, "_write", self._write)

    def _pass(self) -> None:
        if self.skip is None:
            return
        if self.skip == 0:
            self.skip, self.sprung = None, True
            raise self.error()
        self.skip -= 1

    def _write(self, file: Any, data: bytes, offset: int) -> None:
        what = "frame header" if len(data) == 24 else "page" if offset else "wal header"
        if isinstance(file, WalFile) and what == self._place:
            self._pass()
        _WRITE(file, data, offset)

    def _truncate(self, file: Any, size: int) -> None:
        self._pass()
        _TRUNCATE(file, size)

    def _sync(self, fd: int) -> None:
        self._pass()
        _SYNC(fd)


def _prepare(connection: walship.Connection) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a, b BLOB)")
    connection.execute("CREATE INDEX i ON t (a)")
    with connection:
        for n in range(120):
            connection.execute("INSERT INTO t (a, b) VALUES (?, randomblob(800))", (n % 9,))


@pytest.mark.parametrize("error", sorted(ERRORS))
@pytest.mark.parametrize("place", ["wal header", "frame header", "page", "sync", "gate"])
@pytest.mark.parametrize("spill", [False, True], ids=["commit", "spill"])
def test_f1_whatever_fails_in_a_callback_rolls_back(
    spill: bool, place: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1: any exception in a WAL callback, in a spill too, rolls the whole transaction back."""
    trap = Trap(monkeypatch, place)
    database = Database(tmp_path, page_size=1024)
    with database.opened() as connection:
        _prepare(connection)
        database.sync()
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        before = dump(database.path)
        if spill:
            connection.execute("PRAGMA cache_size = 5")
        trap.error, trap.skip = ERRORS[error], 0
        if spill and place in ("frame header", "page"):
            trap.skip = 40
        raised: list[BaseException] = []
        _ignoring_errors(connection, raised)
        assert trap.sprung, "nothing was tested"
        assert raised, "nobody was told"
        first = raised[0]
        assert isinstance(first, (apsw.IOError, apsw.FullError)), repr(first)
        if error == "KeyboardInterrupt":
            assert isinstance(first, KeyboardInterrupt)
        assert not connection.in_transaction
        assert dump(database.path) == before
        assert connection.execute("PRAGMA integrity_check").get == "ok"
        connection.execute("UPDATE t SET a = a + 1 WHERE id < 60")
        assert connection.execute("PRAGMA integrity_check").get == "ok"
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def _ignoring_errors(connection: walship.Connection, raised: list[BaseException]) -> None:
    """A transaction of a program that ignores every error and commits in the end."""
    for statement in (
        "BEGIN",
        "UPDATE t SET b = randomblob(700), a = a + 1 WHERE id % 2",
        "UPDATE t SET b = randomblob(900), a = a + 2",
        "COMMIT",
    ):
        try:
            connection.execute(statement)
        except (apsw.Error, KeyboardInterrupt) as error:
            raised.append(error)
            if not connection.in_transaction:
                return  # the rest would be transactions of their own


@pytest.mark.parametrize("error", sorted(ERRORS))
def test_f1_a_failing_truncate(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1: an exception while the WAL is truncated fails the checkpoint and harms nothing."""
    trap = Trap(monkeypatch, "truncate")
    database = Database(tmp_path, page_size=1024)
    with database.opened() as connection:
        _prepare(connection)
        before = dump(database.path)
        trap.error, trap.skip = ERRORS[error], 0
        with pytest.raises((apsw.IOError, apsw.FullError)):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert trap.sprung
        assert dump(database.path) == before
        connection.execute("DELETE FROM t WHERE a = 3")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, apsw.BusyError, OSError])
def test_f2_the_bell_never_raises(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F2: whatever goes wrong while the bell is rung, the commit succeeds and is seen by others."""
    database = Database(tmp_path)
    with database.opened() as connection, database.opened() as other:
        connection.execute("CREATE TABLE t (x)")
        database.sync()

        def broken(_: Uploader) -> None:
            monkeypatch.undo()
            raise error("on purpose")

        monkeypatch.setattr(Uploader, "ring", broken)
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("COMMIT")
        assert not connection.in_transaction
        if error is KeyboardInterrupt:
            # It must not be swallowed either: it comes again, outside of SQLite.
            with pytest.raises(KeyboardInterrupt):
                for _ in range(1000):
                    time.sleep(0.01)
        connection.execute("INSERT INTO t VALUES (2)")
        assert other.execute("SELECT count(*) FROM t").get == 2
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f2_the_bell_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F2: with the drain mutex held by somebody and the store away, commits go on."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        stores.block(("put",))
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with database.engine().capture.mutex:
                held.set()
                done.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(10)
        for n in range(200):
            connection.execute("INSERT INTO t VALUES (?)", (n,))
        done.set()
        thread.join()
        stores.release()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("spill", [False, True], ids=["small", "spilled"])
def test_f3_a_refusal_rolls_back_cleanly(spill: bool, tmp_path: Path) -> None:
    """F3: a refused commit fails with the reason, is rolled back, and reads go on."""
    database = Database(tmp_path, page_size=1024)
    with database.opened() as connection:
        _prepare(connection)
        database.sync()
        before = dump(database.path)
        engine = database.engine()
        engine.refusal = walship.FencedError("another writer owns the replica")
        if spill:
            connection.execute("PRAGMA cache_size = 5")
        with pytest.raises(walship.FencedError, match="another writer"), connection:
            connection.execute("UPDATE t SET b = randomblob(900)")
        assert not connection.in_transaction
        assert dump(database.path) == before
        assert connection.execute("SELECT count(*) FROM t").get == 120
        engine.refusal = None
        connection.execute("DELETE FROM t WHERE a = 1")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f4_a_wait_happens_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F4: while one thread waits in ``sync``, others write and the WAL is restarted."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path)
    with database.opened() as connection, database.opened() as other:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        stores.block(("put",))
        connection.execute("INSERT INTO t VALUES (1)")
        waiter = threading.Thread(target=database.sync)
        waiter.start()
        other.set_busy_timeout(0)
        for n in range(50):
            other.execute("INSERT INTO t VALUES (?)", (n,))
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert os.path.getsize(f"{database.path}-wal") == 0
        assert waiter.is_alive()
        stores.release()
        waiter.join(30)
        assert not waiter.is_alive()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("how", ["execute", "executemany", "commit", "with"])
def test_f5_errors_keep_their_type(how: str, tmp_path: Path) -> None:
    """F5: our own exception comes out of execute, executemany, COMMIT and ``with`` as it is."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.engine().refusal = walship.FencedError("stop")
        with pytest.raises(walship.FencedError, match="stop"):
            if how == "execute":
                connection.execute("INSERT INTO t VALUES (1)")
            elif how == "executemany":
                connection.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)])
            elif how == "commit":
                connection.execute("BEGIN; INSERT INTO t VALUES (1); COMMIT")
            else:
                with connection:
                    connection.execute("INSERT INTO t VALUES (1)")
        assert not connection.in_transaction
        database.engine().refusal = None
    database.assert_replica_equals_file()


def test_f6_sleeping_lets_other_threads_run() -> None:
    """F6: the VFS sleeps without the GIL: another thread runs meanwhile."""
    walship.configure("/nowhere/f6.db", "/nowhere/replica")
    vfs = ReplicatingVFS("walship-f6")
    ran = threading.Event()
    threading.Timer(0.01, ran.set).start()
    assert vfs.xSleep(300_000) == 300_000
    assert ran.is_set()
    vfs.unregister()


_RINGING: dict[str, str] = {
    "autocommit": "INSERT INTO t VALUES (1)",
    "immediate": "BEGIN IMMEDIATE; INSERT INTO t VALUES (1); COMMIT",
    "savepoint": "SAVEPOINT a; INSERT INTO t VALUES (1); RELEASE a",
    "vacuum": "VACUUM",
    "user_version": "PRAGMA user_version = 7",
    "returning": "INSERT INTO t VALUES (1) RETURNING x",
}


@pytest.mark.parametrize("name", sorted(_RINGING))
def test_f7_the_bell_rings_for_every_commit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: each kind of write transaction rings once, and all that it wrote arrives."""
    rings = 0
    control = MainFile.xFileControl

    def counting(file: MainFile, op: int, ptr: int) -> bool:
        nonlocal rings
        rings += op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO
        return control(file, op, ptr)

    monkeypatch.setattr(MainFile, "xFileControl", counting)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (0)")
        rings = 0
        connection.execute(_RINGING[name]).fetchall()
        assert rings == 1
        connection.execute("BEGIN; INSERT INTO t VALUES (2); ROLLBACK")
        connection.execute("CREATE TEMP TABLE u (x)")
        connection.execute("INSERT INTO u VALUES (2)")
        assert rings == 1
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f7_a_missed_bell_costs_one_tick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F7: the bell is a hint: a commit whose bell was lost is shipped by the next look."""
    monkeypatch.setattr("walship.replica.uploader.TICK_S", 0.05)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        txid = database.sync()
        monkeypatch.setattr(Uploader, "ring", lambda _: None)
        connection.execute("INSERT INTO t VALUES (1)")
        for _ in range(200):
            if walship.replication(connection).status().replicated_txid > txid:
                break
            threading.Event().wait(0.05)
        assert walship.replication(connection).status().replicated_txid == txid + 1
    database.assert_replica_equals_file()


def test_f8_at_the_bell_the_commit_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8: when the bell rings the wal-index has the commit and the write lock is free."""
    database = Database(tmp_path)
    with database.opened() as connection, database.opened() as other:
        connection.execute("CREATE TABLE t (x)")
        other.set_busy_timeout(0)
        seen: list[Any] = []
        ring = Uploader.ring

        def ringing(uploader: Uploader) -> None:
            if not seen:
                seen.append(None)
                seen[0] = other.execute("SELECT count(*) FROM t").get
                other.execute("INSERT INTO t VALUES (2)")
            ring(uploader)

        monkeypatch.setattr(Uploader, "ring", ringing)
        database.sync()
        connection.execute("INSERT INTO t VALUES (1)")
        assert seen == [1]
    database.assert_replica_equals_file()


@pytest.mark.parametrize("point", ["wal page, after", "commit frame header, after"])
def test_f9_a_ghost_is_not_shipped(point: str, tmp_path: Path) -> None:
    """F9: the commit frame of a process that died before publishing it is not shipped as one."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("PRAGMA user_version = 1")
        database.sync()
    report = run_writer(database.path, database.replica, point=point, steps=8, hit=6)
    assert report.killed
    with database.opened() as connection:
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
    assert integrity_check(database.path, "full") == []


def test_f9_frames_behind_the_published_end_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F9: while a transaction is spilling, nothing of it is taken, however often one looks."""
    database = Database(tmp_path, page_size=1024)
    with database.opened() as connection:
        _prepare(connection)
        txid = database.sync()
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN")
        connection.execute("UPDATE t SET b = randomblob(900)")
        for _ in range(3):
            assert database.sync() == txid
        connection.execute("ROLLBACK")
        connection.execute("DELETE FROM t WHERE a = 2")
        assert database.sync() == txid + 1
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
