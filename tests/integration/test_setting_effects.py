"""Each setting of a database does what the settings page says, seen from outside."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

import walship
from support.clock import FakeClock
from support.databases import Stores
from walship.replica.format.ltx import decode
from walship.replica.store.local import LocalStore


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Stores that can be made to answer no more."""
    stores = Stores(monkeypatch)
    yield stores
    stores.release()


def segments(replica: Path) -> list[Path]:
    """The level-0 segments of a directory replica, in TXID order."""
    return sorted((replica / "ltx" / "0").glob("*.ltx"))


def test_meta_path_holds_the_state(tmp_path: Path) -> None:
    """meta-path: the spool lies there, and nowhere beside the database."""
    state = tmp_path / "elsewhere" / "state"
    with closing(walship.connect(tmp_path / "a.db", tmp_path / "r", meta_path=str(state))) as db:
        db.execute("create table t(x)")
    assert (state / "journal").stat().st_size > 0
    assert not (tmp_path / ".a.db-walship").exists()


def test_page_size_of_a_new_database(tmp_path: Path) -> None:
    """page-size: a new database is made with it."""
    with closing(walship.connect(tmp_path / "a.db", tmp_path / "r", page_size=16384)) as db:
        db.execute("create table t(x)")
        assert db.pragma("page_size") == 16384


def test_busy_timeout_is_the_connections(tmp_path: Path) -> None:
    """busy-timeout: SQLite's own, 5 s unless something else is said."""
    for given, expected in ((None, 5000), (0.25, 250)):
        with closing(walship.connect(tmp_path / "a.db", busy_timeout=given)) as db:
            assert db.pragma("busy_timeout") == expected


def test_min_checkpoint_page_count_is_the_threshold(tmp_path: Path) -> None:
    """min-checkpoint-page-count: SQLite checkpoints at that many pages."""
    path, replica = tmp_path / "a.db", tmp_path / "r"
    with closing(walship.connect(path, replica, min_checkpoint_page_count=10)) as db:
        assert db.pragma("wal_autocheckpoint") == 10
    with closing(walship.connect(tmp_path / "b.db", tmp_path / "s")) as db:
        assert db.pragma("wal_autocheckpoint") == 1000


def test_sync_interval_merges_commits(tmp_path: Path) -> None:
    """sync-interval: commits in between share a segment; sync() does not wait for it."""
    with closing(walship.connect(tmp_path / "a.db", tmp_path / "r", sync_interval="1h")) as db:
        replication = walship.replication(db)
        db.execute("create table t(x)")
        first = replication.sync(30)
        for n in range(50):
            db.execute("insert into t values(?)", (n,))
        assert replication.sync(30) == first + 1


def test_max_sync_wal_bytes_cuts_segments(tmp_path: Path) -> None:
    """max-sync-wal-bytes: a backlog goes out in several segments, each cut at a commit."""
    replica = tmp_path / "r"
    with closing(
        walship.connect(
            tmp_path / "a.db",
            replica,
            sync_interval="1h",
            max_sync_wal_bytes=100_000,
            min_checkpoint_page_count=1_000_000,
        )
    ) as db:
        replication = walship.replication(db)
        db.execute("create table t(x)")
        first = replication.sync(30)
        for _ in range(30):
            db.execute("insert into t values(randomblob(20000))")
        last = replication.sync(30)
        headers = [decode(path.read_bytes())[0] for path in segments(replica)[first:]]
        assert last - first > 3
        assert all(header.wal_size <= 200_000 for header in headers)


def test_page_encoding_frame(tmp_path: Path) -> None:
    """page-encoding: "frame" stores each page as an LZ4 frame, with page flags 0."""
    for encoding, flags in (("frame", 0), ("block", 1)):
        replica = tmp_path / encoding
        with closing(
            walship.connect(tmp_path / f"{encoding}.db", replica, page_encoding=encoding)
        ) as db:
            db.execute("create table t(x)")
            walship.replication(db).sync(30)
        assert int.from_bytes(segments(replica)[0].read_bytes()[104:106], "big") == flags


def test_restore_never_does_not_restore(tmp_path: Path) -> None:
    """restore: "if-missing" brings a missing database back, "never" refuses to fork its replica."""
    path, replica = tmp_path / "a.db", tmp_path / "r"
    with closing(walship.connect(path, replica)) as db:
        db.execute("create table t as select 42 as x")
    with pytest.raises(walship.ContinuityError, match="already ends at txid"):
        walship.connect(tmp_path / "other" / ".." / "b.db", replica, restore="never")
    with closing(walship.connect(tmp_path / "c.db", replica)) as db:
        assert db.execute("select x from t").get == 42


