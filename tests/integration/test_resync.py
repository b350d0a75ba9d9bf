"""Resync: what others did to a database is found by page hashes, and only that is shipped."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import walship
from support.databases import Database, Stores
from support.servers import find_litestream
from walship.replica.format.ltx import Decoder

_ROWS = 400


def foreign(path: Path, *statements: str) -> None:
    """Another program with another SQLite library, which closes in the end."""
    code = f"""
import sqlite3
db = sqlite3.connect({str(path)!r}, isolation_level=None)
for statement in {statements!r}:
    db.execute(statement).fetchall()
db.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture(params=[512, 4096, 65536])
def database(tmp_path: Path, request: pytest.FixtureRequest) -> Database:
    return _filled(Database(tmp_path, page_size=request.param))


@pytest.fixture
def small(tmp_path: Path) -> Database:
    return _filled(Database(tmp_path, page_size=1024))


def _filled(database: Database) -> Database:
    with database.opened() as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        with connection:
            for n in range(_ROWS):
                connection.execute("INSERT INTO t VALUES (?, randomblob(700))", (n,))
    return database


def _pages(database: Database, name: str) -> list[int]:
    """Numbers of the pages in a segment."""
    with (database.replica / "ltx" / "0" / name).open("rb") as file:
        return [pgno for pgno, _ in Decoder(file.read)]


def _commit(database: Database) -> int:
    return database.path.stat().st_size // int(database.settings["page_size"])


def _new(database: Database, before: dict[str, int]) -> list[str]:
    return [name for name in database.segments() if name not in before]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    listener = Listener()
    logging.getLogger("walship").addHandler(listener)
    yield found
    logging.getLogger("walship").removeHandler(listener)


def test_changes_while_it_was_closed(database: Database, warnings: list[str]) -> None:
    """Rows that another program changed: their pages and few others, and a line that says so."""
    before = database.segments()
    foreign(database.path, "UPDATE t SET b = zeroblob(700) WHERE id IN (3, 200)")
    with database.opened():
        database.sync()
        (name,) = _new(database, before)
        assert len(_pages(database, name)) <= 4
        assert len(_pages(database, name)) < _commit(database) / 2
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
    (line,) = [line for line in warnings if "differ from the replica" in line]
    assert f"{len(_pages(database, name))} of {_commit(database)} pages" in line


@pytest.mark.parametrize("checkpoint", ["PASSIVE", "RESTART", "TRUNCATE"])
def test_changes_while_it_is_open(small: Database, checkpoint: str) -> None:
    """A program beside us that writes, checkpoints and writes again: nothing is missed."""
    before = small.segments()
    with small.opened() as connection:
        foreign(
            small.path,
            "UPDATE t SET b = zeroblob(700) WHERE id = 7",
            f"PRAGMA wal_checkpoint({checkpoint})",
            "UPDATE t SET b = zeroblob(699) WHERE id = 300",
        )
        small.assert_replica_equals_now()
        connection.execute("UPDATE t SET b = zeroblob(698) WHERE id = 8")
        small.assert_replica_equals_now()
    small.assert_replica_equals_file()
    assert sum(len(_pages(small, name)) for name in _new(small, before)) < 40


def test_litestreams_hole_one(small: Database) -> None:
    """A commit that nobody saw, a restart of the WAL, then a write shorter than the old WAL."""
    with small.opened() as connection:
        connection.execute("UPDATE t SET b = randomblob(700) WHERE id < 100")
        small.sync()
        before = small.segments()
        saved = {suffix: Path(f"{small.path}{suffix}").read_bytes() for suffix in ("", "-wal")}
        state = small.directory / "state"
        shutil.copytree(
            small.directory / ".app.db-walship", state, ignore=shutil.ignore_patterns("*.fifo")
        )
    # As SIGKILL leaves it; what came after the copy is forgotten, in the replica too.
    for name in _new(small, before):
        (small.replica / "ltx" / "0" / name).unlink()
    for suffix, content in saved.items():
        Path(f"{small.path}{suffix}").write_bytes(content)
    shutil.rmtree(small.directory / ".app.db-walship")
    state.rename(small.directory / ".app.db-walship")
    foreign(
        small.path,
        "UPDATE t SET b = zeroblob(700) WHERE id = 150",
        "PRAGMA wal_checkpoint(RESTART)",
        "UPDATE t SET b = zeroblob(700) WHERE id = 5",
    )
    with small.opened():
        small.assert_replica_equals_now()
    small.assert_replica_equals_file()


def test_litestreams_hole_two(small: Database) -> None:
    """Two restarts of the WAL, the second generation over all of the first."""
    foreign(
        small.path,
        "UPDATE t SET b = zeroblob(700) WHERE id = 5",
        "PRAGMA wal_checkpoint(RESTART)",
        "UPDATE t SET b = zeroblob(700) WHERE id = 150",
        "PRAGMA wal_checkpoint(RESTART)",
        "UPDATE t SET b = zeroblob(700) WHERE id < 60",
    )
    with small.opened():
        small.assert_replica_equals_now()
    small.assert_replica_equals_file()


