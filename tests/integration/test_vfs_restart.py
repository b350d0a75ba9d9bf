"""What a restart uploads, and what it proves first, whatever happened meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import walship
from support.databases import Database, dump
from support.history import History
from support.killing import run_writer
from walship.replica.errors import ReplicaError

_BALLAST_BYTES = 300_000
_SMALL_BYTES = 150_000


class Case:
    """A replicated database with ballast, and how it is stopped and started."""

    def __init__(self, directory: Path) -> None:
        self.history = History(ballast_bytes=_BALLAST_BYTES)
        self.database = Database(directory)
        self.state = directory / ".app.db-walship"
        with self.database.opened() as connection:
            for n in range(3):
                self.history.apply(connection, n)
            self.database.sync()
        self.sent = dict(self.database.segments())

    def kill(self, **job: object) -> int:
        """Let a child commit and die; the number of transactions it had committed."""
        given: dict[str, object] = {"steps": 10, "settings": {"autocheckpoint": 0}, **job}
        if "point" not in given:
            given.setdefault("close_at_end", False)
        report = run_writer(
            self.database.path,
            self.database.replica,
            ballast_bytes=_BALLAST_BYTES,
            **given,  # type: ignore[arg-type]
        )
        assert report.errors == ""
        assert report.killed
        return report.committed

    def go_on(self, committed: int | None = None) -> None:
        """Open, check that nothing is missing, commit, close, compare."""
        with self.database.opened() as connection:
            n = self.history.length(connection)
            if committed is not None:
                assert committed <= n <= committed + 1
            self.history.apply(connection, n)
        self.database.assert_replica_equals_file()
        assert self.history.length_of(self.database.restore()) == n + 1

    @property
    def uploaded(self) -> list[int]:
        """Sizes of the segments sent since the start."""
        return [size for name, size in self.database.segments().items() if name not in self.sent]

    def assert_incremental(self) -> None:
        assert max(self.uploaded, default=0) < _SMALL_BYTES, "a full copy was sent"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A database in its replica, closed."""
    return Case(tmp_path)


def _foreign(path: Path, program: str) -> None:
    """Run a program that uses the standard sqlite3 module, as ``db``, on the database."""
    code = f"import os, sqlite3\ndb = sqlite3.connect({str(path)!r}, isolation_level=None)\n"
    subprocess.run([sys.executable, "-c", code + program], check=True, timeout=30)


# -- going on incrementally -----------------------------------------------------------------------


def test_nothing_is_sent_if_nothing_changed(case: Case) -> None:
    """Opening and closing without a commit sends no object, however often."""
    for _ in range(3):
        with case.database.opened() as connection:
            connection.execute("SELECT * FROM cells").fetchall()
            case.database.sync()
    assert case.database.segments() == case.sent


def test_after_a_clean_close(case: Case) -> None:
    """After a clean close only what is new is sent, in one object for one commit."""
    for _ in range(3):
        case.go_on(None)
    assert len(case.uploaded) == 3
    case.assert_incremental()


def test_after_a_sigkill(case: Case) -> None:
    """After SIGKILL only what is new is sent."""
    committed = case.kill()
    case.go_on(committed)
    case.assert_incremental()


def test_after_a_sigkill_before_anything_was_sent(case: Case) -> None:
    """After SIGKILL with commits in the WAL alone, they are sent incrementally."""
    committed = case.kill(
        sync_at_end=False, settings={"autocheckpoint": 0, "sync_interval": 3600.0}
    )
    case.go_on(committed)
    case.assert_incremental()


def test_after_truncate_and_sigkill(case: Case) -> None:
    """After a TRUNCATE checkpoint and SIGKILL there is no WAL; the record proves continuity."""
    committed = case.kill(point="wal truncate, after", tour=True, steps=60)
    case.go_on(committed)
    case.assert_incremental()


def test_after_a_gate_and_sigkill(case: Case) -> None:
    """Pieces that only a gate has sealed are in the spool and go out after SIGKILL."""
    committed = case.kill(
        point="wal header, after",
        hit=3,
        steps=200,
        sync_at_end=False,
        settings={"autocheckpoint": 5, "sync_interval": 3600.0},
    )
    case.go_on(committed)
    case.assert_incremental()


def test_killed_again_and_again_without_commits(case: Case) -> None:
    """SIGKILL right after opening, several times, changes nothing."""
    for _ in range(3):
        case.kill(steps=0)
    assert case.database.segments() == case.sent
    case.go_on()
    case.assert_incremental()


def test_moved_to_another_directory(case: Case, tmp_path: Path) -> None:
    """A database moved on the same disk with its state goes on incrementally."""
    committed = case.kill()
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("app.db", "app.db-wal", ".app.db-walship"):
        (tmp_path / name).rename(other / name)
    case.database.path = other / "app.db"
    case.go_on(committed)
    case.assert_incremental()


# -- a foreign writer while walship was away ------------------------------------------------------


