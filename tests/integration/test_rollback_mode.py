"""Databases that are not in WAL mode: with a replica they can be read, and are told what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

import walship
from support.databases import Database, dump

_MANY_ROWS = (
    "WITH n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 40) "
    "INSERT INTO t SELECT randomblob(3000) FROM n"
)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """A database in rollback mode, configured with a replica; a close may wait for a minute."""
    database = Database(tmp_path)
    plain = apsw.Connection(str(database.path), vfs="unix")
    plain.execute("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    plain.close()
    replica = {"path": str(database.replica), "sync_interval": 0.0}
    walship.configure(database.path, replica, shutdown_sync_timeout="1m")
    return database


def _open(database: Database) -> apsw.Connection:
    return apsw.Connection(str(database.path), vfs="walship")


@pytest.mark.timeout(30)
def test_it_is_read_and_not_written(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Reads go on, writes are refused with the remedy, and neither a wait nor the close hangs."""
    before = database.path.read_bytes()
    connection = _open(database)
    assert connection.execute("SELECT x FROM t").get == 1
    with pytest.raises(walship.RefusedError, match="journal_mode=WAL"):
        connection.execute("INSERT INTO t VALUES (2)")
    assert not connection.in_transaction
    with pytest.raises(walship.RefusedError, match="journal_mode=WAL"):
        walship.replication(connection).sync()
    assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    caplog.clear()
    connection.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "journal_mode=WAL" in caplog.text
    assert database.path.read_bytes() == before
    assert not database.segments()


def test_a_refused_transaction_that_spilled(database: Database) -> None:
    """Pages that were written before the refusal are rolled back from the journal."""
    connection = _open(database)
    connection.execute("PRAGMA cache_size = 2")
    with pytest.raises(walship.RefusedError, match="journal_mode=WAL"):
        connection.execute(_MANY_ROWS)
    assert connection.execute("SELECT count(*) FROM t").get == 1
    assert connection.pragma("integrity_check") == "ok"
    assert not os.path.exists(f"{database.path}-journal")
    connection.close()
    with database.opened() as connection:
        assert connection.execute("SELECT count(*) FROM t").get == 1
    database.assert_replica_equals_file()


@pytest.mark.parametrize("how", ["connect", "apsw"])
def test_a_crash_in_rollback_mode(how: str, database: Database) -> None:
    """A database that lost its process in the middle of a commit is repaired, then replicated."""
    plain = apsw.Connection(str(database.path), vfs="unix")
    plain.execute(_MANY_ROWS)
    expected = dump(database.path)
    plain.execute("PRAGMA cache_size = 2")
    plain.execute("BEGIN; UPDATE t SET x = randomblob(3100)")
    plain.cache_flush()
    saved = {path: path.read_bytes() for path in (database.path, Path(f"{database.path}-journal"))}
    plain.close()
    for path, content in saved.items():
        path.write_bytes(content)
    connection = database.connect() if how == "connect" else _open(database)
    assert connection.pragma("integrity_check") == "ok"
    assert connection.pragma("journal_mode", "wal") == "wal"
    assert dump(database.path) == expected
    connection.execute("INSERT INTO t VALUES (2)")
    database.assert_replica_equals_now()
    connection.close()
    database.assert_replica_equals_file()


def test_the_remedy(database: Database) -> None:
    """Once it is in WAL mode all that it holds is replicated, without opening it again."""
    connection = _open(database)
    with pytest.raises(walship.RefusedError):
        walship.replication(connection).sync()
    assert connection.pragma("journal_mode", "wal") == "wal"
    connection.execute("INSERT INTO t VALUES (2)")
    database.assert_replica_equals_now()
    connection.close()
    database.assert_replica_equals_file()


def test_another_program_finds_the_remedy(database: Database) -> None:
    """It is enough that some program puts it into WAL mode."""
    connection = _open(database)
    connection.execute("SELECT x FROM t").fetchall()
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode = WAL')"
    subprocess.run([sys.executable, "-c", code, database.path], check=True, timeout=60)
    database.assert_replica_equals_now()
    connection.execute("INSERT INTO t VALUES (2)")
    database.assert_replica_equals_now()
    connection.close()
    database.assert_replica_equals_file()


@pytest.mark.timeout(30)
def test_what_is_no_database(tmp_path: Path) -> None:
    """A file of another kind is SQLite's to refuse; closing it waits for nothing."""
    database = Database(tmp_path)
    database.path.write_bytes(b"A" * 8192)
    walship.configure(database.path, str(database.replica), shutdown_sync_timeout="1m")
    connection = _open(database)
    with pytest.raises(apsw.NotADBError):
        connection.execute("SELECT * FROM sqlite_schema")
    connection.close()
    assert database.path.read_bytes() == b"A" * 8192


def test_what_nobody_configured(tmp_path: Path) -> None:
    """Without a replica any journal mode will do, beside a replicated database too."""
    database = Database(tmp_path)
    other = tmp_path / "other.db"
    with database.opened() as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("ATTACH ? AS other", (str(other),))
        for mode in ("delete", "persist", "truncate", "memory", "wal", "delete"):
            assert connection.pragma("journal_mode", mode, schema="other") == mode
            connection.execute("CREATE TABLE IF NOT EXISTS other.u (x)")
            connection.execute("INSERT INTO other.u VALUES (?)", (mode,))
            connection.execute("INSERT INTO t VALUES (?)", (mode,))
        database.assert_replica_equals_now()
    assert len(dump(other)) == 7
    assert not (tmp_path / ".other.db-walship").exists()
    database.assert_replica_equals_file()
