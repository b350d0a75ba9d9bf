"""SQLite's own rules F19 to F27: spills, locks, processes, power cuts, snapshot reads."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
from support.databases import Database, Stores, dump
from walship.replica.clock import SystemClock
from walship.replica.election import InUseError
from walship.replica.frames import WalReader
from walship.replica.sealing import Sealer
from walship.replica.spool import Fingerprint, Spool, read_state
from walship.replica.sqlite import SqlitePort


def _run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of its own; its arguments are in ``sys.argv``."""
    # Files, not pipes: a grandchild that hangs would keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            timeout=40,
            check=False,
        )
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, out.read(), err.read())


def test_f19_frames_rewritten_inside_a_transaction(tmp_path: Path) -> None:
    """F19: a spilled transaction rewrites its own frames; looking meanwhile ships nothing of it."""
    database = Database(tmp_path, page_size=512)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b)")
        with connection:
            for n in range(200):
                connection.execute("INSERT INTO t VALUES (?, randomblob(300))", (n,))
        txid = database.sync()
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN")
        for _ in range(3):
            connection.execute("UPDATE t SET b = randomblob(310)")
            connection.execute("SAVEPOINT s")
            connection.execute("UPDATE t SET b = randomblob(320) WHERE id < 90")
            connection.execute("ROLLBACK TO s")
            assert database.sync() == txid
        connection.execute("COMMIT")
        assert database.sync() == txid + 1
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f20_the_standard_module_is_kept_out(tmp_path: Path) -> None:
    """F20: ``sqlite3.connect`` on a database that is replicated here is refused with a reason."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        for name, uri in ((str(database.path), False), (f"file:{database.path}?mode=rw", True)):
            with pytest.raises(walship.RefusedError, match="sqlite3"):
                sqlite3.connect(name, uri=uri)
        sqlite3.connect(tmp_path / "other.db").close()
    database.assert_replica_equals_file()


def test_f20_a_file_open_in_the_standard_module_is_refused(tmp_path: Path) -> None:
    """F20: a database that the standard module has open in this process is not opened."""
    database = Database(tmp_path)
    other = sqlite3.connect(database.path)
    other.execute("CREATE TABLE t (x)")
    with pytest.raises(walship.RefusedError, match="sqlite3"):
        database.connect()
    other.close()
    with database.opened():
        pass
    database.assert_replica_equals_file()


def test_f20_leftovers_of_closed_connections_are_not_the_standard_module(tmp_path: Path) -> None:
    """F20: while a connection is open SQLite keeps the descriptors of those that were closed."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
    plain = apsw.Connection(str(database.path), vfs="unix")
    for _ in range(3):
        other = apsw.Connection(str(database.path), vfs="unix")
        for reader in (plain, other):
            reader.execute("SELECT * FROM t").fetchall()
        other.close()
    elsewhere = sqlite3.connect(tmp_path / "other.db")
    with database.opened() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    plain.close()
    elsewhere.close()
    database.assert_replica_equals_file()


def test_f20_one_that_another_thread_has_open_is_refused(tmp_path: Path) -> None:
    """F20: a connection of the standard module that cannot be asked may be on the file."""
    database = Database(tmp_path)
    opened, done = threading.Event(), threading.Event()

    def use() -> None:
        other = sqlite3.connect(database.path)
        other.row_factory = sqlite3.Row
        other.execute("CREATE TABLE t (x)")
        opened.set()
        done.wait()
        other.close()

    thread = threading.Thread(target=use)
    thread.start()
    opened.wait()
    try:
        with pytest.raises(walship.RefusedError, match="sqlite3"):
            database.connect()
    finally:
        done.set()
        thread.join()
    with database.opened():
        pass


_TRY_TO_WRITE = """
    import sqlite3, sys
    db = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        print("got it")
    except sqlite3.OperationalError as error:
        print(error)
    """


