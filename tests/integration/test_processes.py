"""Several processes on one database: one uploads, all keep the gate, and any of them may die."""

from __future__ import annotations

import fcntl
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import Database
from support.workers import Worker, WorkerError, Workers, rows_of, workers
from walship.replica.spool import Spool


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def _uploader(some: list[Worker]) -> Worker:
    (found,) = [worker for worker in some if worker.run("engine().uploader.leads")]
    return found


def _full_copies(fleet: Workers) -> int:
    """How often any of them has shipped the whole database."""
    logs = [worker.log() for worker in fleet.all]
    return sum(log.count("full copy as txid") + log.count("pages differ") for log in logs)


def _pause(worker: Worker, database: Database) -> None:
    """Stop a process while it does not hold the drain lock, which the others need."""
    with (database.directory / ".app.db-walship" / "lock").open("r+b") as file:
        while True:
            worker.pause()
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
                return
            except OSError:
                worker.resume()


def _pipes(database: Database) -> list[Path]:
    return sorted(database.directory.glob(".app.db-walship/*.fifo"))


def _lose_disk(database: Database) -> None:
    """The database and its state are gone; the replica is not."""
    shutil.rmtree(database.directory / ".app.db-walship")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{database.path}{suffix}").unlink(missing_ok=True)


def _assert_replica_has(database: Database, rows: set[tuple[str, int]]) -> None:
    assert rows <= rows_of(database.restore())


def test_all_commits_of_all_processes_arrive(tmp_path: Path, fleet: Workers) -> None:
    """Four processes write; exactly one uploads; `sync` works in each, whoever uploads."""
    database = Database(tmp_path)
    four = fleet.many(4, database.path, database.replica)
    for worker in four:
        worker.begin("insert(25)")
    for worker in four:
        worker.end()
    uploader = _uploader(four)
    txids = [worker.run("sync()") for worker in four]
    assert len(set(txids)) == 1
    assert len(fleet.committed()) == 100
    _assert_replica_has(database, fleet.committed())
    for worker in four:
        status = worker.run("status()")
        assert status["uploader"] == (worker is uploader)
        assert (status["state"], status["fence"]) == ("ok", "held")
        assert status["replicated_txid"] == status["txid"] == txids[0]
        assert status["uploads"] == uploader.run("status()")["uploads"] > 0
    assert _full_copies(fleet) == 1


@pytest.mark.parametrize(
    "wait",
    [
        "db.close(True); open(durability='replica'); insert()",
        "with walship.durable(db): insert()\n",
        "import asyncio; from walship import aio; insert(); asyncio.run(aio.wait(db, 50))",
    ],
    ids=["connection", "transaction", "asyncio"],
)
def test_waiting_works_in_every_process(tmp_path: Path, fleet: Workers, wait: str) -> None:
    """A commit that waits is in the replica when it returns, also where another one uploads."""
    database = Database(tmp_path)
    for worker in fleet.many(3, database.path, database.replica):
        worker.run(wait)
        _assert_replica_has(database, set(worker.committed))


def test_a_sync_outlives_the_uploader_that_closes(tmp_path: Path, fleet: Workers) -> None:
    """One waits for what another has in flight, and that one closes: the wait goes on."""
    database = Database(tmp_path)
    uploader = fleet(database.path, database.replica)
    other = fleet(database.path, database.replica)
    uploader.run("sync(); hold_puts()")
    other.begin("insert(); sync()")
    other.wait_committed(1)
    uploader.run("while not engine().capture.state.segments: time.sleep(0.01)\n")
    uploader.run("close()")
    other.end()
    _assert_replica_has(database, set(other.committed))
    assert other.run("engine().uploader.leads")