def test_adopt_makes_the_database_the_next_state(tmp_path: Path) -> None:
    """adopt: a database that does not continue its replica becomes the replica's next state."""
    replica = tmp_path / "r"
    for name, value in (("a.db", 1), ("b.db", 2)):
        with closing(apsw.Connection(str(tmp_path / name))) as plain:
            plain.pragma("journal_mode", "wal")
            plain.execute("create table t(x)")
            plain.execute("insert into t values(?)", (value,))
    walship.connect(tmp_path / "a.db", replica).close()
    with pytest.raises(walship.ContinuityError, match="adopt=True"):
        walship.connect(tmp_path / "b.db", replica)
    walship.connect(tmp_path / "b.db", replica, adopt=True).close()
    walship.restore(replica, tmp_path / "out.db")
    with closing(apsw.Connection(str(tmp_path / "out.db"))) as out:
        assert out.execute("select x from t").get == 2


def test_open_timeout_bounds_the_wait(
    tmp_path: Path, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    """open-timeout: opening goes on without the replica's answer, and says so."""
    path, replica = tmp_path / "a.db", tmp_path / "r"
    walship.connect(path, replica).close()
    stores.block(("list", "get", "head", "put"))
    with caplog.at_level(logging.WARNING):
        db = walship.connect(path, replica, open_timeout=0, shutdown_sync_timeout=0)
        db.execute("create table t(x)")
        assert walship.replication(db).status().state == "opening"
        with pytest.raises(walship.NotYetReplicated, match="safe on this disk"):
            walship.replication(db).sync(0.01)
        db.close()
    assert "does not answer" in caplog.text
    assert "shipped after the next open" in caplog.text


def test_max_spool_bytes_is_a_full_spool(tmp_path: Path, stores: Stores) -> None:
    """max-spool-bytes: beyond it a checkpoint meets a full spool, and spool-full decides."""
    path, replica = tmp_path / "a.db", tmp_path / "r"
    db = walship.connect(
        path,
        replica,
        max_spool_bytes=10_000,
        spool_full="fail",
        sync_interval=0,
        shutdown_sync_timeout=0,
    )
    db.execute("create table t(x)")
    walship.replication(db).sync(30)
    stores.block(("put",))
    with pytest.raises(walship.SpoolError, match="max-spool-bytes"):
        for _ in range(5):
            db.execute("insert into t values(randomblob(20000))")
            db.execute("pragma wal_checkpoint(truncate)").fetchall()
    stores.release()
    # The refused checkpoint had reset the wal-index already: sync() must not take that for "done".
    walship.replication(db).sync(30)
    walship.restore(replica, tmp_path / "out.db")
    db.execute("pragma wal_checkpoint(truncate)").fetchall()
    db.close()
    assert (tmp_path / "out.db").read_bytes() == path.read_bytes()


def test_another_replica_gets_nothing_of_the_first(tmp_path: Path, stores: Stores) -> None:
    """What was frozen for one replica and never arrived is not sent to another one."""
    path, first, second = tmp_path / "a.db", tmp_path / "r1", tmp_path / "r2"
    with closing(walship.connect(path, first, sync_interval=0, shutdown_sync_timeout=0)) as db:
        db.execute("create table t(x)")
        walship.replication(db).sync(30)
        stores.block(("put",))
        for n in range(3):
            db.execute("insert into t values(?)", (n,))
            with pytest.raises(walship.NotYetReplicated):
                walship.replication(db).sync(0.3)
    stores.release()
    with closing(walship.connect(path, second, sync_interval=0)) as db:
        assert walship.replication(db).sync(30) == 1
        db.execute("insert into t values(4)")
        assert walship.replication(db).sync(30) == 2
    assert len(segments(second)) == 2
    walship.restore(second, tmp_path / "out.db")
    assert (tmp_path / "out.db").read_bytes() == path.read_bytes()


def test_one_replica_for_two_databases_is_refused(tmp_path: Path) -> None:
    """Two databases of one process may not be shipped to the same place."""
    with (
        closing(walship.connect(tmp_path / "a.db", tmp_path / "r")),
        pytest.raises(walship.ConfigError, match="may not share one replica"),
    ):
        walship.connect(tmp_path / "b.db", tmp_path / "r", restore="never")


def test_sync_inside_a_write_transaction_is_refused(tmp_path: Path) -> None:
    """sync() would wait for the transaction that it is called in."""
    with closing(walship.connect(tmp_path / "a.db", tmp_path / "r")) as db:
        db.execute("create table t(x)")
        with db:
            db.execute("insert into t values(1)")
            with pytest.raises(walship.RefusedError, match="commit it first"):
                walship.replication(db).sync(30)
        assert walship.replication(db).sync(30) > 0


def test_walship_replica_is_the_one_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WALSHIP_REPLICA alone starts replication; $BUCKET_NAME in it is expanded."""
    monkeypatch.setenv("BUCKET_NAME", "here")
    with closing(walship.connect(tmp_path / "plain.db")) as db:
        db.execute("create table t(x)")
        with pytest.raises(walship.ClosedError, match="not replicated here"):
            walship.replication(db)
    monkeypatch.setenv("WALSHIP_REPLICA", f"{tmp_path}/$BUCKET_NAME")
    with closing(walship.connect(tmp_path / "app.db")) as db:
        db.execute("create table t(x)")
    store = LocalStore(tmp_path / "here", FakeClock())
    assert [info.key for info in store.list("ltx/0/")]
