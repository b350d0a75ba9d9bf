"""Crashes: SIGKILL of everything on the machine, a restart, more commits, a restore.

Each round starts with an empty machine.  The application writes until it is killed at a random
moment, with Litestream where it takes part; then both are started again, the application commits a
little more and ends in an orderly way, Litestream is ended in an orderly way too, and what the
replica gives back must hold the same rows as the database on the disk, and pass SQLite's check.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apsw
from harness import (
    LITESTREAM,
    WALSHIP,
    BenchmarkError,
    Goal,
    Litestream,
    Place,
    Row,
    Sample,
    Setting,
    Worker,
    environment,
    litestream_program,
)
from worker import content

#: Rounds at the same time: nothing is timed, and each spends most of its time waiting.
_AT_ONCE = 4


def run(setting: Setting) -> list[Row]:
    rounds = {LITESTREAM: min(8, setting.crash_rounds), WALSHIP: setting.crash_rounds}
    games = [
        (name, number)
        for number in range(max(rounds.values()))
        for name, limit in rounds.items()
        if number < limit
    ]
    good: dict[str, int] = dict.fromkeys(rounds, 0)
    faults: dict[str, list[str]] = {name: [] for name in rounds}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        outcomes = pool.map(lambda game: _round(setting, *game), games)
        for (name, number), fault in zip(games, outcomes, strict=True):
            good[name] += fault is None
            if fault is not None:
                faults[name].append(f"round {number}: {fault}")
    for name, found in faults.items():
        for line in found[:10]:
            print(f"crash: {name}: {line}"[:400], file=sys.stderr)
    total = rounds[WALSHIP]
    samples: dict[str, Sample | None] = {
        name: Sample((float(count),)) for name, count in good.items()
    }
    what = (
        "SIGKILL, restart, more commits, restore: equal to the source "
        f"(of {rounds[LITESTREAM]} and {total} rounds)"
    )
    return [Row("crash", what, samples, Goal(total, True, f"all {total}"))]


def _round(setting: Setting, name: str, number: int) -> str | None:
    """One round; what went wrong, or None."""
    try:
        with setting.place() as place:
            return _play(setting, place, name, number)
    except BenchmarkError as error:
        return str(error).splitlines()[-1]


def _play(setting: Setting, place: Place, name: str, number: int) -> str | None:
    rng = random.Random(number)
    job = {
        "task": "crash",
        "contestant": name,
        "directory": str(place.directory),
        "path": str(place.database),
        "seed": number,
    }
    if name == WALSHIP:
        job["replica"] = place.replica(**{"sync-interval": rng.choice(("1s", "100ms", "10ms"))})
    with Worker(job, setting) as worker:
        worker.wait_ready()
        litestream = _beside(place, name)
        worker.go()
        if litestream is not None:
            place.wait_for_object()
        time.sleep(rng.uniform(0.1, 1.5))
        worker.kill()
        if litestream is not None:
            litestream.kill()
    litestream = _beside(place, name)
    with Worker({**job, "commits": 100, "seed": number + 1_000_000}, setting) as worker:
        worker.wait_ready()
        worker.go()
        digest = worker.result()["digest"]
    if litestream is not None:
        time.sleep(2.5)  # two of its intervals, then its last upload at the end
        litestream.stop()
    return _compare(place, name, digest)


def _beside(place: Place, name: str) -> Litestream | None:
    return Litestream(place, {place.database: place.replica()}) if name == LITESTREAM else None


def _compare(place: Place, name: str, digest: str) -> str | None:
    output = place.directory / "restored.db"
    fault = restore(place, name, output)
    if fault is not None:
        return fault
    with contextlib.closing(apsw.Connection(str(output))) as db:
        try:
            verdict = db.pragma("integrity_check")
            if verdict != "ok":
                return f"integrity_check: {' '.join(str(verdict).split())[:120]}"
            if content(db) != digest:
                return "the restored rows differ from the source's"
        except apsw.Error as error:
            return f"the restored database cannot be read: {error}"
    return None


def restore(place: Place, name: str, output: Path, path: str = "db") -> str | None:
    """Restore with the contestant's own command; what went wrong, or None."""
    done = subprocess.run(
        restore_command(name, place.url(path), output),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(place.endpoint),
    )
    if done.returncode == 0:
        return None
    lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
    return f"restore failed: {lines[-1][:300]}"


def restore_command(name: str, url: str, output: Path) -> list[str]:
    if name == LITESTREAM:
        return [litestream_program(), "restore", "-o", str(output), url]
    return [sys.executable, "-m", "walship.cli", "restore", "-o", str(output), url]
