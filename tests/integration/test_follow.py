"""Copies that follow a replica: whole states for readers, kills, levels, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import Database, assert_same_bytes
from support.faulty import FaultyStore
from support.history import History
from support.replicas import golden_copy, local_store, manifest, sha256, write_segment
from walship.replica.clock import SystemClock
from walship.replica.errors import (
    ContinuityError,
    FormatError,
    ObjectNotFound,
    OutputExistsError,
    RestoreError,
)
from walship.replica.follow import Follower, follow, note_path, update
from walship.replica.format.ltx import Encoder, Header
from walship.replica.format.merge import MergeInput, merge
from walship.replica.format.types import format_segment_name
from walship.replica.restore import restore
from walship.replica.store.local import LocalStore

CLOCK = SystemClock()
GOLDEN_SETS = [
    "a-4096-levels",
    "b-512",
    "b-65536",
    "c-vacuum-shrink",
    "d-incremental-vacuum",
    "e-mixed-frame-block",
]


class Source:
    """A database with a history, and its replica in a directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.history = History(seed=4)
        self.database = Database(directory)
        self.connection = self.database.connect()
        self.n = 0

    def write(self, count: int = 1) -> int:
        """Some transactions, each in a segment of its own; the newest TXID."""
        for _ in range(count):
            self.history.apply(self.connection, self.n)
            self.n += 1
            txid = self.sync()
        return txid

    def sync(self) -> int:
        return walship.replication(self.connection).sync(30)

    @property
    def root(self) -> Path:
        return self.database.replica

    def segment(self, level: int, min_txid: int, max_txid: int) -> Path:
        return self.root / "ltx" / str(level) / format_segment_name(min_txid, max_txid)

    def compact(self, level: int, min_txid: int, max_txid: int) -> None:
        """Replace segments of level 0 by one of a higher level; the newest one stays."""
        inputs = [self.segment(0, txid, txid) for txid in range(min_txid, max_txid + 1)]
        target = self.segment(level, min_txid, max_txid)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            merge(
                [MergeInput(path.read_bytes(), name=path.name) for path in inputs],
                file.writelines,
            )
        newest = max((self.root / "ltx" / "0").iterdir())
        for path in inputs:
            if path != newest:
                path.unlink()

    def snapshot(self, directory: Path, txid: int) -> None:
        """Put a snapshot of the newest state into level 9."""
        whole = directory / f"snapshot-{txid}.db"
        made = restore(local_store(self.root), whole, clock=CLOCK, txid=txid)
        content = whole.read_bytes()
        target = self.segment(9, 1, txid)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = Header(
            page_size=made.page_size,
            commit=made.commit,
            min_txid=1,
            max_txid=txid,
            timestamp_ms=CLOCK.now_ms(),
            wal_offset=32,
        )
        with target.open("wb") as file:
            encoder = Encoder(file.writelines, header)
            for pgno in range(1, made.commit + 1):
                start = (pgno - 1) * made.page_size
                encoder.add_page(pgno, content[start : start + made.page_size])
            encoder.finish()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    made = Source(tmp_path / "source")
    yield made
    made.connection.close(True)


