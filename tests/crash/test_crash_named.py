"""Killed at a named point, a process loses nothing, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.databases import Database
from support.history import History
from support.killing import POINTS, Report, run_writer

_BALLAST_BYTES = 400_000

#: Points that the tour through a database which was replicated before does not pass.
_ONLY_FRESH = {"first copy, before", "first copy, after"}
_RESTORING = {"restore, during", "restore, filled", "restore, appeared"}
#: Points that are passed once per process, so that they are never passed for the third time.
_ONCE = {"reconcile, before", "reconcile, after"}
_RUNNING = sorted(set(POINTS) - _ONLY_FRESH - _RESTORING)
_FRESH = [
    "acknowledge, before",
    "bell, after",
    "first copy, after",
    "first copy, before",
    "first copy, during",
    "freeze, after",
    "freeze, before",
    "gate restart, after",
    "gate restart, before",
    "journal rewrite, after",
    "journal rewrite, before",
    "put, after",
    "put, torn",
    "reconcile, after",
    "record, after",
    "wal header, after",
]


def _write(database: Database, **job: object) -> Report:
    report = run_writer(
        database.path,
        database.replica,
        ballast_bytes=_BALLAST_BYTES,
        tour=True,
        rewrite_bytes=4_000,
        **job,  # type: ignore[arg-type]
    )
    assert report.errors == ""
    return report


def _assert_prefix(database: Database, history: History, *, least: int, most: int) -> None:
    """What is in the replica right after the kill: whole, and a prefix of what was committed."""
    if least == 0 and not database.segments():
        return
    restored = database.restore()
    assert least <= history.length_of(restored) <= most
    restored.unlink()


def _finish(database: Database, history: History, *, acknowledged: int) -> None:
    """Open again, commit more, close: nothing acknowledged is missing, here or in the replica."""
    with database.opened() as connection:
        n = history.length(connection)
        assert acknowledged <= n <= acknowledged + 1
        for step in range(n, n + 3):
            history.apply(connection, step)
        database.sync()
    database.assert_replica_equals_file()
    assert history.length_of(database.restore()) == n + 3


@pytest.mark.parametrize("point", _RUNNING)
def test_killed_while_running(point: str, tmp_path: Path) -> None:
    """A kill at any point loses nothing acknowledged, and no full copy follows the restart."""
    history = History(ballast_bytes=_BALLAST_BYTES)
    database = Database(tmp_path)
    with database.opened() as connection:
        history.apply(connection, 0)
        database.sync()
    acknowledged = synced = 1
    sent = set(database.segments())
    for hit in (1,) if point in _ONCE else (1, 3):
        report = _write(database, point=point, hit=hit, steps=60)
        assert report.killed, "the point was not reached"
        acknowledged = max(acknowledged, report.committed)
        synced = max(synced, report.synced)
        _assert_prefix(database, history, least=synced, most=acknowledged + 1)
    _finish(database, history, acknowledged=acknowledged)
    new = {name: size for name, size in database.segments().items() if name not in sent}
    assert max(new.values()) < _BALLAST_BYTES / 2, "a full copy was sent again"


@pytest.mark.parametrize("point", _FRESH)
def test_killed_at_the_first_start(point: str, tmp_path: Path) -> None:
    """A kill during the very first start of replication loses nothing acknowledged."""
    history = History(ballast_bytes=_BALLAST_BYTES)
    database = Database(tmp_path)
    report = _write(database, point=point, steps=20)
    assert report.killed, "the point was not reached"
    _assert_prefix(database, history, least=report.synced, most=report.committed + 1)
    if report.committed == 0:
        report = _write(database, steps=2)
        assert report.finished
    _finish(database, history, acknowledged=report.committed)


@pytest.mark.parametrize("point", sorted(_RESTORING))
def test_killed_while_restoring(point: str, tmp_path: Path) -> None:
    """A kill while a missing database is being restored leaves no half database behind."""
    history = History(ballast_bytes=_BALLAST_BYTES)
    database = Database(tmp_path)
    with database.opened() as connection:
        for step in range(5):
            history.apply(connection, step)
            database.sync()
    for name in tmp_path.iterdir():
        if name != database.replica:
            _remove(name)
    report = _write(database, point=point, steps=5)
    assert report.killed, "the point was not reached"
    if database.path.exists():
        assert history.length_of(database.path) == 5
    _finish(database, history, acknowledged=5)


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink()
