"""What is lost with a machine: SIGKILL of everything on it, and its disk is gone.

Several databases of one application are written to, and each commit is noted outside of the machine
when it is done.  After the kill the directory is deleted, the replicas are restored, and what the
notes say and the replicas lack was lost.  Its age is that of the oldest such commit, at the kill.

The second part counts commits that were acknowledged as durable and are missing; it is a test of
correctness, which `make soak` runs a thousand times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import apsw
from harness import (
    LITESTREAM,
    WALSHIP,
    BenchmarkError,
    Litestream,
    Place,
    Row,
    Sample,
    Setting,
    Worker,
    at_most,
    interleave,
    settle,
)
from proxy import proxy

from crash import restore
from support.losing import lose_machines

RATE = 50
#: What the proxy adds to each request.
DISTANCE_MS = 15
#: Databases of one application: as many kills in one.
DATABASES = 4
#: Beyond the interval and a PUT no commit may be lost that was older than this at the kill.
MORE_MS = 10
_BOTH = (LITESTREAM, WALSHIP)

#: What is done before the kill, by the interval in seconds.
CASES = ((1.0, "steady"), (0.1, "steady"), (1.0, "after a pause"))


def run(setting: Setting) -> list[Row]:
    rows = []
    for interval_s, how in CASES:
        results = interleave(
            setting,
            _BOTH,
            partial(_lose, setting, interval_s, how),
            rounds=2 * setting.rounds,
        )
        waited_ms = interval_s * 1000 if how == "steady" else 0.0
        rows += _rows(
            f"{RATE} commits/s, sync-interval {interval_s:g} s, {how}", waited_ms, results
        )
    return [*rows, _durable(setting)]


def _rows(what: str, waited_ms: float, results: dict[str, list[dict[str, Any]]]) -> list[Row]:
    ages: dict[str, Sample | None] = {}
    beyond: dict[str, Sample | None] = {}
    for name, found in results.items():
        ages[name] = Sample(tuple(age for result in found for age in result["ages_ms"]))
        beyond[name] = Sample(
            (
                max(
                    age - waited_ms - result["put_ms"]
                    for result in found
                    for age in result["ages_ms"]
                ),
            )
        )
    n_lost = sum(len(result["ages_ms"]) for result in results[WALSHIP])
    limit = "the interval and the slowest PUT of that time" if waited_ms else "the slowest PUT"
    return [
        Row("loss", f"age of the oldest commit lost with the machine, ms, {what}", ages),
        Row(
            "loss",
            f"how much older than {limit}, ms: worst of {n_lost} databases",
            beyond,
            at_most(MORE_MS),
        ),
    ]


def _lose(setting: Setting, interval_s: float, how: str, name: str) -> dict[str, Any]:
    """One kill: the age of the oldest lost commit of each database, and the slowest PUT then."""
    with setting.place() as place, contextlib.ExitStack() as stack:
        rng = random.Random(place.bucket)
        machine = place.directory / "machine"
        machine.mkdir()
        notes = place.directory / "notes"
        notes.touch()
        way = stack.enter_context(
            proxy(setting.endpoint.url, place.directory / "proxy.log", DISTANCE_MS)
        )
        interval = f"{interval_s * 1000:g}ms"
        paths = [machine / f"app-{number}.db" for number in range(DATABASES)]
        replicas = {path: place.replica(path.stem, way.url) for path in paths}
        pause = how != "steady"
        job: dict[str, Any] = {
            "task": "lose",
            "contestant": name,
            "directory": str(place.directory),
            "notes": str(notes),
            "databases": {
                str(path): {**replica, "sync-interval": interval}
                for path, replica in replicas.items()
            },
            "rate": RATE,
            "seconds": 1.0,
            "window_s": 2 * (DISTANCE_MS + MORE_MS) / 1000,
            "seed": rng.randrange(1 << 30),
            **({"pause_s": 1.3 * interval_s + 0.2} if pause else {}),
        }
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        litestream = None
        if name == LITESTREAM:
            litestream = stack.enter_context(Litestream(place, replicas, interval))
            for path in paths:
                place.wait_for_object(path.stem)
            time.sleep(1.0)
        settle()
        worker.go()
        if pause:
            worker.process.wait(60)
        else:
            time.sleep(rng.uniform(1.5, 2.5) * interval_s + 0.5)
            os.kill(worker.process.pid, signal.SIGKILL)
        killed = time.monotonic()
        if litestream is not None:
            litestream.kill()
        worker.kill()
        time.sleep(0.2)  # what was on its way may arrive
        times, end = _read(notes)
        killed = end or killed
        return {
            "ages_ms": [
                _age_ms(place, name, path, times[n], killed) for n, path in enumerate(paths)
            ],
            "put_ms": max(way.latencies_ms(r for r in way.requests() if r.is_put)),
        }


def _read(notes: Path) -> tuple[list[list[float]], float | None]:
    """When each commit of each database was done, and when the process killed itself."""
    times: list[list[float]] = [[] for _ in range(DATABASES)]
    end = None
    for line in notes.read_text().splitlines():
        index, _, at = line.split()
        if index == "end":
            end = int(at) / 1e9
        else:
            times[int(index)].append(int(at) / 1e9)
    return times, end


def _age_ms(place: Place, name: str, path: Path, times: list[float], killed: float) -> float:
    """How old the oldest commit was that the replica lacks; 0 if it has them all."""
    path.unlink()  # the machine is gone
    output = place.directory / f"restored-{path.name}"
    fault = restore(place, name, output, path.stem)
    if fault is not None:
        raise BenchmarkError(f"{name}: {fault}")
    with contextlib.closing(apsw.Connection(str(output))) as db:
        count, highest = db.execute("select count(*), coalesce(max(a), 0) from t").fetchall()[0]
    if count != highest or count > len(times) + 1:
        raise BenchmarkError(f"{name}: {count} rows up to {highest}, {len(times)} were committed")
    return (killed - times[count]) * 1e3 if count < len(times) else 0.0


def _durable(setting: Setting) -> Row:
    """Commits acknowledged as durable and missing."""
    with setting.place() as place:
        tally = lose_machines(
            lambda game: place.replica(f"game-{game}"),
            place.directory,
            setting.crash_rounds,
            at_once=2,
        )
    for fault in tally.faults[:10]:
        print(f"loss: {fault}"[:400], file=sys.stderr)
    if tally.faults and not tally.missing:
        raise BenchmarkError(f"{len(tally.faults)} faults, the first: {tally.faults[0]}")
    what = (
        f"commits acknowledged as durable and lost with the machine ({tally.kills} kills, "
        f"{tally.acknowledged} commits)"
    )
    return Row("loss", what, {WALSHIP: Sample((float(tally.missing),))}, at_most(0))
