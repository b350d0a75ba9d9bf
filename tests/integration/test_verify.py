"""`walship verify`: what a replica holds is restored for trial, checked, and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from support.databases import Database
from support.replicas import write_pages
from support.servers import S3Endpoint
from support.workers import Workers, workers
from walship.replica import live
from walship.replica.clock import SystemClock
from walship.replica.format.ltx import Decoder, Encoder
from walship.replica.live import NotComparable, at_txid
from walship.replica.spool import state_directory
from walship.replica.verify import Verification, last_verified, verify

CLOCK = SystemClock()


@pytest.fixture
def fleet() -> Iterator[Workers]:
    with workers() as made:
        yield made


def _verify(database: Database) -> Verification:
    return verify(
        database.store(),
        SystemClock(),
        database.directory / ".scratch",
        database=database.path,
        directory=state_directory(database.path),
    )


def _command(*words: object) -> tuple[int, dict[str, Any], str]:
    """`walship verify -json` in a process of its own: exit code, result, messages."""
    done = subprocess.run(
        [sys.executable, "-m", "walship.cli", "verify", "-json", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def _fill(database: Database, rows: int = 200) -> None:
    with database.opened() as db:
        db.execute("create table t(x integer primary key, y)")
        for n in range(rows):
            db.execute("insert into t values(?, randomblob(500))", (n,))
        database.sync()


def _assert_no_scratch(database: Database) -> None:
    assert [p.name for p in database.directory.iterdir() if "scratch" in p.name] == []
    assert [p.name for p in database.directory.iterdir() if "verify" in p.name] == []


def _change_page(database: Database) -> int:
    """Put another content of a page into the newest segment, with right checksums."""
    path = database.replica / "ltx" / "0" / max(database.segments())
    times = path.stat()
    with path.open("rb") as file:
        decoder = Decoder(file.read)
        header = decoder.header
        pages = [(pgno, bytes(page)) for pgno, page in decoder]
    pgno, page = pages[-1]
    pages[-1] = pgno, page[:-1] + bytes([page[-1] ^ 1])
    with path.open("wb") as file:
        encoder = Encoder(file.writelines, header)
        for number, content in pages:
            encoder.add_page(number, content)
        encoder.finish()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return pgno


# --- nobody has it open --------------------------------------------------------------------------


def test_a_closed_database_equals_its_replica(tmp_path: Path) -> None:
    """After a clean close every page is compared with the main file; nothing is left behind."""
    database = Database(tmp_path)
    _fill(database)
    before = database.path.stat()
    content = database.path.read_bytes()
    found = _verify(database)
    assert (found.outcome, found.compared, found.problem) == ("sound", True, "")
    assert found.commit * found.page_size == before.st_size
    after = database.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert database.path.read_bytes() == content
    assert not Path(f"{database.path}-wal").exists()
    _assert_no_scratch(database)


@pytest.mark.parametrize("page_size", [512, 65536])
def test_every_page_size(tmp_path: Path, page_size: int) -> None:
    """Also the smallest and the largest pages are compared."""
    database = Database(tmp_path, page_size=page_size)
    _fill(database, 50)
    found = _verify(database)
    assert (found.outcome, found.compared, found.page_size) == ("sound", True, page_size)


def test_a_killed_writer_leaves_what_can_be_compared(tmp_path: Path, fleet: Workers) -> None:
    """With a WAL left behind, its frames up to the record, over the main file, are the state."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert(20); sync()")
    worker.kill()
    assert Path(f"{database.path}-wal").stat().st_size
    found = _verify(database)
    assert (found.outcome, found.compared) == ("sound", True)


