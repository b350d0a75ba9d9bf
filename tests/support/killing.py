"""Processes that write through the VFS and die by SIGKILL, at a random or a named moment.

The parent side is `Writer`; the child side is this file run as a program.  The child commits the
transactions of a `History`, reports each on its standard output once SQLite has acknowledged it,
and kills itself when a named point is passed for the n-th time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent
#: No child may run longer than this, seconds.
_LIMIT_S = 60.0


@dataclass
class Report:
    """What a child said before it ended.

    Attributes:
        committed: transactions acknowledged by SQLite, counted from the beginning of the history.
        synced: transactions that were in the replica at the end of the last successful sync.
        status: the exit status; ``-signal.SIGKILL`` if it was killed.
        finished: whether it came to its end.
        errors: what it wrote to standard error.
    """

    committed: int = 0
    synced: int = 0
    status: int = 0
    finished: bool = False
    errors: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


def run_writer(
    database: Path,
    replica: Path,
    *,
    seed: int = 0,
    ballast_bytes: int = 0,
    steps: int = 40,
    noise: int = 0,
    point: str | None = None,
    hit: int = 1,
    kill_after_s: float | None = None,
    kill_after_commits: int | None = None,
    sync_at_end: bool = True,
    close_at_end: bool = True,
    settings: dict[str, Any] | None = None,
) -> Report:
    """Run a child that goes on with the history where the database ends.

    Args:
        database, replica: what it opens.
        seed, ballast_bytes: of the `History`.
        steps: transactions to commit, at most.
        noise: seed of checkpoints, reopens, syncs and readers in between; 0 for none.
        point: name of a point in `POINTS` to die at, or None.
        hit: how many times the point is passed first, plus one.
        kill_after_s: SIGKILL by the parent this long after the first commit.
        kill_after_commits: SIGKILL by the parent once so many commits were reported.
        sync_at_end, close_at_end: how it ends if nobody kills it.
        settings: keywords of ``walship.connect``.
    """
    job = {
        "database": str(database),
        "replica": str(replica),
        "seed": seed,
        "ballast_bytes": ballast_bytes,
        "steps": steps,
        "noise": noise,
        "point": point,
        "hit": hit,
        "sync_at_end": sync_at_end,
        "close_at_end": close_at_end,
        "settings": settings or {},
    }
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SUPPORT.parent)},
    )
    report = Report()
    try:
        _listen(child, report, kill_after_s, kill_after_commits)
    finally:
        if child.poll() is None:
            child.kill()
        assert child.stderr is not None
        assert child.stdout is not None
        report.errors = child.stderr.read().decode()
        child.stderr.close()
        child.stdout.close()
        report.status = child.wait()
    return report


def _listen(
    child: subprocess.Popen[bytes],
    report: Report,
    kill_after_s: float | None,
    kill_after_commits: int | None,
) -> None:
    assert child.stdout is not None
    limit = time.monotonic() + _LIMIT_S
    kill_at: float | None = None
    seen = 0
    buffer = b""
    fd = child.stdout.fileno()
    while True:
        now = time.monotonic()
        if now > limit:
            raise AssertionError("the child neither ended nor was killed")
        if kill_at is not None and now >= kill_at:
            child.kill()
            kill_at = None
        wait = min(x for x in (limit, kill_at) if x is not None) - now
        if not select.select([fd], [], [], max(0.0, wait))[0]:
            continue
        data = os.read(fd, 65536)
        if not data:
            return
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            word, _, value = line.decode().partition(" ")
            if word == "commit":
                report.committed = int(value)
                seen += 1
                if kill_after_s is not None and kill_at is None and seen == 1:
                    kill_at = time.monotonic() + kill_after_s
                if kill_after_commits == seen:
                    child.kill()
            elif word == "synced":
                report.synced = int(value)
            elif word == "end":
                report.finished = True
            else:
                report.notes.append(line.decode())


# -- the child ------------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@dataclass(frozen=True)
class Point:
    """A moment in a function: before it begins, after it ended, or by a wrapper of its own."""

    owner: str
    name: str
    when: str = "before"
    matches: Callable[..., bool] | None = None


def _is_wal_header(_self: Any, data: bytes, offset: int) -> bool:
    return offset == 0 and len(data) == 32


def _is_commit_header(_self: Any, data: bytes, _offset: int) -> bool:
    return len(data) == 24 and data[4:8] != b"\0\0\0\0"


def _is_page(_self: Any, data: bytes, _offset: int) -> bool:
    return len(data) >= 512


def _is_journal_rename(_source: Any, target: Any) -> bool:
    return os.fspath(target).endswith("/journal")


def _is_wal_name(_self: Any, name: str, _sync: Any) -> bool:
    return name.endswith("-wal")


def _is_commit_bell(_self: Any, op: int, _ptr: int) -> bool:
    import apsw

    return op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO


_SPOOL = "walship.replica.spool:Spool"
_CAPTURE = "walship.replica.capture:Capture"
_WAL = "walship.vfs.files:WalFile"
_MAIN = "walship.vfs.files:MainFile"
_STORE = "walship.replica.store.local:LocalStore"

#: Every named point: where the process can be made to die.
POINTS: dict[str, Point] = {
    "commit frame header, before": Point(_WAL, "xWrite", "before", _is_commit_header),
    "commit frame header, after": Point(_WAL, "xWrite", "after", _is_commit_header),
    "wal page, after": Point(_WAL, "xWrite", "after", _is_page),
    "wal header, before": Point(_WAL, "xWrite", "before", _is_wal_header),
    "wal header, after": Point(_WAL, "xWrite", "after", _is_wal_header),
    "wal sync, before": Point(_WAL, "xSync", "before"),
    "wal truncate, before": Point(_WAL, "xTruncate", "before"),
    "wal truncate, after": Point(_WAL, "xTruncate", "after"),
    "wal delete, before": Point(
        "walship.vfs.replicating:ReplicatingVFS", "xDelete", "before", _is_wal_name
    ),
    "wal delete, after": Point(
        "walship.vfs.replicating:ReplicatingVFS", "xDelete", "after", _is_wal_name
    ),
    "main page, after": Point(_MAIN, "xWrite", "after", _is_page),
    "main sync, before": Point(_MAIN, "xSync", "before"),
    "bell, before": Point(_MAIN, "xFileControl", "before", _is_commit_bell),
    "bell, after": Point(_MAIN, "xFileControl", "after", _is_commit_bell),
    "gate restart, before": Point(_CAPTURE, "gate_restart", "before"),
    "gate restart, after": Point(_CAPTURE, "gate_restart", "after"),
    "gate discard, before": Point(_CAPTURE, "gate_discard", "before"),
    "gate discard, after": Point(_CAPTURE, "gate_discard", "after"),
    "seal piece, before": Point(_SPOOL, "add_piece", "before"),
    "seal piece, after": Point(_SPOOL, "add_piece", "after"),
    "freeze, before": Point(_SPOOL, "add_segment", "before"),
    "freeze, after": Point(_SPOOL, "add_segment", "after"),
    "record, before": Point(_SPOOL, "record", "before"),
    "record, after": Point(_SPOOL, "record", "after"),
    "acknowledge, before": Point(_SPOOL, "acknowledge", "before"),
    "acknowledge, after": Point(_SPOOL, "acknowledge", "after"),
    "journal torn": Point("walship.replica.spool", "write_all", "torn"),
    "journal rewrite, before": Point("os", "rename", "before", _is_journal_rename),
    "journal rewrite, after": Point("os", "rename", "after", _is_journal_rename),
    "put, before": Point(_STORE, "put", "before"),
    "put, after": Point(_STORE, "put", "after"),
    "put, torn": Point("walship.replica.store.local", "_write_body", "torn"),
    "first copy, before": Point(_CAPTURE, "copy", "before"),
    "first copy, during": Point("walship.replica.capture:Encoder", "finish", "before"),
    "first copy, after": Point(_CAPTURE, "copy", "after"),
    "reconcile, before": Point("walship.replica.engine", "reconcile", "before"),
    "reconcile, after": Point("walship.replica.engine", "reconcile", "after"),
    "drain, before": Point(_CAPTURE, "drain", "before"),
    "drain, after": Point(_CAPTURE, "drain", "after"),
    "restore, during": Point("walship.replica.restore", "apply_segments", "before"),
    "restore, filled": Point("walship.replica.restore", "apply_segments", "after"),
    "restore, appeared": Point("walship.replica.engine", "restore", "after"),
}


def _resolve(owner: str) -> Any:
    import importlib

    module, _, name = owner.partition(":")
    found: Any = importlib.import_module(module)
    return getattr(found, name) if name else found


def arm(point: Point, hit: int) -> None:
    """Make this process die at a point when it is passed for the ``hit``-th time."""
    owner = _resolve(point.owner)
    original = getattr(owner, point.name)
    left = hit

    def passes(args: tuple[Any, ...]) -> bool:
        nonlocal left
        if point.matches is not None and not point.matches(*args):
            return False
        left -= 1
        return left == 0

    def patched(*args: Any, **keywords: Any) -> Any:
        now = passes(args)
        if now and point.when == "before":
            _die()
        if now and point.when == "torn":
            _write_half(*args)
            _die()
        result = original(*args, **keywords)
        if now:
            _die()
        return result

    setattr(owner, point.name, patched)


def _write_half(fd: int, body: Any, offset: int | None = None) -> None:
    """Write the first half of what was to be written."""
    if isinstance(body, Path):
        data = body.read_bytes()
    elif isinstance(body, bytes):
        data = body
    else:
        data = b"".join(bytes(part) for part in body)
    half = data[: max(1, len(data) // 2)]
    if offset is None:
        os.write(fd, half)
    else:
        os.pwrite(fd, half, offset)


def _say(word: str, value: object = "") -> None:
    os.write(1, f"{word} {value}\n".encode())


def _main(job: dict[str, Any]) -> None:
    import apsw

    import walship
    from support.history import History

    history = History(job["seed"], job["ballast_bytes"])
    if job["point"] is not None:
        arm(POINTS[job["point"]], job["hit"])
    settings = dict(job["settings"])
    replica = {"path": job["replica"], "sync_interval": settings.pop("sync_interval", 0.005)}

    def connect() -> Any:
        connection = walship.connect(job["database"], replica, **settings)
        connection.wal_autocheckpoint(settings_autocheckpoint)
        return connection

    settings_autocheckpoint = settings.pop("autocheckpoint", 60)
    connection = connect()
    others: list[Any] = []
    n = history.length(connection)
    _say("opened", n)
    rng = random.Random(job["noise"])
    for _ in range(job["steps"]):
        history.apply(connection, n)
        n += 1
        _say("commit", n)
        if not job["noise"]:
            continue
        chance = rng.random()
        if chance < 0.10:
            mode = rng.choice(("PASSIVE", "FULL", "RESTART", "TRUNCATE"))
            connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        elif chance < 0.14:
            for other in others:
                other.close(True)
            others.clear()
            connection.close(True)
            connection = connect()
        elif chance < 0.20:
            others.append(connect())
            others[-1].execute("BEGIN")
            others[-1].execute("SELECT count(*) FROM cells").fetchall()
        elif chance < 0.27 and others:
            others.pop().close(True)
        elif chance < 0.32:
            walship.replication(connection).sync(30)
            _say("synced", n)
        elif chance < 0.40:
            time.sleep(rng.random() * 0.02)
        elif chance < 0.43:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE cells SET pad = randomblob(3000)")
            connection.execute("ROLLBACK")
    if job["sync_at_end"]:
        walship.replication(connection).sync(30)
        _say("synced", n)
    if job["close_at_end"]:
        for other in others:
            other.close(True)
        connection.close(True)
        assert not apsw.connections()
    _say("end")
    if not job["close_at_end"]:
        _die()


def _parse() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=json.loads)
    job: dict[str, Any] = parser.parse_args().job
    return job


if __name__ == "__main__":
    _main(_parse())
