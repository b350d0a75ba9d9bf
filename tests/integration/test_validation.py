"""Verification in the background: when it runs, what it leaves, whom it tells, how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import walship
from support.databases import WAIT_S, Database
from support.servers import S3Endpoint
from support.workers import Workers, workers
from walship.replica.spool import state_directory
from walship.replica.verify import Verification, last_verified


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def _wait(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _damage(database: Database) -> None:
    newest = database.replica / "ltx" / "0" / max(database.segments())
    newest.write_bytes(newest.read_bytes()[:-20])


def _children() -> list[int]:
    """Processes that this one has started and that verify."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"verify_process" in line and int(parent) == os.getpid():
                found.append(int(entry.name))
    return found


def test_the_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With `validation_interval` the replica is verified again and again, and status says when."""
    caplog.set_level(logging.INFO, "walship.validation")
    database = Database(tmp_path)
    with database.opened(validation_interval=0.3) as db:
        db.execute("create table t(x)")
        replication = walship.replication(db)
        assert replication.status().last_verification is None
        _wait(lambda: replication.status().last_verification)
        status = replication.status()
        assert (status.last_verification, status.verification_problem) == ("sound", None)
        assert status.last_verified_txid == status.txid
        first = status.last_verified_ms
        assert first is not None
        for n in range(5):
            db.execute("insert into t values(?)", (n,))
        _wait(lambda: (replication.status().last_verified_ms or 0) > first)
    assert any("each is that of the database" in record.message for record in caplog.records)
    assert all(record.levelno == logging.INFO for record in caplog.records)
    _wait(lambda: not _children())
    assert not list(tmp_path.rglob("*.restore.tmp"))


def test_a_bad_replica_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damage: an error in the log, a status that is not ok, and a call for whoever wants one."""
    database = Database(tmp_path)
    told: list[Verification] = []
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        replication = walship.replication(db)

        def fail(found: Verification) -> None:
            raise ValueError("of no concern to the others")

        replication.on_verify_failed(fail)
        replication.on_verify_failed(told.append)
        assert replication.verify(WAIT_S).ok
        assert told == []
        sound = replication.status()
        assert sound.ok
        _damage(database)
        found = replication.verify(WAIT_S)
        assert (found.outcome, told) == ("damaged", [found])
        status = replication.status()
        assert not status.ok
        assert status.last_verification == "damaged"
        assert status.verification_problem == found.problem
        assert status.last_verified_ms == sound.last_verified_ms
        db.execute("insert into t values(1)")
    (line,) = [r for r in caplog.records if "the replica is not good" in r.message]
    assert line.levelno == logging.ERROR
    assert "walship reset" in line.message


def test_the_outcome_outlives_the_process(tmp_path: Path) -> None:
    """What was found is there after the next open, so that a restart does not begin anew."""
    database = Database(tmp_path)
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        assert walship.replication(db).verify(WAIT_S).ok
        before = walship.replication(db).status().last_verified_ms
    with database.opened(validation_interval=3600) as db:
        status = walship.replication(db).status()
        assert (status.last_verification, status.last_verified_ms) == ("sound", before)
        wait_s = database.engine().validation.due_in_s()
        assert 3600 - WAIT_S * 2 < wait_s <= 3600


def test_the_last_close_ends_it(tmp_path: Path) -> None:
    """A verification that holds its read mark neither delays the last close nor keeps the WAL."""
    database = Database(tmp_path)
    outcomes: list[object] = []
    with database.opened() as db:
        db.execute("create table t(x)")
        db.execute("insert into t values(zeroblob(100000000))")
        database.sync()
        replication = walship.replication(db)

        def run() -> None:
            try:
                outcomes.append(replication.verify())
            except walship.ClosedError as error:
                outcomes.append(error)

        while True:
            outcomes.clear()
            thread = threading.Thread(target=run)
            thread.start()
            _wait(_children)
            (child,) = _children()
            while not _has_open(child, database.path) and not outcomes:
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)
            if _has_open(child, database.path):
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)
            thread.join(WAIT_S)
    assert not Path(f"{database.path}-wal").exists()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert [type(each) for each in outcomes] == [walship.ClosedError]
    assert _children() == []


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a connection open on a database."""
    try:
        return f"{path}-shm" in [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False


def test_a_killed_parent_takes_it_along(tmp_path: Path, fleet: Workers) -> None:
    """The child of a process that is killed ends; its scratch file goes with the next start."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica, validation_interval=0.1)
    worker.run("insert(20, 5000); sync()")
    names: list[bytes] = []

    def child() -> int | None:
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"verify_process" in line and int(parent) == worker.pid:
                names.append(line)
                return int(entry.name)
        return None

    _wait(child)
    pid = child()
    worker.kill()
    if pid is not None:
        _wait(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))
    (state_directory(database.path) / "verify.00000000.restore.tmp").write_bytes(b"x")
    with database.opened():
        assert not list(state_directory(database.path).glob("*.restore.tmp"))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_what_keeps_it_from_being_done(tmp_path: Path) -> None:
    """No room, no interpreter, too little time: an outcome that says so, and no alarm."""
    database = Database(tmp_path)
    told: list[Verification] = []
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        replication = walship.replication(db)
        replication.on_verify_failed(told.append)
        found = replication.verify(0.01)
        assert (found.outcome, told) == ("failed", [])
        assert "0.01 s" in found.problem
        assert replication.status().ok
        assert replication.verify(WAIT_S).ok


def test_only_the_process_that_uploads_verifies(tmp_path: Path, fleet: Workers) -> None:
    """Of several processes one verifies; all of them know the outcome."""
    database = Database(tmp_path)
    some = fleet.many(3, database.path, database.replica, validation_interval=0.2)
    some[0].run("insert(5); sync()")
    for worker in some:
        worker.run("while status()['last_verification'] != 'sound': time.sleep(0.05)\n")
    verified = [worker for worker in some if "verified:" in worker.log()]
    assert [worker.run("engine().uploader.leads") for worker in verified] == [True]


def test_beside_a_bucket(tmp_path: Path, minio_server: S3Endpoint) -> None:
    """Credentials and the like reach the process that verifies."""
    replica = minio_server.replica(minio_server.make_bucket(), "app")
    db = walship.connect(tmp_path / "app.db", replica)
    try:
        db.execute("create table t(x)")
        walship.replication(db).sync(WAIT_S)
        found = walship.replication(db).verify(WAIT_S)
        assert (found.outcome, found.compared) == ("sound", True), found
    finally:
        db.close(True)
    found_again = last_verified(state_directory(tmp_path / "app.db"))
    assert found_again is not None
    assert found_again.outcome == "sound"


_FORK = """
outcomes = []
thread = threading.Thread(target=lambda: outcomes.append(walship.replication(db).verify(50)))
thread.start()
while not engine().validation._running: time.sleep(0.001)
time.sleep(0.2)
pid = os.fork()
if pid == 0:
    time.sleep(1)
    os._exit(0)
thread.join()
os.waitpid(pid, 0)
[(each.outcome, each.compared) for each in outcomes]
"""


def test_a_fork_beside_a_verification(tmp_path: Path, fleet: Workers) -> None:
    """F22: a forked child has no part in the verification; that of its parent goes on."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert(20); sync()")
    assert worker.run(_FORK) == [["sound", True]]
    assert worker.run("insert(); sync()")
