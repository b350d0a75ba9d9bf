"""Copies that follow replicas in real stores, written by walship and by Litestream."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import assert_same_bytes
from support.litestream import Litestream, in_bucket
from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.config.sources import parse_replica
from walship.replica.errors import ContinuityError
from walship.replica.follow import Follower, note_path, update
from walship.replica.format.types import format_segment_name
from walship.replica.restore import restore
from walship.replica.store.base import ObjectStore
from walship.replica.store.opening import open_store
from walship.replica.store.retrying import RetryingStore

CLOCK = SystemClock()
WAIT_S = 30.0


def opened(replica: object) -> ObjectStore:
    return RetryingStore(open_store(parse_replica(replica).store, CLOCK), CLOCK)  # type: ignore[arg-type]


@pytest.fixture
def litestream_to_minio(
    minio_server: S3Endpoint, litestream: Path, tmp_path: Path
) -> Iterator[tuple[Path, ObjectStore]]:
    """A database that the real Litestream replicates and compacts every second."""
    place = in_bucket(minio_server)
    database = tmp_path / "app.db"
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode=wal")
        db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, content BLOB)")
        db.commit()
    program = Litestream(litestream, tmp_path, database, place)
    with program.replicating(), closing(place.store()) as store:
        yield database, store


def test_follows_walship(s3_server: S3Endpoint, tmp_path: Path) -> None:
    """From a first segment in parts on, through every state, and without false alarms."""
    replica = {**s3_server.replica(s3_server.make_bucket(), "db"), "sync-interval": 0}
    output = tmp_path / "copy.db"
    with (
        closing(walship.connect(tmp_path / "app.db", replica)) as db,
        closing(opened(replica)) as store,
    ):
        db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, content BLOB)")
        db.execute("BEGIN")
        for _ in range(3):
            db.execute("INSERT INTO t (content) VALUES (?)", (random.Random(1).randbytes(3 << 20),))
        db.execute("COMMIT")
        walship.replication(db).sync(WAIT_S)
        assert update(store, output, clock=CLOCK).size_bytes > 5 << 20
        for _ in range(2):
            assert update(store, output, clock=CLOCK).n_segments == 0
        follower, _ = Follower.open(store, output, clock=CLOCK)
        with closing(follower):
            for n in range(4):
                db.execute("INSERT INTO t (content) VALUES (?)", (str(n),))
                txid = walship.replication(db).sync(WAIT_S)
                step = follower.step()
                assert step is not None
                assert step.txid == txid
                assert follower.step() is None
        assert '"segment": ""' not in note_path(output).read_text()
        restore(store, tmp_path / "expected.db", clock=CLOCK)
        assert_same_bytes(output, tmp_path / "expected.db")
        other = {**s3_server.replica(s3_server.make_bucket(), "db"), "sync-interval": 0}
        with (
            closing(walship.connect(tmp_path / "other.db", other)) as second,
            closing(opened(other)) as other_store,
        ):
            second.execute("CREATE TABLE t (n)")
            while walship.replication(second).sync(WAIT_S) <= txid:
                second.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(ContinuityError, match="not the one that"):
                update(other_store, output, clock=CLOCK)


def test_follows_litestream(litestream_to_minio: tuple[Path, ObjectStore], tmp_path: Path) -> None:
    """While Litestream writes and compacts, readers of the copy see states without a hole."""
    database, store = litestream_to_minio
    output = tmp_path / "copy.db"
    while not output.exists():
        with contextlib.suppress(walship.NoBackupError):
            update(store, output, clock=CLOCK)

    def write() -> None:
        with closing(sqlite3.connect(database, timeout=30)) as db:
            for n in range(1, 151):
                db.execute("INSERT INTO t VALUES (?, zeroblob(300))", (n,))
                db.execute("UPDATE t SET content = zeroblob(301) WHERE n % 7 = 0")
                db.commit()
                CLOCK.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    follower, _ = Follower.open(store, output, clock=CLOCK)
    seen = {0}
    ends_at = CLOCK.monotonic() + WAIT_S
    with closing(follower):
        while max(seen) < 150 and CLOCK.monotonic() < ends_at:
            follower.step()
            seen.add(count_of(output))
            CLOCK.sleep(0.05)
    writer.join()
    assert max(seen) == 150
    assert len(seen) > 2
    restore(store, tmp_path / "expected.db", clock=CLOCK, txid=follower.txid)
    assert_same_bytes(output, tmp_path / "expected.db")


def count_of(path: Path) -> int:
    """Rows of the table, which must be 1 .. n, as another program sees them."""
    with closing(apsw.Connection(str(path))) as db:
        rows = [n for (n,) in db.execute("SELECT n FROM t ORDER BY n")]
        assert db.pragma("integrity_check") == "ok"
    assert rows == list(range(1, len(rows) + 1))
    return len(rows)


def test_follows_walship_while_it_compacts(tmp_path: Path) -> None:
    """A copy whose next segments walship has merged and deleted goes on through the levels."""
    replica = {"path": str(tmp_path / "replica"), "sync-interval": 0}
    settings = {
        "levels": ["1s", "2s"],
        "fence_lease": "3s",
        "l0_retention": "3s",
        "l0_retention_check_interval": "1s",
    }
    output = tmp_path / "copy.db"
    fresh = tmp_path / "replica" / "ltx" / "0"
    with (
        closing(walship.connect(tmp_path / "app.db", replica, **settings)) as db,
        closing(opened(replica)) as store,
    ):
        db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, content BLOB)")
        walship.replication(db).sync(WAIT_S)
        start = update(store, output, clock=CLOCK).txid
        ends_at = CLOCK.monotonic() + WAIT_S
        n = 0
        # Until the segment behind the one that the copy holds is gone from level 0.
        while CLOCK.monotonic() < ends_at:
            n += 1
            db.execute("INSERT INTO t VALUES (?, zeroblob(300))", (n,))
            last = walship.replication(db).sync(WAIT_S)
            if n > 20 and min(fresh.iterdir()).name > format_segment_name(start + 2, start + 2):
                break
            CLOCK.sleep(0.02)
        step = update(store, output, clock=CLOCK)
        assert step.txid == last
        assert step.n_segments < last - start
        assert count_of(output) == n
        update(store, output, clock=CLOCK)
        restore(store, tmp_path / "expected.db", clock=CLOCK)
        assert_same_bytes(output, tmp_path / "expected.db")
