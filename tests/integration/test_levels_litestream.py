"""Levels, snapshots, retention: the real Litestream restores, takes over and gives back."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

import walship
from support.clock import FakeClock
from support.litestream import Litestream, Place, in_bucket, in_directory
from support.replicas import golden_copy, local_store, manifest, sha256
from walship.replica.clock import SystemClock
from walship.replica.compaction import Levels
from walship.replica.config.levels import LevelSettings
from walship.replica.files import Files
from walship.replica.format.ltx import PageEncoding, decode
from walship.replica.merging import Input, Merge, carry_out
from walship.replica.plan import plan
from walship.replica.restore import list_replica, restore
from walship.replica.store.base import ObjectStore, SegmentInfo
from walship.replica.store.retrying import RetryingStore

#: Short, so that commits a few hundredths of a second apart lie in several intervals.
SETTINGS = LevelSettings(
    intervals_s=(0.2, 0.6, 1.8),
    snapshot_interval_s=5.0,
    snapshot_retention_s=5.0,
    l0_retention_s=0.5,
    l0_retention_check_interval_s=0.1,
)


@pytest.fixture(params=["directory", "minio", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty replica: a directory, and a path in a bucket of each S3 server."""
    if request.param == "directory":
        return in_directory(tmp_path / "replica")
    return in_bucket(request.getfixturevalue(f"{request.param}_server"))


def levels(
    store: ObjectStore, clock: FakeClock, directory: Path, settings: LevelSettings = SETTINGS
) -> Levels:
    """As the engine makes them, on a replica whose writer is not at work right now."""
    listing = list_replica(store)
    head = max(segment.max_txid for segment in listing if segment.level == 0)
    made = Levels(
        "app.db",
        store,
        clock,
        settings,
        directory=directory,
        files=Files(),
        prove=lambda: None,
        acked_txid=lambda: head,
    )
    newest = next(s for s in listing if s.level == 0 and s.max_txid == head)
    made.acknowledged(head, newest.size_bytes, newest.created_ms)
    return made


def patient(place: Place) -> ObjectStore:
    """The replica; a busy server may ask to try again."""
    return RetryingStore(place.store(), SystemClock(), attempts=5)


@contextlib.contextmanager
def database(path: Path, place: Place) -> Iterator[walship.Connection]:
    connection = walship.connect(path, place.ours, sync_interval=0.0)
    try:
        yield connection
    finally:
        connection.close(True)


