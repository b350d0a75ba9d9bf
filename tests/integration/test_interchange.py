"""Replicas go back and forth between walship and the real Litestream.

Either restores what the other wrote, at every TXID; either goes on with a replica that the other
began, also after it was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import walship
from support.litestream import Litestream, Place, in_bucket, in_directory
from support.replicas import GOLDEN, golden_copy, sha256
from support.servers import S3Endpoint
from walship.replica.clock import SystemClock
from walship.replica.restore import restore

CLOCK = SystemClock()


@pytest.fixture(params=["directory", "minio", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty replica: a directory, and a path in a bucket of each S3 server."""
    if request.param == "directory":
        return in_directory(tmp_path / "replica")
    server: S3Endpoint = request.getfixturevalue(f"{request.param}_server")
    return in_bucket(server)


@pytest.fixture
def directory(tmp_path: Path) -> Place:
    """An empty directory replica."""
    return in_directory(tmp_path / "replica")


@dataclass
class World:
    """One database, one replica, and both programs."""

    place: Place
    database: Path
    litestream: Litestream
    scratch: Path
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    n_restored: int = 0

    # -- writing --------------------------------------------------------------------------------

    def connect(self, **settings: Any) -> walship.Connection:
        """Open the database through walship."""
        return walship.connect(self.database, replica=self.place.ours, **settings)

    def rows(self) -> list[tuple[int, bytes]]:
        """Fresh rows of various lengths, with pages of overflow among them."""
        rng = self.rng
        return [
            (rng.randrange(1000), rng.randbytes(rng.choice((5, 80, 900, 9000)))) for _ in range(60)
        ]

    def write_with_walship(self, steps: int = 8, **settings: Any) -> dict[int, str]:
        """Commit a small history, synced after each step; contents by TXID."""
        states = {}
        db = self.connect(**settings)
        try:
            db.execute("create table if not exists t (id integer primary key, k int, b blob)")
            db.execute("create index if not exists ti on t (k)")
            for step in range(steps):
                if step == 4:
                    db.execute("delete from t where id % 4 <> 0")
                    db.execute("vacuum")
                elif step == 5:
                    db.execute("pragma wal_checkpoint(truncate)")
                    db.execute("update t set k = k + 1 where id % 7 = 1")
                else:
                    with db:
                        db.executemany("insert into t (k, b) values (?, ?)", self.rows())
                    db.execute("update t set k = k + 1 where id % 7 = ?", (step,))
                states[walship.replication(db).sync(timeout=60)] = content(db)
        finally:
            db.close()
        return states

    def write_plainly(self, steps: int = 4) -> str:
        """Commit with plain SQLite, as an application beside Litestream does; the content."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=20)) as db:
            db.execute("pragma journal_mode=wal")
            db.execute("create table if not exists t (id integer primary key, k int, b blob)")
            for step in range(steps):
                with db:
                    db.executemany("insert into t (k, b) values (?, ?)", self.rows())
                    db.execute("update t set k = k + 1 where id % 5 = ?", (step,))
                time.sleep(0.05)
            return content(db)

    # -- reading --------------------------------------------------------------------------------

    def restore_both(self, txid: int | None = None) -> str:
        """Restore with both programs, which must give the same bytes; the content."""
        self.n_restored += 1
        theirs = self.scratch / f"theirs-{self.n_restored}.db"
        ours = self.scratch / f"ours-{self.n_restored}.db"
        self.litestream.restore(theirs, txid)
        with contextlib.closing(self.place.store()) as store:
            restore(store, ours, clock=CLOCK, txid=txid, integrity_check="full")
        assert sha256(ours) == sha256(theirs), txid
        return content_of(ours)

    def restored(self) -> str | None:
        """The content that walship restores now, or None if there is nothing yet."""
        output = self.scratch / "polled.db"
        with contextlib.closing(self.place.store()) as store:
            try:
                restore(store, output, clock=CLOCK, overwrite=True)
            except walship.ReplicaError:
                return None
        return content_of(output)

    def wait_for(self, wanted: str) -> None:
        """Wait until the replica holds this content."""
        deadline = time.monotonic() + 40
        while self.restored() != wanted:
            assert time.monotonic() < deadline, self.litestream.log.read_text()
            time.sleep(0.05)


def content(db: Any) -> str:
    """A digest of every row of every table but Litestream's, through either SQLite library."""
    tables = db.execute(
        "select name, sql from sqlite_schema where type = 'table'"
        " and substr(name, 1, 11) <> '_litestream' order by name"
    ).fetchall()
    rows = [list(db.execute(f'select * from "{name}" order by rowid')) for name, _ in tables]
    return hashlib.sha256(repr((tables, rows)).encode()).hexdigest()


