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
    tour: bool = False,
    put_delay_s: float = 0.0,
    rewrite_bytes: int | None = None,
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
        tour: every few transactions sync, restart, truncate and delete the WAL, in turn.
        put_delay_s: longest time a PUT takes, seconds, half of it after its effect.
        rewrite_bytes: dead bytes after which the spool's journal is rewritten, if not as always.
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
        "tour": tour,
        "put_delay_s": put_delay_s,
        "rewrite_bytes": rewrite_bytes,
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
    return str(target).endswith("/journal")


def _is_wal_name(_self: Any, name: str, _sync: Any) -> bool:
    return bool(name.endswith("-wal"))


def _is_commit_bell(_self: Any, op: int, _ptr: int) -> bool:
    import apsw

    return bool(op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO)


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
    "journal torn": Point("walship.replica.files", "write_all", "torn"),
    "journal rewrite, before": Point("os", "rename", "before", _is_journal_rename),
    "journal rewrite, after": Point("os", "rename", "after", _is_journal_rename),
    "put, before": Point(_STORE, "put", "before"),
    "put, after": Point(_STORE, "put", "after"),
    "put, torn": Point("walship.replica.store.local", "_write_body", "torn"),
    "first copy, before": Point("walship.replica.resync:Resync", "copy", "before"),
    "first copy, during": Point("walship.replica.sealing:Encoder", "finish", "before"),
    "first copy, after": Point("walship.replica.resync:Resync", "copy", "after"),
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


class _Child:
    """The program of the child process."""

    def __init__(self, job: dict[str, Any]) -> None:
        from support.history import History

        self.job = job
        self.history = History(job["seed"], job["ballast_bytes"])
        self.rng = random.Random(job["noise"])
        self.settings = dict(job["settings"])
        self.autocheckpoint = self.settings.pop("autocheckpoint", 60)
        interval = self.settings.pop("sync_interval", 0.005)
        self.replica = {"path": job["replica"], "sync_interval": interval}
        self.readers: list[Any] = []
        self.n = 0

    def run(self) -> None:
        self.connection = self.connect()
        self.n = self.history.length(self.connection)
        _say("opened", self.n)
        for step in range(self.job["steps"]):
            self.history.apply(self.connection, self.n)
            self.n += 1
            _say("commit", self.n)
            if self.job["noise"]:
                self.make_noise(self.rng.random())
            if self.job["tour"]:
                self.travel(step)
        if self.job["sync_at_end"]:
            self.sync()
        if self.job["close_at_end"]:
            self.close_readers()
            self.connection.close(True)
        _say("end")
        if not self.job["close_at_end"]:
            _die()

    def connect(self) -> Any:
        import walship

        connection = walship.connect(self.job["database"], self.replica, **self.settings)
        connection.wal_autocheckpoint(self.autocheckpoint)
        return connection

    def sync(self) -> None:
        import walship

        walship.replication(self.connection).sync(30)
        _say("synced", self.n)

    def checkpoint(self, mode: str) -> None:
        self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()

    def reopen(self) -> None:
        self.close_readers()
        self.connection.close(True)
        self.connection = self.connect()

    def close_readers(self) -> None:
        while self.readers:
            self.readers.pop().close(True)

    def travel(self, step: int) -> None:
        stop = step % 14
        if stop == 1:
            self.checkpoint("PASSIVE")
        elif stop in (2, 6):
            self.spill_and_roll_back()  # leaves frames in the WAL that are no commits
        elif stop == 3:
            self.sync()
            self.checkpoint("RESTART")
        elif stop == 7:
            self.checkpoint("TRUNCATE")
        elif stop == 10:
            self.reopen()
        elif stop == 12:
            self.checkpoint("FULL")

    def make_noise(self, chance: float) -> None:
        if chance < 0.10:
            self.checkpoint(self.rng.choice(("PASSIVE", "FULL", "RESTART", "TRUNCATE")))
        elif chance < 0.14:
            self.reopen()
        elif chance < 0.20:
            self.readers.append(self.connect())
            self.readers[-1].execute("BEGIN")
            self.readers[-1].execute("SELECT count(*) FROM cells").fetchall()
        elif chance < 0.27:
            if self.readers:
                self.readers.pop().close(True)
        elif chance < 0.32:
            self.sync()
        elif chance < 0.40:
            time.sleep(self.rng.random() * 0.02)
        elif chance < 0.43:
            self.spill_and_roll_back()

    def spill_and_roll_back(self) -> None:
        self.connection.execute("PRAGMA cache_size = 2")
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.execute("UPDATE cells SET pad = randomblob(3000)")
        self.connection.execute("ROLLBACK")
        self.connection.execute("PRAGMA cache_size = -2000")


def _slow_puts(longest_s: float, seed: int) -> None:
    """Make every PUT of a directory replica take its time, before and after the effect."""
    from walship.replica.store.local import LocalStore

    rng = random.Random(seed)
    put = LocalStore.put

    def slow(*args: Any, **keywords: Any) -> Any:
        time.sleep(rng.random() * longest_s / 2)
        result = put(*args, **keywords)
        time.sleep(rng.random() * longest_s / 2)
        return result

    LocalStore.put = slow  # type: ignore[method-assign]


def _main(job: dict[str, Any]) -> None:
    if job["put_delay_s"]:
        _slow_puts(job["put_delay_s"], job["noise"])
    if job["rewrite_bytes"] is not None:
        _resolve("walship.replica.spool")._REWRITE_BYTES = job["rewrite_bytes"]
    if job["point"] is not None:
        arm(POINTS[job["point"]], job["hit"])
    _Child(job).run()


def _parse() -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=json.loads)
    job: dict[str, Any] = parser.parse_args().job
    return job


if __name__ == "__main__":
    _main(_parse())
