"""Large merges are made by a child process: what it may, what it costs, and how it can end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import WAIT_S, Database, Stores
from support.servers import S3Endpoint
from support.workers import Workers, workers
from walship.replica import child, compaction
from walship.replica.errors import ClosedError, FormatError, StoreError
from walship.replica.format.ltx import Header
from walship.replica.format.merge import MergeInput, merge
from walship.replica.listing import list_replica
from walship.replica.spool import state_directory
from walship.vfs.registry import registry


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def _wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _children(parent: int | None = None) -> list[int]:
    """Processes that merge for a process, this one unless told; those that have ended are not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                state, its_parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if b"walship.replica.merge_process" in line and int(its_parent) == (
                parent or os.getpid()
            ):
                assert state != "Z"
                found.append(int(entry.name))
    return found


def _fill(database: Database, db: apsw.Connection) -> int:
    """Enough for a large merge: a first copy, and a commit after it; returns the newest TXID."""
    db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
    db.execute("INSERT INTO t (pad) VALUES (randomblob(3000000))")
    database.sync()
    db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
    return database.sync()


class _Gate:
    """Holds children up where they ask for permission."""

    def __init__(self, database: Database) -> None:
        self.asked = threading.Event()
        self.open = threading.Event()
        self.error: Exception | None = None
        levels = database.engine()._levels
        self._prove = levels._prove
        self._ask = levels._may_go_on
        levels._may_go_on = self._may_go_on  # type: ignore[method-assign]

    def _may_go_on(self) -> None:
        if _children():
            self.asked.set()
            assert self.open.wait(WAIT_S)
            if self.error is not None:
                raise self.error
        self._ask()


@contextlib.contextmanager
def _snapshot(database: Database) -> Iterator[Callable[[], int]]:
    """A snapshot in the background; gives what waits for it."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(database.engine().tend, snapshot=True, timeout=WAIT_S)
        yield lambda: future.result(WAIT_S)


def _snapshots(database: Database) -> list[int]:
    return [segment.max_txid for segment in list_replica(database.store()) if segment.level == 9]


def _merging(database: Database) -> list[Path]:
    return list(state_directory(database.path).glob("*.merging"))


def _put(operation: str = "PUT") -> int:
    """Bytes put into directories (or got from there) so far, as this process counts."""
    return sum(
        each.n_bytes
        for each in registry.host.requests.operations()
        if (each.replica_type, each.operation) == ("file", operation)
    )


def test_large_merges_have_a_process(tmp_path: Path) -> None:
    """It is of low priority, asks before it puts, and what it asks of the store is counted."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        newest = _fill(database, db)
        gate = _Gate(database)
        with _snapshot(database) as done:
            assert gate.asked.wait(WAIT_S)
            (pid,) = _children()
            assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
            assert newest not in _snapshots(database)
            before = _put()
            gate.open.set()
            assert done() == newest
        assert _put() > before + 3_000_000
        assert newest in _snapshots(database)
        assert _children() == []
        assert _merging(database) == []
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_a_snapshot_is_made_of_the_database(tmp_path: Path) -> None:
    """Nothing is read from the store for it, and its bytes are those that a merge makes."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        newest = _fill(database, db)
        got = _put("GET")
        with _snapshot(database) as done:
            assert done() == newest
        assert _put("GET") == got
        database.engine()._levels.leave_database()
        (made,) = (s for s in list_replica(database.store()) if s.max_txid == newest and s.level)
        inputs = [database.store().get(s.key) for s in list_replica(database.store(), [0])]
        merged: list[bytes] = []
        merge(
            [MergeInput(each) for each in inputs],
            lambda parts: merged.extend(map(bytes, parts)),
            timestamp_ms=Header.unpack(database.store().get(made.key)).timestamp_ms,
        )
        assert database.store().get(made.key) == b"".join(merged)
        database.assert_replica_equals_now()


def test_a_snapshot_of_a_busy_database(tmp_path: Path) -> None:
    """It is of some TXID that the replica has, and all that follows can be restored from it."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        newest = _fill(database, db)
        stop = threading.Event()

        def write() -> None:
            with database.opened() as connection:
                while not stop.is_set():
                    connection.execute("INSERT INTO t (pad) VALUES (randomblob(2000))")
                    database.sync()

        got = _put("GET")
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            for _ in range(3):
                with _snapshot(database) as done:
                    txid = done()
                assert txid >= newest
                newest = txid
            stop.set()
            writing.result(WAIT_S)
        assert _put("GET") == got
        for path in (database.replica / "ltx" / "0").iterdir():
            if int(path.name[:16], 16) <= newest:
                path.unlink()
        for path in (database.replica / "ltx" / "9").iterdir():
            if path.name[17:33] != f"{newest:016x}":
                path.unlink()
        database.restore_to(tmp_path / "then.db", txid=newest)
        database.assert_replica_equals_now()