def test_a_foreign_writer_after_a_clean_close(case: Case) -> None:
    """Another program's commits after a clean close are found by page hashes, and shipped."""
    _foreign(case.database.path, "db.execute('CREATE TABLE f (x)'); db.close()")
    with case.database.opened():
        case.database.sync()
    case.database.assert_replica_equals_file()
    case.assert_incremental()
    assert "f" in {row[0] for row in dump(case.database.restore())}


def test_a_foreign_reader_changes_nothing(case: Case) -> None:
    """Another program that only reads, and closes cleanly, costs no full copy."""
    _foreign(case.database.path, "db.execute('SELECT * FROM cells').fetchall(); db.close()")
    case.go_on()
    case.assert_incremental()


def test_a_foreign_writer_goes_on_in_our_wal(case: Case) -> None:
    """Commits another program appended to the WAL after our SIGKILL are shipped."""
    case.kill()
    _foreign(
        case.database.path,
        "db.execute('PRAGMA wal_autocheckpoint = 0')\n"
        "db.execute('CREATE TABLE f AS SELECT randomblob(5000)')\nos._exit(0)",
    )
    with case.database.opened():
        case.database.sync()
    case.database.assert_replica_equals_file()
    assert "f" in {row[0] for row in dump(case.database.restore())}
    case.assert_incremental()


@pytest.mark.parametrize("end", ["db.close()", "os._exit(0)"], ids=["closed", "killed"])
def test_a_foreign_writer_restarts_our_wal(case: Case, end: str) -> None:
    """A WAL that another program restarted after our SIGKILL proves nothing: pages are compared."""
    case.kill()
    _foreign(
        case.database.path,
        "db.execute('CREATE TABLE f AS SELECT randomblob(5000)')\n"
        "db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()\n"
        f"db.execute('INSERT INTO f VALUES (7)')\n{end}",
    )
    with case.database.opened():
        case.database.sync()
    case.database.assert_replica_equals_file()
    case.assert_incremental()
    assert "f" in {row[0] for row in dump(case.database.restore())}