def test_the_uploader_is_killed_again_and_again(tmp_path: Path, fleet: Workers) -> None:
    """Whoever uploads is killed at a random moment: another goes on, and nothing is sent twice."""
    rng = random.Random(7)
    database = Database(tmp_path)
    first = fleet(database.path, database.replica)
    first.run("db.execute('CREATE TABLE ballast (x)')")
    first.run("db.execute('INSERT INTO ballast VALUES (randomblob(400000))'); sync()")
    four = [first, *fleet.many(3, database.path, database.replica)]
    durable: set[tuple[str, int]] = set()
    for worker in four:
        worker.run("write(0.001, durability='replica')")
    for _ in range(6):
        uploader = _uploader(four)
        uploader.wait_committed(len(uploader.committed) + rng.randrange(1, 60))
        uploader.kill()
        four.remove(uploader)
        durable |= fleet.committed()
        four.append(fleet(database.path, database.replica))
        four[-1].run("write(0.001, durability='replica')")
        four[rng.randrange(3)].run("sync()")
        _assert_replica_has(database, durable)
    for worker in four:
        worker.run("stop()")
    for worker in four:
        worker.run("sync()")
    _assert_replica_has(database, fleet.committed())
    assert _full_copies(fleet) == 1
    for worker in four:
        worker.run("close()")
    assert rows_of(database.path) == rows_of(database.restore())


def test_all_close_at_once(tmp_path: Path, fleet: Workers) -> None:
    """Of several that close together the last one ships the rest and gives the lease up."""
    database = Database(tmp_path)
    replica = {"path": str(database.replica), "sync_interval": 3600.0}
    for round_ in range(3):
        four = fleet.many(4, database.path, replica)
        for worker in four:
            worker.begin("insert(5); close()")
        for worker in four:
            worker.end()
        _assert_replica_has(database, fleet.committed())
        assert rows_of(database.path) == rows_of(database.restore())
        assert '"owner": ""' in (database.replica / "lock.json").read_text()
        for worker in four:
            assert worker.finish() == 0
        assert len(fleet.committed()) == 20 * (round_ + 1)


def test_missing_database_is_restored_once(tmp_path: Path, fleet: Workers) -> None:
    """Of several that find the database missing one restores it, and the others wait for that."""
    database = Database(tmp_path)
    first = fleet(database.path, database.replica)
    first.run("insert(30, 3000); close()")
    _lose_disk(database)
    four = fleet.many(4, database.path, database.replica)
    assert sum("restored from" in worker.log() for worker in four) == 1
    for worker in four:
        rows = worker.run("db.execute('SELECT who, n FROM rows').fetchall()")
        assert set(first.committed) <= {(who, n) for who, n in rows}
        worker.run("insert()")
    four[0].run("sync()")
    _assert_replica_has(database, fleet.committed())
    assert _full_copies(fleet) == 1


def test_another_replica_is_refused(tmp_path: Path, fleet: Workers) -> None:
    """A database that is shipped to one place cannot be shipped to another at the same time."""
    database = Database(tmp_path)
    first = fleet(database.path, database.replica)
    second = fleet(database.path, tmp_path / "elsewhere", opened=False)
    before = _pipes(database)
    with pytest.raises(WorkerError, match=r"another process ships this database to .*app.db-re"):
        second.run("open()")
    assert _pipes(database) == before
    assert not (tmp_path / "elsewhere").exists()
    first.run("insert(); close()")
    second.run("open(); insert(); sync()")


def test_all_come_back_with_another_replica(tmp_path: Path, fleet: Workers) -> None:
    """Nobody is refused because of the replica before, although the new one was not reached yet."""
    database = Database(tmp_path)
    fleet(database.path, database.replica).run("insert(); close()")
    database.replica = tmp_path / "elsewhere"
    first = fleet(database.path, database.replica, opened=False)
    first.run(
        "from walship.replica.fence import Fence; acquiring = threading.Event();"
        "Fence.acquire = lambda self: (acquiring.set(), threading.Event().wait())"
    )
    first.run("threading.Thread(target=open, daemon=True).start(); acquiring.wait()")
    second = fleet(database.path, database.replica, opened=False)
    second.begin("open()")
    old = fleet(database.path, tmp_path / "app.db-replica", opened=False)
    with pytest.raises(WorkerError, match=r"another process ships this database to .*elsewhere"):
        old.run("open()")
    assert not second.has_answered()
    first.kill()
    second.end()
    second.run("insert(); sync()")
    _assert_replica_has(database, fleet.committed())