class CountingStore(LocalStore):
    """Counts requests by kind."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, CLOCK)
        self.lists: list[str] = []
        self.gets = 0

    def list(self, prefix: str, start_after: str | None = None):  # type: ignore[no-untyped-def]
        self.lists.append(prefix)
        return super().list(prefix, start_after)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.gets += 1
        return super().get(key, start, length)


def assert_restored(root: Path, output: Path, txid: int, directory: Path) -> None:
    """The output is what a restore to the same TXID makes, byte for byte."""
    expected = directory / f"expected-{txid}.db"
    if not expected.exists():
        restore(local_store(root), expected, clock=CLOCK, txid=txid)
    assert_same_bytes(output, expected)


def test_what_is_equal_is_not_written(source: Source, tmp_path: Path) -> None:
    """Of a snapshot only the pages that differ go into the copy."""
    source.connection.execute("CREATE TABLE ballast (content BLOB)")
    for _ in range(50):
        source.connection.execute("INSERT INTO ballast VALUES (randomblob(3500))")
    first = source.sync()
    output = tmp_path / "copy.db"
    update(local_store(source.root), output, clock=CLOCK)
    source.connection.execute("UPDATE ballast SET content = randomblob(3500) WHERE rowid = 25")
    last = source.sync()
    source.snapshot(tmp_path, last)
    for txid in range(first, last):
        source.segment(0, txid, txid).unlink()
    source.segment(0, last, last).rename(tmp_path / "newest")
    step = update(local_store(source.root), output, clock=CLOCK)
    assert (step.txid, step.n_segments, step.n_pages) == (last, 1, 1)
    (tmp_path / "newest").rename(source.segment(0, last, last))
    assert_restored(source.root, output, last, tmp_path)


def test_what_goes_back_behind_a_snapshot(source: Source, tmp_path: Path) -> None:
    """A page that a snapshot changes, and a later segment makes what it was, is what it was."""
    source.connection.execute("CREATE TABLE rows (n INTEGER)")
    source.connection.execute("INSERT INTO rows VALUES (2)")
    first = source.sync()
    output = tmp_path / "copy.db"
    update(local_store(source.root), output, clock=CLOCK)
    source.connection.execute("UPDATE rows SET n = 3")
    middle = source.sync()
    source.snapshot(tmp_path, middle)
    source.connection.execute("UPDATE rows SET n = 2")
    last = source.sync()
    for txid in range(first, middle + 1):
        source.segment(0, txid, txid).unlink()
    step = update(local_store(source.root), output, clock=CLOCK)
    assert (step.txid, step.n_segments) == (last, 2)
    assert_restored(source.root, output, last, tmp_path)


def test_readers_see_whole_states(source: Source, tmp_path: Path) -> None:
    """Plain SQLite reads a state of the history at any time; one that reads keeps its own."""
    source.write(3)
    output = tmp_path / "copy.db"
    follower, _ = Follower.open(local_store(source.root), output, clock=CLOCK)
    reader = apsw.Connection(str(output), flags=apsw.SQLITE_OPEN_READONLY)
    held = apsw.Connection(str(output))
    with closing(follower), closing(reader), closing(held):
        assert source.history.length(reader) == 3
        held.execute("BEGIN")
        assert source.history.length(held) == 3
        for _ in range(12):
            txid = source.write()
            if source.n == 9:
                source.connection.execute("VACUUM")
                txid = source.sync()
            step = follower.step()
            assert step is not None
            assert step.txid == txid == follower.txid
            assert source.history.length(reader) == source.n
            assert reader.pragma("integrity_check") == "ok"
            assert source.history.length(held) == 3
        assert follower.step() is None
        held.execute("COMMIT")
        assert source.history.length(held) == source.n
    assert_restored(source.root, output, txid, tmp_path)
    assert note_path(output).read_text().splitlines()[0] == f"{txid:016x}"


_READER = """
import json, select, sqlite3, sys
uri, reopen = sys.argv[1], sys.argv[2] == "reopen"
seen, faults, n = [], [], 0
db = sqlite3.connect(uri, uri=True, timeout=30)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    if reopen and n % 5 == 0:
        db.close()
        db = sqlite3.connect(uri, uri=True, timeout=30)
    low, high, count = db.execute("SELECT min(x), max(x), count(*) FROM t").fetchone()
    if low != high or (seen and low < seen[-1]):
        faults.append([low, high, seen[-1:]])
    if n % 20 == 0 and db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        faults.append("not sound")
    seen.append(low)
    n += 1