def test_a_foreign_writer_changes_the_hottest_pages(tmp_path: Path) -> None:
    """Another program may change every page that was shipped last: that is no loss of commits."""
    database = Database(tmp_path)
    program = (
        "import os, walship\n"
        f"db = walship.connect({str(database.path)!r}, {str(database.replica)!r})\n"
        "db.execute('CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER)')\n"
        "for n in range(3):\n"
        "    db.execute('REPLACE INTO t VALUES (1, ?)', (n,))\n"
        "    walship.replication(db).sync(20)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert Path(f"{database.path}-wal").stat().st_size > 0
    _foreign(database.path, "db.execute('UPDATE t SET n = 77'); db.close()")
    with database.opened():
        database.sync()
    database.assert_replica_equals_file()
    assert ("t", 1, 1, 77) in dump(database.restore())


# -- a foreign writer while the database is open --------------------------------------------------


def _foreign_beside(path: Path, statement: str) -> None:
    """Run a statement in another program, which dies without closing the database."""
    _foreign(path, f"db.execute({statement!r}).fetchall(); os._exit(0)")


def test_a_foreign_writer_begins_a_wal(case: Case) -> None:
    """Commits in a WAL that another program began are shipped, and ours behind them."""
    with case.database.opened() as connection:
        connection.execute("CREATE TABLE f (x)")
        case.database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        _foreign_beside(case.database.path, "INSERT INTO f VALUES (1)")
        case.database.assert_replica_equals_now()
        connection.execute("INSERT INTO f VALUES (2)")
        case.database.assert_replica_equals_now()
    case.go_on()
    case.assert_incremental()


def test_a_foreign_writer_begins_a_wal_and_empties_it(case: Case) -> None:
    """What another program committed and checkpointed meanwhile is shipped."""
    with case.database.opened() as connection:
        connection.execute("CREATE TABLE f (x)")
        case.database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        _foreign_beside(case.database.path, "INSERT INTO f VALUES (1)")
        _foreign_beside(case.database.path, "PRAGMA wal_checkpoint(TRUNCATE)")
        case.database.assert_replica_equals_now()
        connection.execute("INSERT INTO f VALUES (2)")
    case.go_on()


@pytest.mark.parametrize("syncs", [True, False])
def test_a_foreign_checkpoint_takes_what_was_not_sealed(case: Case, syncs: bool) -> None:
    """Frames that another program truncated before they were sealed are not missed."""
    with case.database.opened(sync_interval=3600.0) as connection:
        connection.execute("CREATE TABLE f (x)")
        case.database.sync()
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("INSERT INTO f VALUES (1)")
        _foreign_beside(case.database.path, "PRAGMA wal_checkpoint(TRUNCATE)")
        if syncs:
            case.database.assert_replica_equals_now()
        connection.execute("INSERT INTO f VALUES (2)")
        case.database.assert_replica_equals_now()
    case.go_on()


# -- lost or old files ----------------------------------------------------------------------------


def test_a_wal_cut_short_is_rolled_forward(case: Case) -> None:
    """A power cut that took shipped commits from the WAL is undone, and never shipped itself."""
    committed = case.kill(steps=12)
    wal = Path(f"{case.database.path}-wal")
    with wal.open("r+b") as file:
        file.truncate(32 + (wal.stat().st_size - 32) // 2)
    case.go_on(committed)
    case.assert_incremental()


def test_a_deleted_wal_is_refused(case: Case) -> None:
    """Shipped commits that vanished with the -wal file are reported, and not shipped as undone."""
    committed = case.kill(steps=12)
    os.unlink(f"{case.database.path}-wal")
    before = case.database.segments()
    with pytest.raises(ReplicaError, match="restore"):
        case.database.connect()
    assert case.database.segments() == before
    assert case.history.length_of(case.database.restore()) == committed


def test_an_older_volume_is_refused(case: Case, tmp_path: Path) -> None:
    """Database and state brought back from yesterday do not overwrite what the replica has."""
    yesterday = tmp_path / "yesterday"
    yesterday.mkdir()
    shutil.copytree(case.state, yesterday / ".app.db-walship")
    shutil.copy2(case.database.path, yesterday / "app.db")
    case.go_on()
    before = case.database.segments()
    old = Database(tmp_path)
    old.path = yesterday / "app.db"
    with pytest.raises(walship.ContinuityError, match="txid"):
        old.connect()
    assert case.database.segments() == before
    with old.opened(adopt=True):
        old.sync()
    old.assert_replica_equals_file()


def test_a_lost_state_directory_is_taken_over_by_comparison(case: Case) -> None:
    """Without any record, a database equal to the replica's head goes on without a full copy."""
    shutil.rmtree(case.state)
    case.go_on()
    case.assert_incremental()


def test_a_lost_state_directory_with_newer_commits_is_refused(case: Case) -> None:
    """Without a record and with another content, nothing is overwritten without being asked."""
    shutil.rmtree(case.state)
    _foreign(case.database.path, "db.execute('CREATE TABLE f (x)'); db.close()")
    with pytest.raises(walship.ContinuityError):
        case.database.connect()
    with case.database.opened(adopt=True):
        case.database.sync()
    case.database.assert_replica_equals_file()


def test_an_exchanged_database_is_shipped_whole(case: Case, tmp_path: Path) -> None:
    """A file put in the place of a cleanly closed one is shipped by a full copy."""
    _foreign(tmp_path / "new.db", "db.execute('CREATE TABLE other (x)'); db.close()")
    (tmp_path / "new.db").replace(case.database.path)
    with case.database.opened():
        case.database.sync()
    case.database.assert_replica_equals_file()
    assert [row[0] for row in dump(case.database.restore())] == ["other"]


# -- a damaged spool ------------------------------------------------------------------------------


def _spoil(journal: Path, how: Callable[[bytearray], bytearray]) -> None:
    journal.write_bytes(how(bytearray(journal.read_bytes())))


def _end(data: bytearray) -> int:
    return len(bytes(data).rstrip(b"\0"))


def test_garbage_behind_the_journal_is_cut_off(case: Case) -> None:
    """A torn record at the end of the journal is ignored, and continuity stays proven."""
    committed = case.kill()

    def torn(data: bytearray) -> bytearray:
        end = _end(data) + 8
        data[end : end + 60] = data[:60]
        return data

    _spoil(case.state / "journal", torn)
    case.go_on(committed)
    case.assert_incremental()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("damage", ["cut", "flip", "zero"])
def test_a_damaged_journal_never_leads_to_a_wrong_replica(
    case: Case, damage: str, seed: int
) -> None:
    """With a journal cut, flipped or zeroed anywhere, the replica ends up equal or is refused."""
    committed = case.kill(steps=6)
    rng = random.Random(seed)

    def spoil(data: bytearray) -> bytearray:
        place = rng.randrange(_end(data))
        if damage == "cut":
            return data[:place]
        if damage == "flip":
            data[place] ^= 1 << rng.randrange(8)
        else:
            data[place : place + 200] = bytes(len(data[place : place + 200]))
        return data

    _spoil(case.state / "journal", spoil)
    before = case.database.segments()
    try:
        case.go_on(committed)
    except ReplicaError as error:
        assert "\n" not in str(error)
        assert case.database.segments() == before
        with case.database.opened(adopt=True):
            case.database.sync()
        case.database.assert_replica_equals_file()
        assert case.history.length_of(case.database.restore()) >= committed


def test_a_missing_journal_is_like_a_lost_state_directory(case: Case) -> None:
    """Without a journal the database is compared with the replica."""
    committed = case.kill()
    (case.state / "journal").unlink()
    case.go_on(committed)
    case.assert_incremental()
