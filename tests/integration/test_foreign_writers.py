"""Programs that write to an open database without the VFS: nothing they do is missed silently."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.databases import Database

_CHECKPOINTS = ("PASSIVE", "RESTART", "TRUNCATE")


def _foreign(path: Path, *statements: str) -> None:
    """Another process with another SQLite library, which closes in the end."""
    code = f"""
import sqlite3
db = sqlite3.connect({str(path)!r}, isolation_level=None)
for statement in {statements!r}:
    db.execute(statement).fetchall()
db.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path, page_size=1024)


@pytest.mark.parametrize("before", ["", *_CHECKPOINTS])
@pytest.mark.parametrize("after", ["", *_CHECKPOINTS])
@pytest.mark.parametrize("sealed", [False, True], ids=["unsealed", "sealed"])
def test_a_commit_of_another_program(
    sealed: bool, before: str, after: str, database: Database
) -> None:
    """Its commits, in whatever state of the WAL, and whatever it does to the WAL then, arrive."""
    with database.opened(sync_interval=0.0 if sealed else 3600.0) as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        if before:
            connection.execute(f"PRAGMA wal_checkpoint({before})").fetchall()
        connection.execute("INSERT INTO t VALUES (1)")
        if before and sealed:
            database.sync()
            connection.execute(f"PRAGMA wal_checkpoint({before})").fetchall()
        statements = ["INSERT INTO t VALUES (2)"]
        if after:
            statements += [f"PRAGMA wal_checkpoint({after})", "INSERT INTO t VALUES (3)"]
        _foreign(database.path, *statements)
        database.assert_replica_equals_now()
        connection.execute("INSERT INTO t VALUES (4)")
        database.assert_replica_equals_now()
        _foreign(database.path, "UPDATE t SET x = x + 10")
        connection.execute("INSERT INTO t VALUES (5)")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("INSERT INTO t VALUES (6)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("then", ["nothing", "commit", "close"])
@pytest.mark.parametrize("first", ["RESTART", "TRUNCATE"])
def test_our_frames_are_truncated_by_another_program(
    first: str, then: str, database: Database
) -> None:
    """Unsealed commits that it checkpoints and cuts off the WAL arrive all the same."""
    with database.opened(sync_interval=3600.0) as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        connection.execute(f"PRAGMA wal_checkpoint({first})").fetchall()
        connection.execute("INSERT INTO t VALUES (1)")
        _foreign(database.path, "PRAGMA wal_checkpoint(TRUNCATE)")
        if then == "commit":
            connection.execute("INSERT INTO t VALUES (2)")
        if then != "close":
            database.assert_replica_equals_now()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("then", ["nothing", "commit"])
def test_a_commit_that_leaves_no_wal(then: str, database: Database) -> None:
    """It is in the main file and nowhere else when the next of ours looks, or starts a WAL."""
    with database.opened(sync_interval=3600.0) as connection:
        connection.execute("CREATE TABLE t (x)")
        database.sync()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        _foreign(database.path, "INSERT INTO t VALUES (1)", "PRAGMA wal_checkpoint(TRUNCATE)")
        if then == "commit":
            connection.execute("INSERT INTO t VALUES (2)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()


@pytest.mark.parametrize("looks", [False, True])
def test_a_wal_of_another_program_comes_and_goes(looks: bool, database: Database) -> None:
    """What it commits, checkpoints and truncates between two looks of ours arrives."""
    with database.opened(sync_interval=3600.0) as connection:
        connection.execute("CREATE TABLE t (x); CREATE TABLE u (x)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        database.sync()
        statements = ("INSERT INTO u VALUES (1)", "PRAGMA wal_checkpoint(TRUNCATE)")
        _foreign(database.path, *statements)
        if looks:
            database.assert_replica_equals_now()
        connection.execute("INSERT INTO t VALUES (2)")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.execute("INSERT INTO t VALUES (3)")
        database.assert_replica_equals_now()
    database.assert_replica_equals_file()