def test_pipes_of_the_dead_are_removed(tmp_path: Path, fleet: Workers) -> None:
    """What a killed process left in the state directory goes when the next one uploads."""
    database = Database(tmp_path)
    three = fleet.many(3, database.path, database.replica)
    assert len(_pipes(database)) == 3
    uploader = _uploader(three)
    uploader.kill()
    three.remove(uploader)
    three[0].kill()
    three[1].run("sync()")
    assert len(_pipes(database)) == 1
    three[1].kill()
    last = fleet(database.path, database.replica)
    assert len(_pipes(database)) == 1
    last.run("close()")
    assert _pipes(database) == []


def test_wal_mode_is_waited_for(tmp_path: Path, fleet: Workers) -> None:
    """SQLite answers "locked" at once to who wants WAL mode while another one writes."""
    database = Database(tmp_path)
    other = apsw.Connection(str(database.path))
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    worker = fleet(database.path, database.replica, opened=False)
    worker.begin("open()")
    assert not worker.has_answered(within_s=1.5)
    other.execute("COMMIT")
    other.close(True)
    worker.end()
    worker.run("insert(); sync()")
    _assert_replica_has(database, fleet.committed())


def test_a_missing_database_in_two_threads(tmp_path: Path, fleet: Workers) -> None:
    """Two threads of one process find the database missing: one restores, the other one waits."""
    database = Database(tmp_path)
    fleet(database.path, database.replica).run("insert(30, 3000); close()")
    _lose_disk(database)
    worker = fleet(database.path, database.replica, opened=False)
    worker.run(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def connect():\n"
        "    db = walship.connect(job['path'], job['replica'])\n"
        "    return db.execute('SELECT count(*) FROM rows').fetchall()[0][0], db.close()\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    counts = [f.result()[0] for f in [pool.submit(connect) for _ in range(4)]]\n"
    )
    assert worker.run("counts") == [30, 30, 30, 30]


def test_the_replica_does_not_answer_at_the_start(tmp_path: Path, fleet: Workers) -> None:
    """Several that start while the store is away all open, and ship once it is back.

    The first decides whether the files may be used; who is less patient waits for that.
    """
    database = Database(tmp_path)
    fleet(database.path, database.replica).run("insert(3); close()")
    three = [
        fleet(database.path, database.replica, opened=False, open_timeout=timeout)
        for timeout in (2.0, 0.2, 0.2)
    ]
    for worker in three:
        worker.run("hold_puts()")
        worker.begin("open(); insert()")
    for worker in three:
        worker.end()
    for worker in three:
        worker.begin("release_puts(); sync()")
    for worker in three:
        worker.end()
    _assert_replica_has(database, fleet.committed())


_FORK = """
def child():
    try:
        db.execute("SELECT 1")
        return 1
    except apsw.ConnectionClosedError:
        own = walship.connect(job["path"], job["replica"], busy_timeout=30)
        own.execute("INSERT INTO rows VALUES (?, 1, NULL)", (job["who"] + "-child",))
        walship.replication(own).sync(30)
        own.close()
        return 0

pid = os.fork()
if pid == 0:
    try:
        os._exit(child())
    finally:
        os._exit(2)
"""