def test_f20_nothing_we_do_drops_the_locks(tmp_path: Path) -> None:
    """F20: after first copy, syncs and status the write lock of a transaction still holds."""
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES (1)")
        database.sync()
        database.demand_full_copy()
        walship.replication(connection).status()
        database.engine().capture.record.has_content()
        assert "locked" in _run(_TRY_TO_WRITE, database.path).stdout
        connection.execute("COMMIT")
        database.sync()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES (2)")
        assert "locked" in _run(_TRY_TO_WRITE, database.path).stdout
        connection.execute("ROLLBACK")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f20_lost_locks_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F20: when something in this process drops SQLite's locks, commits are refused, loudly."""
    monkeypatch.setattr("walship.replica.uploader.TICK_S", 0.02)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        with database.path.open("rb"):
            pass
        for _ in range(300):
            if walship.replication(connection).status().state == "stopped":
                break
            threading.Event().wait(0.02)
        status = walship.replication(connection).status()
        assert status.state == "stopped"
        assert status.last_error is not None
        assert "lock" in status.last_error
        with pytest.raises(walship.RefusedError, match="lock"):
            connection.execute("INSERT INTO t VALUES (1)")


def test_f21_the_spool_lock_holds_within_the_process(tmp_path: Path) -> None:
    """F21: a second opener of the spool in this process is refused, and frees nothing."""
    spool = Spool.open(tmp_path / "state", SystemClock())
    assert spool.alone
    spool.admit()
    with pytest.raises(InUseError):
        Spool.open(tmp_path / "state", SystemClock())
    program = """
        import sys
        from pathlib import Path
        from walship.replica.clock import SystemClock
        from walship.replica.spool import Spool
        print("alone" if Spool.open(Path(sys.argv[1]), SystemClock()).alone else "beside another")
        """
    assert _run(program, tmp_path / "state").stdout == "beside another\n"
    spool.close()
    assert _run(program, tmp_path / "state").stdout == "alone\n"


_FORK = """
    import os, signal, sys, apsw, walship
    path, replica, state = sys.argv[1:4]
    db = walship.connect(path, {"path": replica, "sync_interval": 0.0})
    db.execute("CREATE TABLE t (x)")
    if state == "transaction":
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO t VALUES (1)")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 0
        try:
            db.execute("INSERT INTO t VALUES (99)")
            if db.in_transaction:
                db.execute("COMMIT")
            code = 1
        except (apsw.Error, walship.ReplicaError):
            pass
        try:
            walship.connect(path, replica).execute("INSERT INTO t VALUES (50)")
            code += 2
        except (apsw.Error, walship.ReplicaError):
            pass
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if state == "transaction":
        db.execute("COMMIT")
    for n in range(5):
        db.execute("INSERT INTO t VALUES (?)", (n,))
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    walship.replication(db).sync(20)
    db.close()
    print("closed")
    """


@pytest.mark.parametrize("state", ["idle", "transaction"])
def test_f22_fork(state: str, tmp_path: Path) -> None:
    """F22: a forked child can write by new connections only, unless one was in a transaction."""
    database = Database(tmp_path)
    done = _run(_FORK, database.path, database.replica, state)
    code = 2 if state == "idle" else 0
    assert done.stdout == f"{code}\nclosed\n", done.stderr
    database.assert_replica_equals_file()
    assert len(dump(database.path)) == 7


_FORK_AT_WORK = """
    import os, signal, sys, time, walship
    path, replica = sys.argv[1:3]
    db = walship.connect(path, {"path": replica, "sync_interval": 0.0})
    db.execute("CREATE TABLE t (x)")
    codes = set()
    for n in range(25):
        walship.replication(db)._engine.capture.record.require_full_copy("the test wants one")
        db.execute("INSERT INTO t VALUES (?)", (n,))
        time.sleep(n / 5000)
        child = os.fork()
        if child == 0:
            try:
                child_db = walship.connect(path, replica)
                child_db.execute("INSERT INTO t VALUES (?)", (1000 + n,))
                os._exit(0)
            finally:
                os._exit(1)
        # The child may hang before it can set an alarm of its own.
        for _ in range(800):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.01)
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        codes.add(os.waitstatus_to_exitcode(status))
        if codes != {0}:
            break
    print(codes)
    walship.replication(db).sync(20)
    db.close()
    print("closed")
    """