def test_a_snapshot_waits_for_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TXID that the replica does not have yet could still become another one."""
    stores = Stores(monkeypatch)
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        newest = _fill(database, db)
        levels, capture = database.engine()._levels, database.engine().capture
        acked: list[int] = []
        ask = levels._may_go_on

        def may_go_on() -> None:
            if _children():
                acked.append(capture.state.acked_txid)
            ask()

        monkeypatch.setattr(levels, "_may_go_on", may_go_on)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(levels.demand(snapshot=True).result, WAIT_S)
            stores.block(("put",))
            db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.engine().uploader.ring()
            _wait(lambda: _merging(database))
            _wait(lambda: acked or _merging(database)[0].stat().st_size > 3_000_000)
            time.sleep(0.3)
            stores.release()
            assert future.result(WAIT_S) == newest + 1
        assert acked == [newest + 1]
        database.assert_replica_equals_now()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_database_that_is_closed_is_left_alone(tmp_path: Path, when: str) -> None:
    """Its locks are gone before SQLite looks for some, and the snapshot is a merge."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        newest = _fill(database, db)
        levels = database.engine()._levels
        got = _put("GET")
        if when == "before":
            levels.leave_database()
        with _snapshot(database) as done:
            if when == "meanwhile":
                _wait(_children)
                (pid,) = _children()
                os.kill(pid, signal.SIGSTOP)
                levels.leave_database()
                assert _command_line(pid) == b""
            assert done() == newest
        assert _put("GET") > got + 3_000_000
        database.assert_replica_equals_now()
        levels.enter_database()
        db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        newest, got = database.sync(), _put("GET")
        with _snapshot(database) as done:
            assert done() == newest
        assert _put("GET") == got


def test_small_merges_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process would cost more than the merge."""
    started: list[object] = []
    monkeypatch.setattr(child.Child, "run", lambda self, *_, **__: started.append(self))
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
        for _ in range(5):
            db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.sync()
        assert database.engine().tend(snapshot=True, timeout=WAIT_S) == database.sync()
        assert not started
        database.assert_replica_equals_now()


def test_without_permission_nothing_is_put(tmp_path: Path) -> None:
    """A lease that cannot be proven any more: the child ends, and the replica is what it was."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        gate = _Gate(database)
        gate.error = StoreError("the lease is not proven", retryable=True)
        with _snapshot(database) as done:
            assert gate.asked.wait(WAIT_S)
            before = _snapshots(database)
            gate.open.set()
            with pytest.raises(StoreError, match="the lease is not proven"):
                done()
        assert _children() == []
        assert _snapshots(database) == before
        assert _merging(database) == []
        gate.error = None
        with _snapshot(database) as done:
            assert done() == database.sync()
        database.assert_replica_equals_now()


def test_one_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A child that is killed: the merge is made in this process, and that is said once."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        for _ in range(2):
            db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            gate = _Gate(database)
            with _snapshot(database) as done:
                assert gate.asked.wait(WAIT_S)
                (pid,) = _children()
                os.kill(pid, signal.SIGKILL)
                _wait(lambda: _command_line(pid) == b"")  # noqa: B023
                gate.open.set()
                assert done() == database.sync()
            database.assert_replica_equals_now()
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        (line,) = (text for text in warnings if "another process" in text)
        assert "its process ended with -9" in line
        assert _merging(database) == []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_no_process_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No interpreter where one should be: merges are made in this process."""
    monkeypatch.setattr(child, "_python", lambda: str(tmp_path / "python3"))
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        with _snapshot(database) as done:
            assert done() == database.sync()
        database.assert_replica_equals_now()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert ["No such file" in text for text in warnings] == [True]


def test_damage_is_damage(tmp_path: Path) -> None:
    """What is wrong with an input comes back from the child as what it is."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        database.engine()._levels.leave_database()
        with _snapshot(database) as done:
            done()
        newest = database.replica / "ltx" / "9"
        for path in newest.iterdir():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        with _snapshot(database) as done, pytest.raises(FormatError, match=r"\.ltx"):
            done()
        assert _children() == []
        assert _merging(database) == []