def test_commits_that_were_not_shipped_are_no_difference(tmp_path: Path, fleet: Workers) -> None:
    """What a killed writer did not get out cannot be in the replica: not compared, and why."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert(20); sync()")
    worker.run("hold_puts(); insert(5)")
    worker.kill()
    found = _verify(database)
    assert (found.outcome, found.compared) == ("sound", False)
    assert "open the database" in found.not_compared


@pytest.mark.parametrize("when", ["while it is read", "before it is sealed"])
def test_a_read_mark_is_not_held_at_any_price(
    tmp_path: Path, fleet: Workers, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """While it is, the WAL only grows; beyond some size the view is given up."""
    monkeypatch.setattr(live, "_WAL_GROWTH_BYTES", 1 << 20)
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("db.wal_autocheckpoint(0); insert(5, 100000); sync()")
    grow = "insert(20, 100000)"
    view = at_txid(database.path, state_directory(database.path), database.store().url, CLOCK)
    if when == "while it is read":
        with pytest.raises(NotComparable, match="too many changes"), view as found:
            worker.run(grow)
            assert sum(len(run) for _, run in found.page_runs())
    else:
        worker.run("engine().capture.mutex.acquire(); insert()")
        wait = live._wait

        def grow_and_wait(*arguments: Any) -> bool:
            worker.run(grow)
            return wait(*arguments)

        monkeypatch.setattr(live, "_wait", grow_and_wait)
        with pytest.raises(NotComparable, match="too many changes"), view:
            pass
        worker.run("engine().capture.mutex.release()")
    monkeypatch.undo()
    worker.run("sync()")
    assert _verify(database).compared


def test_a_foreign_writer_is_no_difference(tmp_path: Path) -> None:
    """A database that another program changed meanwhile is not held against the replica."""
    database = Database(tmp_path)
    _fill(database)
    with apsw.Connection(str(database.path)) as foreign:
        foreign.execute("delete from t where x < 50")
    foreign.close()
    found = _verify(database)
    assert (found.outcome, found.compared) == ("sound", False)
    assert "another program" in found.not_compared


def test_a_page_that_differs_is_found(tmp_path: Path) -> None:
    """A segment that is well-formed and holds another page: exit code 9, and which page."""
    database = Database(tmp_path)
    _fill(database)
    pgno = _change_page(database)
    code, found, err = _command(database.path, "-config", _config(database))
    assert (code, err) == (9, "")
    assert (found["outcome"], found["n_differing"], found["differing"]) == ("differs", 1, [pgno])
    assert "walship reset" in found["problem"]
    assert last_verified(state_directory(database.path)).outcome == "differs"  # type: ignore[union-attr]


def _config(database: Database) -> Path:
    path = database.directory / "walship.yml"
    path.write_text(f"dbs:\n  - path: {database.path}\n    replica: {{path: {database.replica}}}\n")
    return path


def test_lost_and_broken_segments_are_damage(tmp_path: Path) -> None:
    """A flipped byte, a missing segment, a replica that is gone: exit code 4, and what to do."""
    database = Database(tmp_path)
    _fill(database)
    config = _config(database)
    newest = database.replica / "ltx" / "0" / max(database.segments())
    whole = newest.read_bytes()
    middle = len(whole) // 2
    newest.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    for _ in ("broken", "missing"):
        code, found, _ = _command(database.path, "-config", config)
        assert (code, found["outcome"]) == (4, "damaged")
        assert "walship reset" in found["problem"]
        newest.unlink(missing_ok=True)
    for name in database.segments():
        (database.replica / "ltx" / "0" / name).unlink()
    code, found, _ = _command(database.path, "-config", config)
    assert (code, found["outcome"]) == (4, "damaged")
    assert "what was shipped is gone" in found["problem"]


# --- processes use it ----------------------------------------------------------------------------


def test_a_database_that_is_written_all_the_time(tmp_path: Path, fleet: Workers) -> None:
    """Beside writers, checkpoints and WAL restarts each comparison is exact: never a difference."""
    database = Database(tmp_path)
    first = fleet(database.path, database.replica)
    first.run("insert(1)")
    second = fleet(database.path, database.replica)
    busy = """
import random
end = time.monotonic() + 3
while time.monotonic() < end:
    db.execute("create table if not exists big(x integer primary key, y)")
    db.execute("insert or replace into big values(abs(random()) % 400, randomblob(3000))")
    if random.random() < 0.05:
        try:
            db.pragma("wal_checkpoint(truncate)")
        except apsw.Error:
            pass