print(json.dumps([len(set(seen)), faults]))
"""


def test_many_readers_in_other_processes(source: Source, tmp_path: Path) -> None:
    """Readers that read all the time see one state after the other, each whole, none again."""
    db = source.connection
    db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, x)")
    db.execute(
        "WITH r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 500) "
        "INSERT INTO t SELECT n, 0 FROM r"
    )
    source.sync()
    output = tmp_path / "copy.db"
    follower, _ = Follower.open(local_store(source.root), output, clock=CLOCK)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, f"file:{output}{more}", reopen],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for more, reopen in (("", "stay"), ("?mode=ro", "reopen"))
    ]
    with closing(follower):
        for each in readers:
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        for x in range(1, 81):
            db.execute("UPDATE t SET x = ?", (x,))
            if x % 10 == 0:
                db.execute("DELETE FROM t WHERE n > ?", (500 - 3 * x,))
                db.execute("VACUUM")
            source.sync()
            follower.step()
            follower.copy.trim(at_bytes=50_000)
            follower._end = follower.copy.end()
        for each in readers:
            output_of, _ = each.communicate("stop", timeout=60)
            n_states, faults = json.loads(output_of)
            assert faults == []
            assert n_states > 1
            assert each.returncode == 0


def test_an_idle_look_is_one_request(source: Source, tmp_path: Path) -> None:
    """Nothing new: one LIST, of level 0.  Something new: one LIST, and one GET for each segment."""
    source.write(5)
    store = CountingStore(source.root)
    follower, _ = Follower.open(store, tmp_path / "copy.db", clock=CLOCK)
    with closing(follower):
        store.lists.clear()
        store.gets = 0
        for _ in range(3):
            assert follower.step() is None
        assert store.lists == ["ltx/0/"] * 3
        source.write(4)
        assert follower.step() is not None
        assert (store.lists, store.gets) == (["ltx/0/"] * 4, 4)


def test_resumes_through_levels(source: Source, tmp_path: Path) -> None:
    """A copy whose next segments were compacted and deleted goes on through the levels."""
    source.write(3)
    output = tmp_path / "copy.db"
    start = update(local_store(source.root), output, clock=CLOCK).txid
    last = source.write(20)
    source.compact(1, start - 1, start + 6)  # overlaps what the copy holds
    source.compact(2, start + 7, start + 12)
    source.compact(1, start + 13, last)
    step = update(local_store(source.root), output, clock=CLOCK)
    assert (step.txid, step.n_segments) == (last, 3)
    assert_restored(source.root, output, last, tmp_path)


@pytest.mark.parametrize("with_reader", [False, True])
def test_resumes_from_a_snapshot(source: Source, tmp_path: Path, with_reader: bool) -> None:
    """Where only a snapshot leads on, the pages that differ are written, and what follows it."""
    source.write(3)
    output = tmp_path / "copy.db"
    start = update(local_store(source.root), output, clock=CLOCK).txid
    middle = source.write(10)
    source.snapshot(tmp_path, middle)
    last = source.write(2)
    for txid in range(1, middle + 1):
        source.segment(0, txid, txid).unlink(missing_ok=True)
    reader = apsw.Connection(str(output))
    with closing(reader):
        if with_reader:
            reader.execute("BEGIN")
            assert source.history.length(reader) == 3
        step = update(local_store(source.root), output, clock=CLOCK)
        assert (step.txid, step.n_segments) == (last, 3)
        assert start < middle < last
        if with_reader:
            assert source.history.length(reader) == 3
            reader.execute("COMMIT")
        assert source.history.length(reader) == source.n
    update(local_store(source.root), output, clock=CLOCK)
    assert_restored(source.root, output, last, tmp_path)


@pytest.mark.parametrize("name", GOLDEN_SETS)
def test_litestreams_replicas_are_followed_from_every_txid(name: str, tmp_path: Path) -> None:
    """From each recorded state to each later one and to the newest, byte for byte."""
    root = golden_copy(name, tmp_path)
    recorded = {int(txid, 16): facts["sha256"] for txid, facts in manifest(name)["txids"].items()}
    newest = manifest(name)["latest"]["sha256"]
    output = tmp_path / "copy.db"
    for first in recorded:
        update(local_store(root), output, clock=CLOCK, txid=first, overwrite=True)
        update(local_store(root), output, clock=CLOCK)
        assert sha256(output) == newest
    update(local_store(root), output, clock=CLOCK, txid=min(recorded), overwrite=True)
    for txid in sorted(recorded):
        update(local_store(root), output, clock=CLOCK, txid=txid)
        assert sha256(output) == recorded[txid]


@pytest.mark.parametrize("reader", [False, True])
def test_killed_at_any_point(source: Source, tmp_path: Path, reader: bool) -> None:
    """SIGKILL before every single operation leaves one of two states, and the copy goes on."""
    # Transactions that share no page: a mixture of two states is never a state by chance.
    db = source.connection
    db.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, content BLOB)")
    for row in range(20):
        db.execute("INSERT INTO rows VALUES (?, zeroblob(3000))", (row,))
    txids = [source.sync()]
    for row in range(8):
        db.execute("UPDATE rows SET content = randomblob(3000) WHERE n = ?", (2 * row,))
        if row == 2:
            db.execute("INSERT INTO rows VALUES (99, randomblob(3000))")
        txids.append(source.sync())
    txids = [txids[0], txids[5], txids[8]]
    program = Path(__file__).resolve().parents[1] / "support" / "following.py"
    done = subprocess.run(
        [
            sys.executable,
            str(program),
            str(source.root),
            str(tmp_path / "copy.db"),
            *map(str, txids),
            *(["--reader"] if reader else []),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) >= 10


@pytest.fixture
def copied(source: Source, tmp_path: Path) -> Path:
    """A copy that was brought up to date and closed, and has fallen behind since."""
    source.write(3)
    output = tmp_path / "copy.db"
    update(local_store(source.root), output, clock=CLOCK)
    source.write(2)
    return output


def write_to(path: Path, *, mode: str = "") -> None:
    with closing(sqlite3.connect(path)) as connection:
        if mode:
            connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("UPDATE cells SET v = v + 1")
        connection.commit()


@pytest.mark.parametrize("mode", ["", "delete"])
def test_a_copy_that_was_written_to_is_refused(source: Source, copied: Path, mode: str) -> None:
    """Somebody has committed to the closed copy: one clear error, and the file stays as it is."""
    write_to(copied, mode=mode)
    before = copied.read_bytes()
    with pytest.raises(ContinuityError, match=r"another program has written to .*-force"):
        update(local_store(source.root), copied, clock=CLOCK)
    assert copied.read_bytes() == before
    step = update(local_store(source.root), copied, clock=CLOCK, overwrite=True)
    assert source.history.length_of(copied) == source.n
    assert step.txid == walship.replication(source.connection).status().txid


def test_a_copy_that_is_written_to_meanwhile_is_refused(source: Source, copied: Path) -> None:
    """Somebody commits while the copy is open: nothing is applied on top of that."""
    follower, _ = Follower.open(local_store(source.root), copied, clock=CLOCK)
    with closing(follower):
        follower.step()
        source.write()
        write_to(copied)
        with pytest.raises(ContinuityError, match="another program has written to"):
            follower.step()


def test_a_log_that_others_left_is_no_state(source: Source, copied: Path) -> None:
    """Somebody has committed to the copy and was killed: the commit is in the log alone."""
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
            " db.execute('UPDATE cells SET v = v + 1'); db.commit(); os._exit(0)",
            str(copied),
        ],
        check=True,
    )
    assert copied.with_name("copy.db-wal").stat().st_size > 0
    with pytest.raises(ContinuityError, match="another program has written to"):
        update(local_store(source.root), copied, clock=CLOCK)


def test_reading_is_no_change(source: Source, copied: Path) -> None:
    """Programs that open, read and close the copy between two updates do not matter."""
    for _ in range(2):
        with closing(sqlite3.connect(copied)) as connection:
            assert connection.execute("SELECT count(*) FROM steps").fetchone()
        update(local_store(source.root), copied, clock=CLOCK)
        assert source.history.length_of(copied) == source.n
        source.write()


def test_two_followers_of_one_output(source: Source, copied: Path) -> None:
    """The second to apply something is refused; the copy is a state all the time."""
    store = local_store(source.root)
    one, _ = Follower.open(store, copied, clock=CLOCK)
    other, _ = Follower.open(store, copied, clock=CLOCK)
    with closing(one):
        one.step()
        with pytest.raises(ContinuityError):
            other.step()
        other.copy.close()
        source.write()
        one.step()
    assert source.history.length_of(copied) == source.n


def test_a_replica_that_was_reset_is_noticed(source: Source, copied: Path, tmp_path: Path) -> None:
    """Fewer TXIDs, none, or other segments under the same TXIDs: an error, and the copy stays."""
    store = local_store(source.root)
    update(store, copied, clock=CLOCK)
    before = copied.read_bytes()
    other = Source(tmp_path / "other")
    try:
        for count in (1, 10):
            other.write(count)
            with pytest.raises(ContinuityError, match=r"not the one that .* was restored from"):
                update(local_store(other.root), copied, clock=CLOCK)
        with pytest.raises(ContinuityError, match="it is empty"):
            update(local_store(tmp_path / "nothing"), copied, clock=CLOCK)
    finally:
        other.connection.close(True)
    assert copied.read_bytes() == before
    assert update(store, copied, clock=CLOCK).n_segments == 0


def test_files_without_a_note_are_left_alone(source: Source, tmp_path: Path) -> None:
    """A file of which nobody knows the TXID is neither followed into nor replaced."""
    source.write(2)
    output = tmp_path / "copy.db"
    restore(local_store(source.root), output, clock=CLOCK)
    before = output.read_bytes()
    with pytest.raises(OutputExistsError, match=r"no copy.db-txid beside it"):
        update(local_store(source.root), output, clock=CLOCK)
    note_path(output).write_text("nonsense\n")
    with pytest.raises(RestoreError, match=r"copy.db-txid cannot be used"):
        update(local_store(source.root), output, clock=CLOCK)
    assert output.read_bytes() == before


def test_goes_on_from_litestreams_note(source: Source, tmp_path: Path) -> None:
    """A note that holds a TXID and nothing else is enough."""
    txid = source.write(3)
    output = tmp_path / "copy.db"
    restore(local_store(source.root), output, clock=CLOCK)
    note_path(output).write_text(f"{txid:016x}\n")
    last = source.write(2)
    assert update(local_store(source.root), output, clock=CLOCK).n_segments == 2
    assert_restored(source.root, output, last, tmp_path)


def test_a_damaged_segment_changes_nothing(source: Source, copied: Path) -> None:
    """Damage is found before anything of its transaction shows."""
    newest = max((source.root / "ltx" / "0").iterdir())
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-40] + bytes(40))
    n = source.history.length_of(copied)
    with pytest.raises(FormatError):
        update(local_store(source.root), copied, clock=CLOCK)
    assert source.history.length_of(copied) == n
    newest.write_bytes(whole)
    update(local_store(source.root), copied, clock=CLOCK)
    assert source.history.length_of(copied) == source.n


def test_the_copy_does_not_go_back(source: Source, copied: Path) -> None:
    """A target before the state of the copy is an error that says what the copy holds."""
    with pytest.raises(RestoreError, match=r"holds TXID .* already, which is newer"):
        update(local_store(source.root), copied, clock=CLOCK, txid=1)


def test_replicas_of_litestream_03_are_not_followed(tmp_path: Path) -> None:
    """They have no TXIDs; nothing is left behind."""
    root = golden_copy("f-v03-generations", tmp_path)
    with pytest.raises(RestoreError, match=r"Litestream 0.3"):
        update(local_store(root), tmp_path / "copy.db", clock=CLOCK)
    assert not (tmp_path / "copy.db").exists()


def test_a_database_that_is_not_in_wal_mode(tmp_path: Path) -> None:
    """The copy is in WAL mode from the start, so that being killed once it is open is no change."""
    original = tmp_path / "app.db"
    root = tmp_path / "replica"
    with closing(sqlite3.connect(original)) as db:
        for txid in range(1, 4):
            db.execute(f"CREATE TABLE t{txid} (n)")
            db.commit()
            content = original.read_bytes()
            pages = {n + 1: content[n * 4096 :][:4096] for n in range(len(content) // 4096)}
            write_segment(root, 0, txid, txid, len(pages), pages, page_size=4096)
    output = tmp_path / "copy.db"
    store = local_store(root)
    follower, _ = Follower.open(store, output, clock=CLOCK, txid=1)
    follower.copy.close()  # as a kill would: no word in the note
    assert update(store, output, clock=CLOCK).txid == 3
    with closing(sqlite3.connect(output)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert len(db.execute("SELECT * FROM sqlite_schema").fetchall()) == 3
    copied, whole = output.read_bytes(), original.read_bytes()
    assert copied[:18] + copied[20:] == whole[:18] + whole[20:]


class VanishingStore(LocalStore):
    """Compaction comes between each listing and its reads, some times."""

    def __init__(self, root: Path, times: int, compact: Callable[[], None]) -> None:
        super().__init__(root, CLOCK)
        self.times = times
        self.compact = compact

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if key.startswith("ltx/0/") and self.times:
            self.times -= 1
            self.compact()
            raise ObjectNotFound(f"no such file: {key}")
        return super().get(key, start, length)


def test_segments_that_vanish_lead_to_a_new_plan(source: Source, copied: Path) -> None:
    """A segment compacted away between listing and reading is found in its new place."""
    last = source.write(3)
    store = VanishingStore(source.root, 1, lambda: source.compact(1, last - 4, last))
    step = update(store, copied, clock=CLOCK)
    assert (step.txid, step.n_segments) == (last, 1)
    assert source.history.length_of(copied) == source.n


def test_plans_do_not_go_on_for_ever(source: Source, copied: Path) -> None:
    """A replica that lists what it never gives is an error after a few plans."""
    store = VanishingStore(source.root, 10**6, lambda: None)
    n = source.history.length_of(copied)
    with pytest.raises(RestoreError, match="listed but cannot be read, 5 times"):
        update(store, copied, clock=CLOCK)
    assert source.history.length_of(copied) == n


def test_an_outage_is_waited_for(source: Source, tmp_path: Path) -> None:
    """While the store does not answer nothing ends, and pauses grow; then it goes on."""
    source.write(2)
    store = FaultyStore(local_store(source.root))
    waits: list[float] = []
    reached: list[int] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 1:
            store.before = 1.0
            source.write(2)
        if len(waits) == 8:
            store.before = 0.0
        return len(waits) == 10

    output = tmp_path / "copy.db"
    txid = follow(
        store,
        output,
        clock=CLOCK,
        wait=wait,
        interval_s=1.0,
        on_step=lambda s: reached.append(s.txid),
    )
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 1.0, 1.0]
    assert txid == reached[-1] == walship.replication(source.connection).status().txid
    assert len(reached) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_with_a_signal(
    source: Source, tmp_path: Path, number: signal.Signals
) -> None:
    """`restore -f -json` prints each state, ends with exit code 0, and leaves a complete file."""
    source.write(2)
    output = tmp_path / "copy.db"
    command = [
        *(sys.executable, "-m", "walship.cli", "restore", "-f", "-json"),
        *("-follow-interval", "20ms", "-o", str(output), str(source.root)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert json.loads(process.stdout.readline())["txid"] == f"{source.sync():016x}"
        last = source.write()
        while json.loads(process.stdout.readline())["txid"] != f"{last:016x}":
            pass
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert f"following {local_store(source.root).url}" in said
    assert "Traceback" not in said
    assert_restored(source.root, output, last, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("copy.db*")) == ["copy.db", "copy.db-txid"]


def test_a_replicated_database_is_no_output(source: Source) -> None:
    """What an application replicates itself is neither followed into nor brought up to date."""
    source.write(2)
    before = source.database.path.read_bytes()
    for call in (walship.update, walship.follow):
        with pytest.raises(walship.ConfigError, match="replicated itself"):
            call(source.root, source.database.path, overwrite=True)
    assert source.database.path.read_bytes() == before


def test_from_python(source: Source, tmp_path: Path) -> None:
    """`walship.update` and `walship.follow` do what the command does; an event ends the latter."""
    source.write(2)
    output = tmp_path / "copy.db"
    first = walship.update(source.root, output, txid="0000000000000001")
    assert first.txid == 1
    walship.replication(source.connection).mark("here")
    marked = source.sync()
    last = source.write()
    assert walship.update(source.root, output, label="here").txid == marked
    stop = threading.Event()
    steps: list[int] = []

    def note(step: walship.Step) -> None:
        steps.append(step.txid)
        if step.txid == last:
            stop.set()

    assert walship.follow(source.root, output, interval="10ms", stop=stop, on_step=note) == last
    assert steps == [marked, last]
    assert_restored(source.root, output, last, tmp_path)


def test_an_output_behind_a_link(source: Source, tmp_path: Path) -> None:
    """A link stays one; copy, log and note lie where it leads to."""
    source.write(2)
    real = tmp_path / "volume" / "copy.db"
    link = tmp_path / "link.db"
    real.parent.mkdir()
    link.symlink_to(real)
    update(local_store(source.root), link, clock=CLOCK)
    last = source.write(2)
    assert update(local_store(source.root), link, clock=CLOCK).txid == last
    assert link.is_symlink()
    assert_restored(source.root, real, last, tmp_path)
    assert note_path(real).exists()