def test_the_last_close_ends_it(tmp_path: Path) -> None:
    """One that hangs delays no close; afterwards there is neither a process nor a file of it."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        before = _snapshots(database)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(database.engine().tend, snapshot=True, timeout=WAIT_S)
            _wait(_children)
            (pid,) = _children()
            os.kill(pid, signal.SIGSTOP)
            db.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.sync()
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            db.close()
            assert _children() == []
            with pytest.raises(ClosedError):
                future.result(WAIT_S)
    _wait(lambda: not _merging(database))
    assert _snapshots(database) == before
    database.assert_replica_equals_file()


def test_the_last_close_removes_the_wal_beside_a_snapshot(tmp_path: Path) -> None:
    """The read mark of the process that makes it would keep SQLite from doing so."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    with database.opened() as db:
        _fill(database, db)
        db.execute("INSERT INTO t (pad) VALUES (randomblob(40000000))")
        database.sync()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(database.engine().tend, snapshot=True, timeout=WAIT_S)
            _wait(lambda: any(path.stat().st_size for path in _merging(database)))
            (pid,) = _children()
            os.kill(pid, signal.SIGSTOP)
            assert _merging(database)[0].stat().st_size < 40_000_000, "it reads no more"
            db.close()
            assert not database.path.with_name("app.db-wal").exists()
            with pytest.raises(ClosedError):
                future.result(WAIT_S)
    assert _children() == []
    database.assert_replica_equals_file()


def test_a_killed_parent_takes_it_along(tmp_path: Path, fleet: Workers) -> None:
    """It ends with its parent, sends nothing any more, and its file goes with the next start."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    worker = fleet(database.path, database.replica, levels=[])
    worker.run(
        "insert(5, 1000000); sync(); insert(); sync()\n"
        "levels = engine()._levels\n"
        "asked = []\n"
        "levels._may_go_on = lambda real=levels._may_go_on: "
        "(asked.append(1), time.sleep(1000)) if levels._apart._child else real()\n"
        "threading.Thread(\n"
        "    target=lambda: engine().tend(snapshot=True, timeout=1000), daemon=True\n"
        ").start()\n"
        "while not asked: time.sleep(0.01)\n"
    )
    (pid,) = _children(worker.pid)
    assert _merging(database)
    before = _snapshots(database)
    worker.kill()
    _wait(lambda: _command_line(pid) == b"")
    assert _snapshots(database) == before
    with database.opened() as db:
        db.execute("CREATE TABLE more (x)")
        database.sync()
        assert _merging(database) == []


_FORK = """
levels = engine()._levels
asked, forked = threading.Event(), threading.Event()
def may_go_on(real=levels._may_go_on):
    if levels._apart._child is not None:
        asked.set(); forked.wait()
    real()
levels._may_go_on = may_go_on
outcomes = []
thread = threading.Thread(
    target=lambda: outcomes.append(engine().tend(snapshot=True, timeout=50)), daemon=True
)
thread.start()
asked.wait()
process = levels._apart._child._process
pipes = [process.stdin.fileno(), process.stdout.fileno()]
pid = os.fork()
if pid == 0:
    os._exit(sum(os.path.exists(f'/proc/self/fd/{fd}') for fd in pipes))
_, status = os.waitpid(pid, 0)
forked.set()
thread.join()
[status, *outcomes]
"""


def test_a_fork_beside_a_merge(tmp_path: Path, fleet: Workers) -> None:
    """F22: a forked child has no part in the merge, whose process would not notice its parent's end
    otherwise; the merge goes on."""
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    worker = fleet(database.path, database.replica, levels=[])
    txid = worker.run("insert(5, 1000000); sync(); insert(); sync()")
    assert worker.run(_FORK) == [0, txid]
    assert txid in _snapshots(database)
    assert worker.run("insert(); sync()")


def test_beside_a_bucket(tmp_path: Path, minio_server: S3Endpoint) -> None:
    """Credentials reach the child, and nobody can see them in the list of processes."""
    replica = minio_server.replica(minio_server.make_bucket(), "app")
    database = Database(tmp_path, levels=[], snapshot_interval="24h")
    db = walship.connect(database.path, replica, levels=[])
    try:
        newest = _fill(database, db)
        gate = _Gate(database)
        with _snapshot(database) as done:
            assert gate.asked.wait(WAIT_S)
            (pid,) = _children()
            for name in ("cmdline", "environ"):
                shown = Path(f"/proc/{pid}/{name}").read_bytes()
                assert replica["secret-access-key"].encode() not in shown
            before = registry.host.requests.requests()["PutObject"]
            gate.open.set()
            assert done() == newest
        store = database.engine()._store
        assert newest in [s.max_txid for s in list_replica(store) if s.level == 9]
        assert registry.host.requests.requests()["PutObject"] > before
    finally:
        db.close(True)


def test_children_have_to_wait_for_each_other() -> None:
    """Not more at once than there are slots; who waits is told when there is no need any more."""
    slots = child.Slots(1)

    def enough() -> None:
        raise ClosedError("closed")

    with slots.taken(enough), pytest.raises(ClosedError), slots.taken(enough):
        pass
    with slots.taken(enough):
        slots.forget()
        with slots.taken(enough):
            pass


def test_where_small_ends() -> None:
    """Both kinds are met here."""
    assert 100_000 < compaction._APART_BYTES < 3_000_000