def test_a_fork_beside_others(tmp_path: Path, fleet: Workers) -> None:
    """F22: a child forked after opening has no connection and may open anew; all others go on."""
    database = Database(tmp_path)
    uploader = fleet(database.path, database.replica)
    other = fleet(database.path, database.replica)
    for forking, writing in ((uploader, other), (other, uploader)):
        writing.run("write(0.001)")
        writing.wait_committed(len(writing.committed) + 20)
        forking.run("insert()")
        forking.run(_FORK)
        assert forking.run("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 0
        _assert_replica_has(database, {(f"{forking.who}-child", 1)})
        forking.run("insert()")
        writing.run("stop()")
        writing.run("sync()")
        _assert_replica_has(database, fleet.committed())
    assert uploader.run("engine().uploader.leads")
    assert _full_copies(fleet) == 1


_POOL = """
import multiprocessing, sys
import walship

def task(arguments):
    path, replica, n = arguments
    with walship.connect(path, replica, busy_timeout=30) as db:
        db.execute("INSERT INTO rows VALUES ('pool', ?, NULL)", (n,))
    db.close()
    return n

if __name__ == "__main__":
    path, replica, method = sys.argv[1:]
    with multiprocessing.get_context(method).Pool(3) as pool:
        done = pool.map(task, [(path, replica, n) for n in range(12)], chunksize=1)
        pool.close()
        pool.join()
    assert sorted(done) == list(range(12))
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_multiprocessing(tmp_path: Path, fleet: Workers, method: str) -> None:
    """Tasks of a pool open, commit and close, again and again, beside a process that stays."""
    database = Database(tmp_path)
    stays = fleet(database.path, database.replica)
    program = tmp_path / "pool.py"
    program.write_text(_POOL)
    command = [sys.executable, program, database.path, database.replica, method]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    stays.run("sync()")
    _assert_replica_has(database, {("pool", n) for n in range(12)})
    assert _full_copies(fleet) == 1


def test_one_that_only_checkpoints(tmp_path: Path, fleet: Workers) -> None:
    """A process that never writes checkpoints all the time: its gate seals what others wrote."""
    database = Database(tmp_path)
    writers = fleet.many(2, database.path, database.replica)
    checkpointer = fleet(database.path, database.replica)
    for worker in writers:
        worker.run("write(0.0, 3000)")
    checkpointer.run(
        "db.set_busy_timeout(20)\n"
        "for n in range(60):\n"
        "    for mode in ('PASSIVE', 'RESTART', 'TRUNCATE'):\n"
        "        try:\n"
        "            db.execute(f'PRAGMA wal_checkpoint({mode})').fetchall()\n"
        "        except apsw.BusyError:\n"
        "            pass\n"
    )
    for worker in writers:
        worker.run("stop()")
    checkpointer.run("sync()")
    _assert_replica_has(database, fleet.committed())
    assert _full_copies(fleet) == 1


GATES = {
    "restart": "PRAGMA wal_checkpoint(RESTART)",
    "truncate": "PRAGMA wal_checkpoint(TRUNCATE)",
    "vacuum": "VACUUM",
}


@pytest.mark.parametrize("gate", GATES)
def test_gates_do_not_wait_for_the_uploader(tmp_path: Path, fleet: Workers, gate: str) -> None:
    """While the uploader is stopped the others commit, pass gates and close; a wait says why."""
    database = Database(tmp_path)
    uploader = fleet(database.path, database.replica)
    others = fleet.many(2, database.path, database.replica)
    others[0].run("insert(5); sync()")
    _pause(uploader, database)
    for worker in others:
        for _ in range(3):
            worker.run("insert(5, 3000)")
            worker.run(f"db.execute({GATES[gate]!r}).fetchall()")
    with pytest.raises(WorkerError) as caught:
        others[1].run("sync(0.5)")
    assert caught.value.kind == "NotYetReplicated"
    assert f"process {uploader.pid}, which uploads, does not answer" in caught.value.text
    assert "safe on this disk and will be shipped" in caught.value.text
    others[1].run("close()")
    uploader.resume()
    others[0].run("insert(); sync()")
    _assert_replica_has(database, fleet.committed())
    assert _full_copies(fleet) == 1


@pytest.mark.parametrize("policy", ["resync", "fail", "block"])
def test_a_full_spool(tmp_path: Path, fleet: Workers, policy: str) -> None:
    """The limit is one for all processes, and each follows the policy; nothing committed is lost,
    and all of it arrives once there is room again."""
    database = Database(tmp_path)
    settings = {"spool_full": policy, "spool_full_timeout": 0.2, "max_spool_bytes": 20_000}
    uploader = fleet(database.path, database.replica, **settings)
    other = fleet(database.path, database.replica, **settings)
    uploader.run("sync(); hold_puts()")
    refused = []
    for worker in (other, uploader, other):
        worker.run("db.set_busy_timeout(300); db.wal_autocheckpoint(0)")
        for _ in range(3):
            try:
                worker.run(
                    "insert(4, 5000); db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()"
                )
            except WorkerError as error:
                refused.append(error.kind)
    if policy == "resync":
        assert not refused
        assert "the spool in" in other.log()
    else:
        assert set(refused) == {"SpoolError"}
    uploader.run("release_puts()")
    other.run("sync()")
    _assert_replica_has(database, fleet.committed())
    for worker in (other, uploader):
        worker.run("insert(); sync()")
    assert rows_of(database.restore()) == rows_of(database.path)


_FOREIGN = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
for n in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    db.execute("INSERT INTO rows VALUES ('foreign', ?, randomblob(3000))", (n,))
{more}
"""


@pytest.mark.parametrize(
    "more", ["", "db.execute('PRAGMA wal_checkpoint(TRUNCATE)')"], ids=["writes", "checkpoints"]
)
def test_a_foreign_writer_beside_several(tmp_path: Path, fleet: Workers, more: str) -> None:
    """A program without walship writes beside: its rows arrive too, whoever uploads."""
    database = Database(tmp_path)
    two = fleet.many(2, database.path, database.replica)
    expected = set()
    for round_ in range(3):
        for worker in two:
            worker.run("insert(5, 2000)")
        command = [sys.executable, "-c", _FOREIGN.format(more=more)]
        subprocess.run([*command, database.path, str(round_ * 10)], check=True, timeout=60)
        expected |= {("foreign", round_ * 10 + n) for n in range(10)}
        for worker in two:
            worker.run("insert(5, 2000)")
        two[round_ % 2].run("sync()")
        _assert_replica_has(database, fleet.committed() | expected)
    for worker in two:
        worker.run("close()")
    assert rows_of(database.restore()) == rows_of(database.path)


def test_a_connection_that_comes_while_the_process_leaves(
    tmp_path: Path, fleet: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody uses the database while its process counts as absent: another one, alone, could be
    changing the file."""
    database = Database(tmp_path)
    fleet(database.path, database.replica)
    first = database.connect()
    engine = database.engine()
    leave, opened = Spool.leave, threading.Event()
    comers: list[threading.Thread] = []
    came: list[walship.Connection] = []

    def come() -> None:
        came.append(database.connect())
        opened.set()

    def leaving(spool: Spool) -> bool:
        last = leave(spool)
        comers.append(threading.Thread(target=come))
        comers[0].start()
        assert not opened.wait(0.3), "it was let in"
        return last

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "leave", leaving)
        first.close()
    comers[0].join()
    assert database.engine() is not engine
    came[0].close()


def test_status_never_raises(tmp_path: Path, fleet: Workers) -> None:
    """Not even when somebody has removed the state directory under the processes."""
    database = Database(tmp_path)
    uploader = fleet(database.path, database.replica)
    other = fleet(database.path, database.replica)
    shutil.rmtree(tmp_path / ".app.db-walship")
    for worker in (other, uploader):
        # While somebody else is sealing, a status is what was known before.
        deadline = time.monotonic() + 20
        while (said := worker.run("status()")["last_error"]) is None:
            assert time.monotonic() < deadline
        assert "was removed while it was in use" in said
