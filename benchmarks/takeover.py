"""Take-over: of several processes that have a database open, the one that uploads is killed.

Each of them commits durably and notes, outside of the database, when each commit began and when it
was acknowledged.  The longest wait for an acknowledgement after a kill is what the take-over took.
Then the next one that uploads is killed, until one is left; at last the replica is restored and
compared with the notes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Any

import apsw
from harness import WALSHIP, BenchmarkError, Place, Row, Sample, Setting, Worker, at_most, settle

from crash import restore

PROCESSES = 4
#: The byte of the lock file that the process which uploads has locked (`replica.election`).
_UPLOADER_BYTE = 2
_FLOCK = struct.Struct("hhqqi4x")
#: From one kill to the next.
_STEP_S = 2.5


def run(setting: Setting) -> list[Row]:
    found = [_once(setting) for _ in range(setting.rounds)]
    waits = Sample(tuple(wait for result in found for wait in result["waits_ms"]))
    slowest = Sample((waits.high,))
    missing = Sample(tuple(float(result["missing"]) for result in found))
    what = f"{PROCESSES} processes, SIGKILL of the one that uploads"
    return [
        Row("takeover", f"longest wait of a durable commit after it, ms, {what}", {WALSHIP: waits}),
        Row(
            "takeover",
            f"the same, ms: worst of {len(waits.values)} kills",
            {WALSHIP: slowest},
            at_most(1000),
        ),
        Row(
            "takeover",
            "acknowledged commits missing in the replica afterwards",
            {WALSHIP: missing},
            at_most(0),
        ),
    ]


def _once(setting: Setting) -> dict[str, Any]:
    with setting.place() as place, contextlib.ExitStack() as stack:
        notes = place.directory / "notes"
        notes.touch()
        workers: dict[int, Worker] = {}
        for writer in range(PROCESSES):
            job = {
                "task": "take_over",
                "contestant": WALSHIP,
                "directory": str(place.directory),
                "path": str(place.database),
                "replica": place.replica(),
                "notes": str(notes),
                "writer": writer,
                "seconds": _STEP_S * PROCESSES,
            }
            worker = stack.enter_context(Worker(job, setting))
            worker.wait_ready()
            workers[worker.process.pid] = worker
        settle()
        for worker in workers.values():
            worker.go()
        kills = []
        for _ in range(PROCESSES - 1):
            time.sleep(_STEP_S - 0.5)
            pid = _uploader(place)
            if pid not in workers:
                raise BenchmarkError(f"none of the processes uploads (but {pid})")
            workers.pop(pid).kill()
            kills.append(time.monotonic())
        for worker in workers.values():
            worker.result()
        commits = _read(notes)
        waits_ms = [
            1e3
            * max(t1 - max(t0, kill) for _, _, t0, t1 in commits if t0 < kill + 1.5 and t1 > kill)
            for kill in kills
        ]
        return {"waits_ms": waits_ms, "missing": _missing(place, commits)}


def _uploader(place: Place) -> int | None:
    """The process that holds the uploader's lock, as the kernel says; None if nobody does."""
    lock = place.database.with_name(f".{place.database.name}-walship") / "lock"
    fd = os.open(lock, os.O_RDWR)
    try:
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _UPLOADER_BYTE, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid


def _read(notes: Path) -> list[tuple[int, int, float, float]]:
    """Acknowledged commits: ``(writer, number, began, acknowledged)``."""
    found = []
    for line in notes.read_text().splitlines():
        writer, number, t0, t1 = map(int, line.split())
        found.append((writer, number, t0 / 1e9, t1 / 1e9))
    return found


def _missing(place: Place, commits: list[tuple[int, int, float, float]]) -> int:
    output = place.directory / "restored.db"
    fault = restore(place, WALSHIP, output)
    if fault is not None:
        raise BenchmarkError(fault)
    with contextlib.closing(apsw.Connection(str(output))) as db:
        if db.pragma("integrity_check") != "ok":
            raise BenchmarkError("the restored database is damaged")
        there = set(db.execute("select w, n from t"))
    return sum((writer, number) not in there for writer, number, _, _ in commits)