def test_f22_fork_beside_the_first_copy(tmp_path: Path) -> None:
    """F22: a child forked while the uploader is at work inside SQLite does not hang."""
    database = Database(tmp_path)
    done = _run(_FORK_AT_WORK, database.path, database.replica)
    assert done.stdout == "{0}\nclosed\n", done.stderr
    database.assert_replica_equals_file()


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise ValueError('on purpose')"])
def test_f23_the_end_of_the_program_drains(end: str, tmp_path: Path) -> None:
    """F23: a program that just ends, its connection never closed, has shipped everything."""
    database = Database(tmp_path)
    program = f"""
        import sys, walship
        db = walship.connect(sys.argv[1], {{"path": sys.argv[2], "sync_interval": 3600.0}})
        db.execute("CREATE TABLE t (x)")
        for n in range(20):
            db.execute("INSERT INTO t VALUES (?)", (n,))
        {end}
        """
    done = _run(program, database.path, database.replica)
    assert "app.db" not in done.stderr, done.stderr
    assert len(dump(database.restore())) == 21
    with database.opened() as connection:
        connection.execute("INSERT INTO t VALUES (77)")
    database.assert_replica_equals_file()
    assert len(database.full_copies()) <= 1


def test_f24_the_fingerprint_is_of_the_closed_file(tmp_path: Path) -> None:
    """F24: after a clean close the record holds the main file's identity, unchanged since."""
    database = Database(tmp_path)
    for n in range(5):
        with database.opened() as connection:
            connection.execute(f"PRAGMA user_version = {n}")
        state = read_state(tmp_path / ".app.db-walship")
        assert state is not None
        assert state.fingerprint == Fingerprint.of(database.path)


def test_f24_a_foreign_commit_of_the_same_size_is_seen(tmp_path: Path) -> None:
    """F24: a change in place by another program right after the close is not taken for ours."""
    database = Database(tmp_path)
    for n in range(4):
        with database.opened() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
            connection.execute("DELETE FROM t")
            connection.execute("INSERT INTO t VALUES (?)", (n,))
        other = sqlite3.connect(database.path)
        other.execute("UPDATE t SET x = x + 100")
        other.commit()
        other.close()
        with database.opened():
            database.assert_replica_equals_now()
        database.assert_replica_equals_file()
        assert ("t", 1, n + 100) in dump(database.restore())


