"""``walship replicate`` as a process of its own, beside programs that use Python's ``sqlite3``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

WAIT_S = 30.0

_WRITER = """
import random, sqlite3, sys, time
path, who, seconds, mode = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
rng = random.Random(who)
end = time.monotonic() + seconds
number = 0
while time.monotonic() < end:
    db = sqlite3.connect(path, timeout=30, isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    for _ in range(rng.randrange(1, 60)):
        db.execute("BEGIN IMMEDIATE")
        for _ in range(rng.choice((1, 1, 1, 40))):
            number += 1
            db.execute(
                "INSERT INTO rows VALUES (?, ?, randomblob(?))", (who, number, rng.randrange(900))
            )
        db.execute("COMMIT")
        if rng.random() < 0.1:
            db.execute("DELETE FROM rows WHERE who = ? AND n < ?", (who, number - 300))
        if mode != "-" and rng.random() < 0.2:
            # The sidecar's read mark is in the way of some: they have patience, or give up.
            db.execute(f"PRAGMA busy_timeout = {rng.choice((20, 20, 30000))}")
            db.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
            db.execute("PRAGMA busy_timeout = 30000")
    db.close()
print(number)
"""


class Replicate:
    """A running ``walship replicate``.

    Args:
        words: its arguments.
        log: where its messages go.
    """

    def __init__(self, words: Sequence[object], log: Path) -> None:
        self._log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "walship.cli", "replicate", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=log.parent,
                # A shell in the background would have had it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def said(self) -> str:
        """All messages so far, of earlier processes with the same log too."""
        return self._log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until a message has been seen so many times."""

        def has_come() -> bool:
            if self.said().count(text) >= count:
                return True
            assert self._process.poll() is None, f"it ended: {self.said()}"
            return False

        wait_until(has_come, lambda: f"{text!r} in {self.said()}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(WAIT_S * 2)

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        self._process.kill()
        self._process.wait(WAIT_S)


@contextlib.contextmanager
def replicating(*words: object, log: Path) -> Iterator[Replicate]:
    """``walship replicate``, which is killed at the end if it is still there."""
    running = Replicate(words, log)
    try:
        yield running
    finally:
        running.kill()


def wait_until(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    """Wait for a condition, at most `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {why()}"
        time.sleep(0.02)


def create(path: Path) -> None:
    """A database in WAL mode, for `writer`."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE rows (who, n, b)")
    db.close()


def execute(path: Path, sql: str, *parameters: object) -> list[tuple[object, ...]]:
    """Run one statement in a process of its own: this one may have the database open."""
    program = (
        "import json, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)\n"
        "print(json.dumps(db.execute(sys.argv[2], json.loads(sys.argv[3])).fetchall()))\n"
        "db.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), sql, json.dumps(parameters)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
        check=True,
    )
    return [tuple(row) for row in json.loads(done.stdout)]


def writer(path: Path, who: str, seconds: float, checkpoints: str = "-") -> subprocess.Popen[bytes]:
    """A program that writes for some seconds, and runs checkpoints of one kind now and then."""
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), who, str(seconds), checkpoints],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
