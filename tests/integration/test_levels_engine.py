"""The engine merges and cleans up by itself, beside a writing application."""

from __future__ import annotations

import time
from pathlib import Path

from support.databases import Database
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