@pytest.mark.parametrize(
    ("statements", "shrinks"),
    [
        (("DELETE FROM t WHERE id >= 100", "VACUUM"), True),
        (("DELETE FROM t WHERE id >= 100", "PRAGMA incremental_vacuum"), True),
        (("CREATE TABLE u AS SELECT id, b FROM t",), False),
    ],
    ids=["vacuum", "incremental vacuum", "growth"],
)
def test_other_sizes(database: Database, statements: tuple[str, ...], shrinks: bool) -> None:
    """Databases that shrank or grew meanwhile; pages above the end are gone."""
    before, size = database.segments(), database.path.stat().st_size
    foreign(database.path, *statements)
    assert (database.path.stat().st_size < size) == shrinks
    with database.opened():
        database.sync()
        assert len(_new(database, before)) == 1
    database.assert_replica_equals_file()


def test_nothing_differs(small: Database, warnings: list[str]) -> None:
    """Where doubt was unfounded nothing is shipped, and history goes on."""
    before = small.segments()
    foreign(small.path, "PRAGMA wal_checkpoint(TRUNCATE)", "BEGIN IMMEDIATE", "ROLLBACK")
    small.path.touch()
    with small.opened() as connection:
        small.sync()
        assert small.segments() == before
        assert any("pages are as in the replica" in line for line in warnings)
        connection.execute("UPDATE t SET b = zeroblob(10) WHERE id = 1")
        small.sync()
        (name,) = _new(small, before)
        assert len(_pages(small, name)) <= 3
    small.assert_replica_equals_file()


def test_after_a_restore(small: Database) -> None:
    """The map of a restored database is that of the file: what a stranger changes is found."""
    for name in small.directory.iterdir():
        if name != small.replica:
            shutil.rmtree(name) if name.is_dir() else name.unlink()
    with small.opened() as connection:
        connection.execute("UPDATE t SET b = zeroblob(10) WHERE id = 1")
    before = small.segments()
    foreign(small.path, "UPDATE t SET b = zeroblob(11) WHERE id = 1")
    with small.opened():
        small.sync()
        (name,) = _new(small, before)
        assert len(_pages(small, name)) <= 3
    small.assert_replica_equals_file()


def _map_at(small: Database, content: bytes | None) -> None:
    path = small.directory / ".app.db-walship" / "pages"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [None, b"", b"WSPB and then nothing that fits"])
def test_without_a_map(small: Database, content: bytes | None) -> None:
    """A missing or damaged map costs a full copy, never a wrong replica."""
    before = small.segments()
    _map_at(small, content)
    foreign(small.path, "UPDATE t SET b = zeroblob(700) WHERE id = 3")
    with small.opened():
        small.sync()
        (name,) = _new(small, before)
        assert len(_pages(small, name)) == _commit(small)
    small.assert_replica_equals_file()
    before = small.segments()
    foreign(small.path, "UPDATE t SET b = zeroblob(701) WHERE id = 3")
    with small.opened():
        small.sync()
        (name,) = _new(small, before)
        assert len(_pages(small, name)) <= 3, "the full copy made a new map"
    small.assert_replica_equals_file()


def test_a_map_that_is_behind(small: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that the map does not know are fetched from the replica, a few requests."""
    old = (small.directory / ".app.db-walship" / "pages").read_bytes()
    with small.opened() as connection:
        for n in range(3):
            connection.execute("UPDATE t SET b = randomblob(700) WHERE id = ?", (50 * n,))
            small.sync()
    _map_at(small, old)
    before = small.segments()
    foreign(small.path, "UPDATE t SET b = zeroblob(700) WHERE id = 3")
    stores = Stores(monkeypatch)
    with small.opened():
        small.sync()
        (name,) = _new(small, before)
        assert len(_pages(small, name)) <= 3
        assert stores.last.calls["get"] >= 3
    small.assert_replica_equals_file()


def test_a_full_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the spool could not take what a gate had to seal, the difference is shipped later."""
    stores = Stores(monkeypatch)
    database = _filled(Database(tmp_path, page_size=1024, max_spool_bytes="1KB"))
    with database.opened() as connection:
        database.sync()
        before = database.segments()
        stores.block(("put",))
        for n in range(6):
            connection.execute("UPDATE t SET b = randomblob(700) WHERE id = ?", (n,))
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
            connection.execute("UPDATE t SET b = randomblob(699) WHERE id = ?", (n,))
        assert database.engine().capture.full_copy_reason is not None
        stores.release()
        database.assert_replica_equals_now()
        assert sum(len(_pages(database, name)) for name in _new(database, before)) < 40
    database.assert_replica_equals_file()


@pytest.mark.litestream
def test_litestream_restores_it(small: Database, tmp_path: Path) -> None:
    """A segment of differences is an ordinary one to the real Litestream."""
    foreign(small.path, "DELETE FROM t WHERE id >= 250", "VACUUM", "UPDATE t SET b = zeroblob(5)")
    with small.opened():
        small.sync()
    output = tmp_path / "by-litestream.db"
    subprocess.run(
        [find_litestream(), "restore", "-o", output, f"file://{small.replica}"],
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert output.read_bytes() == small.path.read_bytes()


def test_a_connection_that_was_open_all_along(small: Database) -> None:
    """Our own commits before, between and after those of a stranger: all of them, in order."""
    with small.opened() as connection:
        for n in range(4):
            connection.execute("UPDATE t SET b = zeroblob(20) WHERE id = ?", (n,))
            foreign(small.path, f"UPDATE t SET b = zeroblob(30) WHERE id = {100 + n}")
            if n % 2:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        walship.replication(connection).sync(30)
        small.assert_replica_equals_now()
    small.assert_replica_equals_file()