"""
    for worker in (first, second):
        worker.begin(busy)
    compared = 0
    while not (first.has_answered() and second.has_answered()):
        found = _verify(database)
        assert found.outcome == "sound", found.problem
        compared += found.compared
    assert compared >= 2
    for worker in (first, second):
        worker.end()
    assert "pages will be compared" not in first.log() + second.log()


def test_a_difference_is_found_beside_writers(tmp_path: Path, fleet: Workers) -> None:
    """Also with the database open: a page of the replica that is not the database's is seen."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert(50); sync()")
    pgno = _change_page(database)
    found = _verify(database)
    assert (found.outcome, found.differing) == ("differs", (pgno,))
    assert worker.run("insert(5); sync()")


def test_the_last_close_goes_on_after_a_comparison(tmp_path: Path, fleet: Workers) -> None:
    """A view that is held at the last close leaves the WAL, and nothing is lost by that."""
    database = Database(tmp_path)
    worker = fleet(database.path, database.replica)
    worker.run("insert(50)")
    directory = state_directory(database.path)
    store = database.store()
    with at_txid(database.path, directory, store.url, SystemClock()) as view:
        assert worker.run("insert(5); sync(); close()") is None
        pages = sum(len(run) for _, run in view.page_runs())
        assert pages == view.commit
    worker.finish()
    with database.opened() as db:
        assert db.execute("select count(*) from rows").get == 55
        db.execute("insert into rows values('x', 0, 0)")
        database.sync()
    assert _verify(database).compared
    assert len(database.full_copies()) <= 1


def test_this_process_has_it_open(tmp_path: Path) -> None:
    """Files that SQLite has open in this process are not opened a second time."""
    database = Database(tmp_path)
    with database.opened() as db:
        db.execute("create table t(x)")
        database.sync()
        with (
            pytest.raises(NotComparable, match="itself"),
            at_txid(
                database.path, state_directory(database.path), database.store().url, SystemClock()
            ),
        ):
            pass


# --- a replica alone ------------------------------------------------------------------------------


def test_a_replica_alone(tmp_path: Path) -> None:
    """A URL needs no database; SQLite's check finds what was broken before it was shipped."""
    database = Database(tmp_path)
    _fill(database)
    scratch = tmp_path / "room"
    scratch.mkdir()
    code, found, err = _command("-scratch", scratch, database.store().url)
    assert (code, found["outcome"], found["compared"], err) == (0, "sound", False, "")
    assert list(scratch.iterdir()) == []
    root = tmp_path / "broken"
    write_pages(root, 0, 1, 1, 3, range(1, 4))
    code, found, _ = _command(f"file://{root}")
    assert (code, found["outcome"]) == (4, "damaged")
    code, found, err = _command(f"file://{tmp_path / 'nothing'}")
    assert (code, found) == (3, {})
    assert err.startswith("walship: ")
    code, _, err = _command("-scratch", "/proc", database.store().url)
    assert (code, err.count("\n")) == (1, 1)
    assert "-scratch" in err
    code, _, err = _command("-scratch", tmp_path / "missing", f"file://{root}")
    assert code == 1
    assert "-scratch" in err


def test_what_a_killed_verification_left_is_removed(tmp_path: Path) -> None:
    """The scratch file of a process that was killed goes with the next verification."""
    database = Database(tmp_path)
    _fill(database)
    left = tmp_path / ".scratch.12345678.restore.tmp"
    left.write_bytes(b"x" * 1000)
    assert _verify(database).ok
    assert not left.exists()


def test_a_bucket(tmp_path: Path, fleet: Workers, minio_server: S3Endpoint) -> None:
    """The same with an S3 server, and the database at work in another process."""
    replica = minio_server.replica(minio_server.make_bucket(), "app")
    path = tmp_path / "app.db"
    worker = fleet(path, replica)
    worker.run("insert(20)")
    worker.run("write(0.002)")
    config = tmp_path / "walship.yml"
    config.write_text(json.dumps({"dbs": [{"path": str(path), "replica": replica}]}))
    for _ in range(2):
        code, found, err = _command("-config", config, path)
        assert (code, found["outcome"], found["compared"]) == (0, "sound", True), (found, err)
    worker.run("stop()")
