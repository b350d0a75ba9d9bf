"""Processes and threads at work on one database at once, as in SQLite's mptest.

A failure names its seed, which chooses what everybody does, though not how it interleaves.
"""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from support import mptest
from support.databases import Database
from support.mptest import Outcome

#: Another library in another process, which only reads: its view has to hold as well.
_FOREIGN_READER = """
import sqlite3, sys, threading
from support import mptest

stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
looks = 0
while not stop.wait(0.01):
    db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=30, isolation_level=None)
    for _ in range(20):
        mptest.check(db)
        looks += 1
        if stop.wait(0.002):
            break
    db.close()
print(looks)
"""


@contextlib.contextmanager
def _foreign_reader(path: Path) -> Iterator[None]:
    child = subprocess.Popen(
        [sys.executable, "-c", _FOREIGN_READER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(mptest.__file__).parents[1],
        text=True,
    )
    try:
        yield
    finally:
        out, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert int(out) > 0


def _check_all(database: Database, outcome: Outcome) -> None:
    """The database has what was committed, and the replica has the database."""
    assert outcome.breaks == []
    connection = apsw.Connection(str(database.path), vfs="unix")
    counters = mptest.check(connection)
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    connection.close()
    for who, n in outcome.committed.items():
        # One more may have been committed whose process was killed before it could say so; what
        # its successor commits is counted from there.
        assert counters[who] == n or (who in outcome.killed and counters[who] == n + 1), who
    with database.opened():
        database.sync()
    database.assert_replica_equals_file()
    restored = sqlite3.connect(database.restore(), isolation_level=None)
    assert mptest.check(restored) == counters
    restored.close()


@pytest.mark.parametrize("page_size", [512, 4096])
@pytest.mark.parametrize("seed", range(2))
def test_threads_and_a_foreign_reader(seed: int, page_size: int, tmp_path: Path) -> None:
    """Four threads with two connections each, and a reader of another library beside them."""
    database = Database(tmp_path, page_size=page_size)
    settings = {"page_size": page_size, "max_sync_wal_bytes": "64KB" if seed else "64MB"}
    mptest.prepare(database.path, database.replica, settings)
    with _foreign_reader(database.path):
        outcome = mptest.run(
            database.path,
            database.replica,
            seed=seed,
            processes=1,
            threads=4,
            steps=120,
            settings=settings,
        )
    assert sum(outcome.committed.values()) > 100, outcome
    _check_all(database, outcome)


@pytest.mark.parametrize("seed", range(10, 13))
def test_processes(seed: int, tmp_path: Path) -> None:
    """Three processes with two threads each."""
    database = Database(tmp_path, page_size=1024)
    outcome = mptest.run(
        database.path,
        database.replica,
        seed=seed,
        processes=3,
        threads=2,
        steps=90,
        settings={"page_size": 1024},
    )
    assert sum(outcome.committed.values()) > 100, outcome
    _check_all(database, outcome)


@pytest.mark.parametrize("seed", range(20, 23))
def test_processes_that_are_killed(seed: int, tmp_path: Path) -> None:
    """The same, with processes killed and replaced in the middle of it."""
    database = Database(tmp_path, page_size=1024)
    outcome = mptest.run(
        database.path,
        database.replica,
        seed=seed,
        processes=3,
        threads=2,
        steps=90,
        kills=3,
        settings={"page_size": 1024},
    )
    assert outcome.killed
    _check_all(database, outcome)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 106))
def test_more_of_it(seed: int, tmp_path: Path) -> None:
    """More processes, longer, with every page size."""
    page_size = (512, 1024, 4096, 8192, 16384, 65536)[seed % 6]
    database = Database(tmp_path, page_size=page_size)
    outcome = mptest.run(
        database.path,
        database.replica,
        seed=seed,
        processes=4,
        threads=2,
        steps=150,
        kills=seed % 3,
        settings={"page_size": page_size},
    )
    # Everything that anybody can do was done by somebody.
    assert set(outcome.done) == set(mptest.TASKS), outcome.done
    _check_all(database, outcome)
