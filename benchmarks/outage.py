"""An outage: the store is gone, and an hour of commits has built up; then it is back.

The backlog is brought about quickly, by committing what an hour at 50 commits/s would.  With it in
place and the store still gone the commits are timed.  Then the store comes back, and what counts is
how long and how many objects it takes until all is there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

from harness import (
    CONTESTANTS,
    LITESTREAM,
    PLAIN,
    WALSHIP,
    Litestream,
    Place,
    Row,
    Sample,
    Setting,
    Worker,
    against,
    at_most,
    interleave,
    sample,
    settle,
)
from lag import wait_for
from proxy import Proxy, proxy

RATE = 50


def run(setting: Setting) -> list[Row]:
    backlog = int(setting.pick(3600 * RATE, 6000))
    results = interleave(setting, CONTESTANTS, lambda name: _once(setting, backlog, name))

    def samples(key: str) -> dict[str, Sample | None]:
        return {name: sample(found, key) for name, found in results.items()}

    when = f"during an outage, {backlog:,} commits behind"
    p999 = samples("p999_us")
    return [
        Row("outage", f"commit latency p50, us, {when}", samples("p50_us")),
        Row("outage", f"commit latency p99.9, us, {when}", p999),
        Row("outage", "p99.9 against plain", against(p999), at_most(1.5)),
        Row("outage", "longest commit, ms", samples("max_ms")),
        Row(
            "outage",
            "state directory against the database, largest",
            samples("spool"),
            at_most(1.0),
        ),
        Row("outage", "WAL, MB, largest", samples("wal_mb")),
        Row("outage", "after the outage: s until all is in the store", samples("caught_up_s")),
        Row("outage", "of that after the first request was answered", samples("after_first_s")),
        Row("outage", "objects that took", samples("objects")),
        Row("outage", "MB that took", samples("sent_mb")),
    ]


def _once(setting: Setting, backlog: int, name: str) -> dict[str, Any]:
    with setting.place() as place, contextlib.ExitStack() as stack:
        way = stack.enter_context(proxy(setting.endpoint.url, place.directory / "proxy.log"))
        job: dict[str, Any] = {
            "task": "outage",
            "contestant": name,
            "directory": str(place.directory),
            "path": str(place.database),
            "rows": int(setting.pick(200_000, 20_000)),
            "backlog": backlog,
            "seconds": setting.pick(6, 1.5),
        }
        if name == WALSHIP:
            job["replica"] = place.replica(url=way.url)
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        if name == LITESTREAM:
            replica = place.replica(url=way.url)
            stack.enter_context(Litestream(place, {place.database: replica}))
            place.wait_for_object()
            time.sleep(1.0)
        way.down()
        settle()
        with _Sizes(place.database) as sizes:
            worker.go()
            worker.wait_ready()
            settle()
            worker.go()
            found = worker.wait_ready()
        if name != PLAIN:
            found["spool"] = sizes.state_bytes / sizes.database_bytes
            found["wal_mb"] = sizes.wal_bytes / 1e6
            found |= _catch_up(place, way, worker, name)
        worker.go()
        if name == PLAIN:
            worker.wait_ready()
            worker.go()
        worker.result()
        return found


def _catch_up(place: Place, way: Proxy, worker: Worker, name: str) -> dict[str, Any]:
    """Bring the store back and wait until it has everything."""
    before = place.endpoint.keys(place.bucket)
    began = time.monotonic()
    way.up()
    if name == WALSHIP:
        worker.go()
        ended = worker.wait_ready()["caught_up"]
    else:
        arrivals = wait_for(place, way, "db", 1)
        ended = next(at for at, highest in arrivals if highest >= 1)
        worker.go()
        worker.wait_ready()
    requests = [request for request in way.requests() if began < request.t1 <= ended]
    fresh = {
        key: size
        for key, size in place.endpoint.keys(place.bucket, "db/0000/").items()
        if key not in before
    }
    return {
        "caught_up_s": ended - began,
        "after_first_s": ended - min((request.t1 for request in requests), default=began),
        "objects": len(fresh),
        "sent_mb": sum(fresh.values()) / 1e6,
    }


class _Sizes:
    """Watches how large the local state of a database grows, ten times a second.

    Attributes:
        database_bytes, state_bytes, wal_bytes: of the main file, of what is in the state directory
            beside it, and of the WAL; the largest seen.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.database_bytes = self.state_bytes = self.wal_bytes = 0

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.database_bytes = max(self.database_bytes, _size_of(self._database))
            beside = sum(
                _size_of(path)
                for directory in self._database.parent.glob(f".{self._database.name}-*")
                for path in directory.rglob("*")
            )
            self.state_bytes = max(self.state_bytes, beside)
            wal = self._database.with_name(f"{self._database.name}-wal")
            self.wal_bytes = max(self.wal_bytes, _size_of(wal))

    def __enter__(self) -> _Sizes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it comes and goes
        return 0
