"""The engine merges and cleans up by itself, beside a writing application."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.databases import WAIT_S, Database, Stores
from walship.replica.fence import LEASE_KEY, parse_lease
from walship.replica.listing import list_replica


def test_a_writing_database_is_merged_and_cleaned_up(tmp_path: Path) -> None:
    """Level 1 appears, merged uploads go, the first copy becomes the snapshot; all restores."""
    database = Database(
        tmp_path,
        levels=["1s", "2s"],
        snapshot_interval=0,
        l0_retention="2s",
        l0_retention_check_interval="1s",
        fence_lease="2s",
    )
    deadline = time.monotonic() + 60
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
        while time.monotonic() < deadline:
            connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            txid = database.sync()
            listing = list_replica(database.store())
            oldest = min(s.max_txid for s in listing if s.level == 0)
            if oldest > 20 and {s.level for s in listing} == {0, 1, 2, 9}:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"after {txid} commits there is still: {listing}")
        assert [s.max_txid for s in listing if s.level == 9] == [1]
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


def test_no_levels_no_requests(tmp_path: Path) -> None:
    """With everything switched off the replica is what was sent."""
    database = Database(tmp_path, levels=[], snapshot_interval=0, retention=False)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
        for _ in range(40):
            connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.sync()
    assert {s.level for s in list_replica(database.store())} == {0}
    database.assert_replica_equals_file()


def test_a_late_full_copy_becomes_a_snapshot_with_everything_off(tmp_path: Path) -> None:
    """It is what a damaged replica is healed with; also by the process that comes after the one
    that sent it."""
    database = Database(tmp_path, levels=[], snapshot_interval=0, retention=False)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
        connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        database.sync()
        database.demand_full_copy()
        txid = database.sync()
        wait_until(lambda: snapshots(database) == [(1, txid)])
    for path in (database.replica / "ltx" / "9").iterdir():
        path.unlink()
    with database.opened() as connection:
        connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        database.sync()
        wait_until(lambda: snapshots(database) == [(1, txid)])
    database.assert_replica_equals_file()


def snapshots(database: Database) -> list[tuple[int, int]]:
    return [(s.min_txid, s.max_txid) for s in list_replica(database.store()) if s.level == 9]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.01)


def test_nothing_waits_for_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs holds up no commit, no sync, no checkpoint and no close; and once the lease
    was given up it is not taken back for it."""
    stores = Stores(monkeypatch)
    stores.block(("copy",))
    database = Database(tmp_path, levels=["1s"], snapshot_interval=0)
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
        for _ in range(12):
            connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.sync()
        wait_until(lambda: stores.last.waiting == 1)
        for _ in range(12):
            connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
            database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        requests = [t for t in threading.enumerate() if t.name == "walship:app.db:request"]
    stores.release()
    wait_until(lambda: not any(thread.is_alive() for thread in requests))
    assert [s.level for s in list_replica(database.store()) if s.level] == [9]
    lease = parse_lease(database.store().get(LEASE_KEY))
    assert lease is not None
    assert lease.owner == "", "the lease was taken back"
    database.assert_replica_equals_file()
    with database.opened() as connection:
        connection.execute("INSERT INTO t (pad) VALUES (randomblob(500))")
        database.sync()
        wait_until(lambda: {0, 1, 9} == {s.level for s in list_replica(database.store())})
        database.assert_replica_equals_now()
