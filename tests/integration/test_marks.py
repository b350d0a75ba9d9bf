"""Marks: names for states, made by the application, kept in the replica, restored by name."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
from support.databases import WAIT_S, Database
from support.litestream import Litestream, Place, in_bucket, in_directory
from support.servers import S3Endpoint
from support.workers import Workers, workers
from walship.replica.timeline import read_timeline


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


@pytest.fixture(params=["directory", "minio"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty replica, in a directory and in a bucket."""
    if request.param == "directory":
        return in_directory(tmp_path / "replica")
    server: S3Endpoint = request.getfixturevalue("minio_server")
    return in_bucket(server)


def _count(path: Path) -> Any:
    with apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY) as db:
        return db.execute("select count(*) from t").get


def test_a_state_is_marked_and_restored(tmp_path: Path, place: Place, litestream: Path) -> None:
    """The state before what follows, by name; Litestream does not mind the mark, and takes over."""
    path = tmp_path / "app.db"
    db = walship.connect(path, place.ours, sync_interval=0)
    try:
        db.execute("create table t(x)")
        for n in range(10):
            db.execute("insert into t values(?)", (n,))
        replication = walship.replication(db)
        mark = replication.mark("before-migration", WAIT_S)
        assert mark.txid == replication.status().replicated_txid
        assert abs(mark.time_ms - time.time() * 1000) < 60_000
        db.execute("delete from t where x > 2")
        replication.sync(WAIT_S)
        with pytest.raises(walship.ConfigError, match="already"):
            replication.mark("before-migration", WAIT_S)
        after = replication.mark("after", WAIT_S)
        assert replication.mark("after", WAIT_S, replace=True).txid == after.txid
    finally:
        db.close(True)
    for label, expected in (("before-migration", 10), ("after", 3)):
        output = tmp_path / f"{label}.db"
        result = walship.restore(place.ours, output, label=label, integrity_check="full")
        assert (_count(output), result.output) == (expected, output)
    with pytest.raises(walship.ConfigError, match="did you mean after"):
        walship.restore(place.ours, tmp_path / "x.db", label="afterr")
    store = place.store()
    try:
        marks = read_timeline(store).marks
        assert [(each.mark.label, each.exact) for each in marks] == [
            ("before-migration", True),
            ("after", True),
        ]
    finally:
        store.close()
    other = Litestream(litestream, tmp_path, path, place)
    assert _count(other.restore(tmp_path / "by-litestream.db", mark.txid)) == 10
    listed = subprocess.run(
        [litestream, "ltx", "-level", "all", place.url],
        env=other.environ,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{mark.txid:016x}" in listed.stdout
    assert "migration" not in listed.stdout + listed.stderr
    with other.replicating():
        plain = subprocess.run(
            [sys.executable, "-c", _FOREIGN, str(path)], check=True, capture_output=True, timeout=60
        )
        assert plain.returncode == 0
        deadline = time.monotonic() + WAIT_S
        while max(place.txids()) == after.txid:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    output = tmp_path / "again.db"
    walship.restore(place.ours, output, label="before-migration", integrity_check="full")
    assert _count(output) == 10


_FOREIGN = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=10)
db.execute("insert into t values(99)")
db.commit()
"""


def test_a_mark_waits_for_the_replica(tmp_path: Path, fleet: Workers) -> None:
    """While nothing gets through there is no mark; afterwards there is, from any process."""
    database = Database(tmp_path)
    first = fleet(database.path, database.replica)
    second = fleet(database.path, database.replica)
    first.run("insert(3); sync(); hold_puts()")
    second.run("insert(1)")
    attempt = """
try:
    walship.replication(db).mark('m', 0.2)
    said = 'made'
except walship.NotYetReplicated:
    said = 'not yet'
said
"""
    assert second.run(attempt) == "not yet"
    assert not (database.replica / "marks").exists()
    first.run("release_puts()")
    assert second.run("walship.replication(db).mark('m', 50).txid") == second.run("sync()")
    assert (database.replica / "marks" / "m.json").exists()
    assert first.run("walship.replication(db).unmark('m').label") == "m"
    assert not (database.replica / "marks" / "m.json").exists()


def test_what_cannot_be_marked(tmp_path: Path) -> None:
    """A transaction that is open, an empty database, a name that is none."""
    database = Database(tmp_path)
    with database.opened() as db:
        replication = walship.replication(db)
        with pytest.raises(walship.ConfigError, match="label"):
            replication.mark("../x", WAIT_S)
        db.execute("create table t(x)")
        db.execute("begin immediate")
        with pytest.raises(walship.RefusedError, match="commit it first"):
            replication.mark("x", WAIT_S)
        db.execute("rollback")
        replication.sync(WAIT_S)
        with pytest.raises(walship.ConfigError, match="no mark"):
            replication.unmark("x")