class Both:
    """Restores with walship and with Litestream, and remembers what each TXID is."""

    def __init__(self, program: Path, directory: Path, path: Path, place: Place) -> None:
        self.litestream = Litestream(program, directory, path, place)
        self.place = place
        self.directory = directory
        self.known: dict[int, str] = {}
        self._n = 0

    def note(self) -> None:
        """What the newest TXID restores to, while it is fresh."""
        with contextlib.closing(patient(self.place)) as store:
            head = max(segment.max_txid for segment in list_replica(store))
            self.known[head] = self._ours(store, None)

    def _ours(self, store: ObjectStore, txid: int | None) -> str:
        output = self.directory / f"ours-{self._n}.db"
        self._n += 1
        restore(store, output, clock=SystemClock(), txid=txid, integrity_check="quick")
        return sha256(output)

    def compare(self) -> list[SegmentInfo]:
        """Every TXID at which a segment ends, from the oldest snapshot on, with both programs."""
        with contextlib.closing(patient(self.place)) as store:
            listing = sorted(list_replica(store))
            oldest = min((s.max_txid for s in listing if s.level == 9), default=1)
            txids = sorted({s.max_txid for s in listing if s.max_txid >= oldest})
            for txid in txids:
                assert plan(listing, txid=txid).max_txid == txid
                ours = self._ours(store, txid)
                assert self.known.setdefault(txid, ours) == ours
            for txid in {txids[0], *txids[:: max(1, len(txids) // 6)], txids[-1]}:
                output = self.directory / f"theirs-{self._n}.db"
                self._n += 1
                assert sha256(self.litestream.restore(output, txid)) == self.known[txid]
            assert (
                sha256(self.litestream.restore(self.directory / f"last-{self._n}.db"))
                == (self.known[txids[-1]])
            )
        return listing

    def listed(self) -> list[dict[str, object]]:
        """What `litestream ltx` says of all levels."""
        done = subprocess.run(
            [
                self.litestream.program,
                "ltx",
                "-level",
                "all",
                "-json",
                "-config",
                self.litestream.config,
                self.litestream.database,
            ],
            env=self.litestream.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found


def write(connection: apsw.Connection, n: int, both: Both, path: Path) -> None:
    for _ in range(n):
        connection.execute("INSERT INTO t (pad) VALUES (randomblob(600))")
        walship.replication(path).sync(30)
        both.note()
        time.sleep(0.03)


def contiguous(listing: list[SegmentInfo], level: int) -> bool:
    found = [segment for segment in listing if segment.level == level]
    return all(after.min_txid == before.max_txid + 1 for before, after in itertools.pairwise(found))


def test_litestream_restores_takes_over_and_gives_back(
    litestream: Path, place: Place, tmp_path: Path
) -> None:
    """One replica, written, compacted and cleaned up in turns."""
    path = tmp_path / "app.db"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    both = Both(litestream, tmp_path, path, place)
    store = patient(place)
    plain = apsw.Connection(str(path))
    plain.execute("PRAGMA journal_mode = WAL")
    plain.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, pad BLOB)")
    plain.execute(
        "INSERT INTO t (pad) WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n "
        "LIMIT 1500) SELECT randomblob(800) FROM n"
    )
    plain.close()
    with database(path, place) as connection:
        write(connection, 20, both, path)
        full_bytes = max(s.size_bytes for s in list_replica(store) if s.max_txid == 1)
        clock = FakeClock(SystemClock().now_ms() + 2500)
        ours = levels(store, clock, scratch, replace(SETTINGS, snapshot_interval_s=0.0))
        ours.step()
        listing = both.compare()
        assert {s.level for s in listing} == {0, 1, 2, 3, 9}
        assert all(contiguous(listing, level) for level in (0, 1, 2, 3))
        assert all(s.min_txid > 1 for s in listing if 1 <= s.level <= 3)
        clock.advance(1.0)
        ours.step()
        listing = both.compare()
        # The full copy, and what was written since in three levels: no second full copy.
        assert sum(s.min_txid == 1 for s in listing) == 1
        assert sum(s.size_bytes > full_bytes // 2 for s in listing) == 1
        write(connection, 8, both, path)
        clock = FakeClock(SystemClock().now_ms() + 5200)
        ours = levels(store, clock, scratch)
        ours.step()
        listing = both.compare()
        assert sum(s.level == 9 for s in listing) == 2
        write(connection, 4, both, path)
        clock = FakeClock(SystemClock().now_ms() + 11_000)
        ours = levels(store, clock, scratch)
        ours.step()
        clock.advance(5.1)
        ours.step()
        listing = both.compare()
    assert len(both.listed()) == len(listing)

    # Litestream goes on with it: with TXIDs, with level 1 where ours ended, with a snapshot.
    reached = max(s.max_txid for s in listing if s.level == 1)
    plain = apsw.Connection(str(path))
    with both.litestream.replicating():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            plain.execute("INSERT INTO t (pad) VALUES (randomblob(600))")
            time.sleep(0.1)
            after = list_replica(store)
            if sum(s.level == 1 and s.min_txid > reached for s in after) >= 2:
                break
    plain.close()
    listing = both.compare()
    assert contiguous(listing, 1)
    assert any(s.level == 1 and s.min_txid == reached + 1 for s in listing)

    # And walship goes on with what Litestream has compacted.
    reached = max(s.max_txid for s in listing if s.level == 1)
    with database(path, place) as connection:
        write(connection, 5, both, path)
        clock = FakeClock(SystemClock().now_ms() + 6_000)
        ours = levels(store, clock, scratch)
        ours.step()
        listing = both.compare()
        assert any(s.level == 1 and s.min_txid == reached + 1 for s in listing)
        assert contiguous(listing, 1)
        clock.advance(11.0)
        ours.step()
        both.compare()
    store.close()


GOLDEN = ["a-4096-levels", "c-vacuum-shrink", "d-incremental-vacuum", "e-mixed-frame-block"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_compactions(name: str, tmp_path: Path) -> None:
    """What Litestream has merged, merged again from the same inputs: equal headers and pages."""
    root = golden_copy(name, tmp_path)
    store = local_store(root)
    listing = sorted(list_replica(store))
    files = {(f["level"], f["min_txid"], f["max_txid"]): f for f in manifest(name)["files"]}
    n_compared = 0
    for target in listing:
        if not 1 <= target.level <= 8:
            continue
        inputs = tuple(
            s
            for s in listing
            if s.level == target.level - 1
            and target.min_txid <= s.min_txid
            and s.max_txid <= target.max_txid
        )
        if not inputs or inputs[0].min_txid != target.min_txid:
            continue
        theirs_header, theirs = decode((root / target.key).read_bytes())
        path = tmp_path / "merged.ltx"
        job = Merge(
            inputs=[Input(segment) for segment in inputs],
            min_txid=target.min_txid,
            max_txid=target.max_txid,
            timestamp_ms=inputs[-1].created_ms,
            encoding=PageEncoding.BLOCK,
            path=path,
            key=f"ours/{target.key}",
            conditional=True,
        )
        carry_out(job, store, Files(), may_put=lambda: None)
        header, pages = decode(path.read_bytes())
        assert header == theirs_header
        assert pages == theirs
        recorded = files[target.level, target.min_txid, target.max_txid]
        assert len(pages) == recorded["pages"]
        n_compared += 1
    assert n_compared >= 2