def content_of(path: Path | str) -> str:
    """The same for a file that nobody has open; it must be sound."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        return content(db)


@pytest.fixture
def make_world(litestream: Path, tmp_path: Path) -> Callable[[Place], World]:
    """A database that is to be replicated to a place."""

    def make(place: Place) -> World:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        database = tmp_path / "machine" / "app.db"
        database.parent.mkdir()
        return World(place, database, Litestream(litestream, tmp_path, database, place), scratch)

    return make


# --- walship writes, Litestream restores ---------------------------------------------------------


def check_every_txid(world: World, states: Mapping[int, str]) -> None:
    """Every TXID restores alike with both programs, and to the content it had."""
    txids = world.place.txids()
    assert set(states) <= set(txids)
    for txid in txids:
        found = world.restore_both(txid)
        assert found == states.get(txid, found), f"{txid:x}"
    assert world.restore_both() == states[max(states)]


def test_litestream_restores_what_walship_wrote(
    make_world: Callable[[Place], World], place: Place
) -> None:
    """Litestream restores a walship replica at every TXID, byte for byte as walship does, and the
    newest state is the database file itself."""
    world = make_world(place)
    check_every_txid(world, world.write_with_walship())
    newest = world.litestream.restore(world.scratch / "newest.db")
    assert sha256(newest) == sha256(world.database)


@pytest.mark.parametrize("page_size", [512, 1024, 65536])
def test_every_page_size_is_restored(
    make_world: Callable[[Place], World], directory: Place, page_size: int
) -> None:
    """The same for the smallest and the largest pages."""
    world = make_world(directory)
    check_every_txid(world, world.write_with_walship(page_size=page_size))


def test_frame_encoding_is_restored(make_world: Callable[[Place], World], directory: Place) -> None:
    """Litestream restores segments written with page_encoding="frame" as well."""
    world = make_world(directory)
    check_every_txid(world, world.write_with_walship(page_encoding="frame"))


# --- Litestream writes, walship restores ---------------------------------------------------------


def test_walship_restores_what_litestream_wrote(
    make_world: Callable[[Place], World], place: Place
) -> None:
    """walship restores a replica that a running Litestream writes and compacts, at every TXID."""
    world = make_world(place)
    with world.litestream.replicating():
        written = world.write_plainly()
        world.wait_for(written)
        time.sleep(1.2)  # a compaction has run
    for txid in world.place.txids():
        world.restore_both(txid)
    assert world.restore_both() == written


# --- Litestream goes on where walship ended ------------------------------------------------------


def test_litestream_takes_over(make_world: Callable[[Place], World], place: Place) -> None:
    """Litestream, pointed at a walship replica and its database, continues the TXIDs; every state
    of before and after restores alike with both programs."""
    world = make_world(place)
    states = world.write_with_walship()
    last = max(states)
    with world.litestream.replicating():
        written = world.write_plainly()
        world.wait_for(written)
    assert world.place.txids()[-1] > last
    for txid in world.place.txids():
        found = world.restore_both(txid)
        assert found == states.get(txid, found)
    assert world.restore_both() == written


# --- walship goes on where Litestream ended ------------------------------------------------------


def test_walship_takes_over(make_world: Callable[[Place], World], place: Place) -> None:
    """walship, pointed at a Litestream replica and its database, finds that they are the same
    page for page and continues at the next TXID without a full copy."""
    world = make_world(place)
    with world.litestream.replicating():
        world.wait_for(world.write_plainly())
    last = world.place.txids()[-1]
    db = world.connect()
    try:
        db.execute("update t set k = -1 where id = 1")
        txid = walship.replication(db).sync(timeout=60)
        status = walship.replication(db).status()
        written = content(db)
    finally:
        db.close()
    assert txid == last + 1
    assert status.upload_bytes < 12_000  # a page or two of a database of several hundred
    assert world.restore_both() == written
    states = world.write_with_walship(4)
    for txid, state in states.items():
        assert world.restore_both(txid) == state


def test_walship_takes_over_from_the_killed(
    make_world: Callable[[Place], World], place: Place
) -> None:
    """Litestream was killed before it had shipped the last commits: walship takes over its
    replica, and nothing is missing."""
    world = make_world(place)
    with world.litestream.replicating(end=signal.SIGKILL):
        world.wait_for(world.write_plainly())
    last = world.place.txids()[-1]
    written = world.write_plainly()  # nobody ships these
    db = world.connect()
    try:
        txid = walship.replication(db).sync(timeout=60)
        assert content(db) == written
    finally:
        db.close()
    assert txid == last + 1
    assert world.restore_both() == written
    assert world.restore_both(txid) == written


def test_walship_takes_over_in_the_middle_of_writing(
    make_world: Callable[[Place], World], directory: Place
) -> None:
    """Litestream is killed while the application commits, at a moment that nobody chose."""
    world = make_world(directory)
    with world.litestream.replicating(end=signal.SIGKILL):
        world.wait_for(world.write_plainly(2))
        written = world.write_plainly(6)
    db = world.connect()
    try:
        txid = walship.replication(db).sync(timeout=60)
    finally:
        db.close()
    assert world.restore_both(txid) == written
    assert world.restore_both() == written


def test_another_database_is_refused(
    make_world: Callable[[Place], World], directory: Place, tmp_path: Path
) -> None:
    """A Litestream replica is not continued by a database that is not the one it holds."""
    world = make_world(directory)
    with world.litestream.replicating():
        world.wait_for(world.write_plainly())
    before = world.place.txids()
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as db:
        db.execute("create table somebody_elses (x)")
        db.commit()
    with pytest.raises(walship.ContinuityError, match="adopt=True"):
        walship.connect(other, replica=world.place.ours)
    assert world.place.txids() == before


# --- back and forth ------------------------------------------------------------------------------


def test_back_and_forth(make_world: Callable[[Place], World], place: Place) -> None:
    """walship, Litestream, walship, Litestream and walship write one history; every state that
    walship noted restores with both programs."""
    world = make_world(place)
    states = world.write_with_walship(3)
    for end in (signal.SIGTERM, signal.SIGKILL):
        with world.litestream.replicating(end):
            world.wait_for(world.write_plainly(2))
        more = world.write_with_walship(3)
        assert min(more) > max(states)
        states.update(more)
    for txid, state in states.items():
        assert world.restore_both(txid) == state, f"{txid:x}"
    assert world.restore_both() == states[max(states)]


def test_a_new_machine_goes_on(make_world: Callable[[Place], World], place: Place) -> None:
    """The machine is lost while Litestream replicates: walship restores on a new one and goes on
    incrementally; then Litestream does the same the other way round."""
    world = make_world(place)
    with world.litestream.replicating(signal.SIGKILL):
        written = world.write_plainly()
        world.wait_for(written)
    last = world.place.txids()[-1]
    lose_machine(world.database)

    db = world.connect()
    try:
        assert content(db) == written
        db.execute("update t set k = -2 where id = 1")
        assert walship.replication(db).sync(timeout=60) == last + 1
        assert walship.replication(db).status().upload_bytes < 12_000
        written = content(db)
    finally:
        db.close()
    lose_machine(world.database)

    world.litestream.restore(world.database)
    assert content_of(world.database) == written
    with world.litestream.replicating():
        written = world.write_plainly(2)
        world.wait_for(written)
    assert world.restore_both() == written


def lose_machine(database: Path) -> None:
    """Delete everything beside the database, state directories too."""
    for path in sorted(database.parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


# --- Litestream 0.3 ------------------------------------------------------------------------------


def test_old_layout_is_restored_and_continued(
    make_world: Callable[[Place], World], directory: Place, tmp_path: Path
) -> None:
    """A replica of Litestream 0.3 restores when its database is opened; new commits go beside it
    in the current layout, and both programs restore those."""
    name = "f-v03-generations"
    golden_copy(name, tmp_path / "copied").rename(tmp_path / "replica")
    world = make_world(directory)
    db = world.connect()
    try:
        assert content(db) == content_of(shutil.copy(GOLDEN / name / "latest.db", tmp_path))
        db.execute("create table newer (x)")
        db.execute("insert into newer values (3)")
        assert walship.replication(db).sync(timeout=60) > 0
        written = content(db)
    finally:
        db.close()
    assert world.restore_both() == written