def test_f25_the_wal_is_on_disk_before_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F25: what is sealed or sent was synced in the WAL first, whatever ``synchronous`` says."""
    events: list[str] = []
    for owner, name, event in (
        (WalReader, "sync", "sync"),
        (Spool, "add_segment", "seal"),
        (Spool, "add_piece", "seal"),
    ):
        original = getattr(owner, name)

        def noting(*args: Any, _event: str = event, _call: Any = original, **more: Any) -> Any:
            events.append(_event)
            return _call(*args, **more)

        monkeypatch.setattr(owner, name, noting)
    database = Database(tmp_path)
    with database.opened() as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        for n in range(12):
            events.clear()
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            if n % 4 == 3:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                database.sync()
            else:
                database.sync()
                assert events[:2] == ["sync", "seal"]
    database.assert_replica_equals_file()


def test_f26_reads_the_wal_only_under_a_mark_that_protects_it(tmp_path: Path) -> None:
    """F26: with everything backfilled a view reads the main file alone, else the WAL as well."""
    path = tmp_path / "plain.db"
    connection = apsw.Connection(str(path), vfs="unix")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    port = SqlitePort(str(path))
    seen: list[int] = []

    def observe(mx_frame: int, is_still: Callable[[], bool] | None) -> bool:
        seen.append(mx_frame)
        return is_still is None or is_still()

    with port.read_view(observe) as view:
        assert view is not None
        assert not view.main_only
        assert view.mx_frame == seen[-1] > 0
        connection.execute("INSERT INTO t VALUES (1)")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        published = port.published()
        assert published is not None
        assert published.n_backfill <= view.mx_frame
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    with port.read_view(observe) as view:
        assert view is not None
        assert view.main_only
        before = view.read_main(0, 4096)
        connection.execute("INSERT INTO t VALUES (2)")
        connection.execute("INSERT INTO t VALUES (3)")
        assert view.read_main(0, 4096) == before
    port.close()
    connection.close(True)


def test_f26_a_mark_between_two_commits(tmp_path: Path) -> None:
    """F26: a commit while the mark is taken spoils it; then writers are kept out, at last."""
    path = tmp_path / "plain.db"
    connection = apsw.Connection(str(path), vfs="unix")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    port = SqlitePort(str(path))
    undisturbed: list[bool] = []

    def observe(mx_frame: int, is_still: Callable[[], bool] | None) -> bool:
        undisturbed.append(is_still is not None)
        try:
            connection.execute("INSERT INTO t VALUES (randomblob(5000))")
        except apsw.BusyError:
            assert is_still is None
            return True
        assert is_still is not None
        assert not is_still()
        return False

    with port.read_view(observe) as view:
        assert view is not None
        published = port.published()
        assert published is not None
        assert published.mx_frame == view.mx_frame
    assert undisturbed == [True] * 10 + [False]
    connection.execute("INSERT INTO t VALUES (1)")
    port.close()
    connection.close(True)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("wal", ["none", "empty", "reset", "backfilled", "full"])
def test_f26_a_copy_beside_an_open_transaction(wal: str, spilled: bool, tmp_path: Path) -> None:
    """F26: a full copy waits for no transaction, and what that commits later is not missed."""
    database = Database(tmp_path, page_size=512)
    if wal == "none":
        with database.opened() as connection:
            connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b)")
    with database.opened() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, b)")
        connection.execute("REPLACE INTO t VALUES (0, randomblob(3000))")
        txid = database.sync()
        modes = {"empty": "TRUNCATE", "reset": "RESTART", "backfilled": "PASSIVE"}
        if wal in modes:
            connection.execute(f"PRAGMA wal_checkpoint({modes[wal]})").fetchall()
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("REPLACE INTO t VALUES (1, randomblob(?))", (9000 if spilled else 1,))
        database.demand_full_copy()
        assert database.sync() == txid + 1
        connection.execute("COMMIT")
        database.assert_replica_equals_now()
        connection.execute("REPLACE INTO t VALUES (0, randomblob(3000))")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_f26_a_first_copy_locks_nobody_out(tmp_path: Path) -> None:
    """F26: a program without a busy timeout meets no lock of ours while the first copy is made."""
    for n in range(20):
        database = Database(tmp_path, f"{n}.db", busy_timeout=0)
        with database.opened() as connection:
            for m in range(5):
                connection.execute(f"CREATE TABLE t{m} (x)")
        database.assert_replica_equals_file()


@pytest.mark.parametrize("backfilled", [False, True])
def test_f26_a_copy_beside_writers(
    backfilled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F26: writers that commit and restart the WAL while pages are copied do not spoil the copy."""
    database = Database(tmp_path, page_size=512, spool_full="resync")
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b)")
        for n in range(60):
            connection.execute("INSERT INTO t VALUES (?, randomblob(900))", (n,))
        database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("UPDATE t SET b = randomblob(910) WHERE id % 7 = 0")
        if backfilled:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        database.sync()
        encode = Sealer.encode
        reached, go_on = threading.Event(), threading.Event()

        def held(*args: Any) -> None:
            monkeypatch.setattr(Sealer, "encode", encode)
            reached.set()
            assert go_on.wait(20)
            encode(*args)

        monkeypatch.setattr(Sealer, "encode", held)
        database.demand_full_copy()
        database.engine().uploader.request_sync()
        assert reached.wait(20)
        connection.set_busy_timeout(0)
        for n in range(40):
            connection.execute("UPDATE t SET b = randomblob(905) WHERE id = ?", (n,))
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        go_on.set()
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
    last = max(database.segments())
    for txid in range(1, int(last[:16], 16) + 1):
        database.restore_to(tmp_path / f"at-{txid}", txid=txid)


def test_f27_no_mark_is_held_for_a_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F27: while the first copy waits for the store, checkpoints complete and the WAL is reset."""
    stores = Stores(monkeypatch)
    stores.block(("put",))
    database = Database(tmp_path)
    with database.opened(shutdown_sync_timeout="0s") as connection:
        connection.execute("CREATE TABLE t (x)")
        for _ in range(1000):
            if stores.last.waiting:
                break
            threading.Event().wait(0.01)
        assert stores.last.waiting
        connection.set_busy_timeout(0)
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert os.path.getsize(f"{database.path}-wal") == 0
        stores.release()
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_locks_are_missed_only_where_there_were_some(tmp_path: Path) -> None:
    """A file that is not in WAL mode yet has none; in WAL mode it is noticed that they are gone."""
    path = tmp_path / "app.db"
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE t (x)")
    port = SqlitePort(str(path))
    assert port.published() is None
    assert not port.has_lost_locks()
    connection.pragma("journal_mode", "wal")
    connection.execute("INSERT INTO t VALUES (1)")
    assert port.published() is not None
    assert not port.has_lost_locks()
    path.open("rb").close()
    assert port.has_lost_locks() == hasattr(fcntl, "F_OFD_GETLK")
    port.close()
    port.release()
    connection.close(True)
