"""Several processes on one database: one uploads, all keep the gate, and any of them may die."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.databases import Database
from support.workers import Worker, WorkerDied, WorkerError, Workers, rows_of, workers
from walship.replica.spool import read_state


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def _uploader(some: list[Worker]) -> Worker:
    (found,) = [worker for worker in some if worker.run("engine().uploader.leads")]
    return found


def _full_copies(fleet: Workers) -> int:
    """How often any of them has shipped the whole database."""
    return sum(worker.log().count("full copy as txid") for worker in fleet.all)


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
    with pytest.raises(WorkerError, match="another process ships this database to .*app.db-re"):
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
    with pytest.raises(WorkerError, match="another process ships this database to .*elsewhere"):
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
