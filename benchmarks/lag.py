"""Lag: from a commit to its content being in the store.

Every commit writes its number into the database.  A proxy before the store records when each PUT
was answered there; afterwards the objects' pages say which numbers they hold.  A commit counts as
replicated when the first segment that holds its number or a later one, and all segments before it,
are in the store.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from harness import (
    LITESTREAM,
    WALSHIP,
    BenchmarkError,
    Litestream,
    Place,
    Row,
    Setting,
    Worker,
    at_most,
    interleave,
    percentile,
    sample,
    settle,
)
from proxy import Proxy, proxy

from walship.replica.format.ltx import decode

RATE = 50
#: A store this far away answers a request after this many ms (there and back).
DISTANCE_MS = 30
_MARK = re.compile(rb"bench-seq-(\d{12})")
_BOTH = (LITESTREAM, WALSHIP)
#: How long Litestream may take to deliver the last commit.
_PATIENCE_S = 120.0

CASES: Sequence[tuple[str, str, float, float, float]] = (
    ("1s", "sync-interval 1 s", 0, 510, 1010),
    ("100ms", "sync-interval 100 ms", 0, 53, 110),
    ("10ms", "sync-interval 10 ms", 0, 8, 13),
    ("10ms", f"sync-interval 10 ms, store {DISTANCE_MS} ms away", DISTANCE_MS, 50, 90),
)


def run(setting: Setting) -> list[Row]:
    rows = []
    for interval, how, delay_ms, p50, p99 in CASES:
        seconds = setting.pick(6 if interval == "1s" else 4, 1.5)
        results = interleave(
            setting,
            _BOTH,
            partial(_steady, setting, interval, delay_ms, seconds),
        )
        for key, what, limit in (("p50", "p50", p50), ("p99", "p99", p99)):
            samples = {name: sample(found, key) for name, found in results.items()}
            rows.append(
                Row("lag", f"lag at {RATE} commits/s, ms, {how}: {what}", samples, at_most(limit))
            )
    return rows + _idle_rows(setting)


def _steady(
    setting: Setting, interval: str, delay_ms: float, seconds: float, name: str
) -> dict[str, Any]:
    with setting.place() as place, contextlib.ExitStack() as stack:
        way = stack.enter_context(
            proxy(setting.endpoint.url, place.directory / "proxy.log", delay_ms)
        )
        commits = int(seconds * RATE)
        job: dict[str, Any] = {
            "task": "paced",
            "contestant": name,
            "directory": str(place.directory),
            "path": str(place.database),
            "rate": RATE,
            "commits": commits,
        }
        if name == WALSHIP:
            job["replica"] = place.replica(url=way.url, **{"sync-interval": interval})
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        if name == LITESTREAM:
            replica = place.replica(url=way.url)
            stack.enter_context(Litestream(place, {place.database: replica}, interval))
            place.wait_for_object()
            time.sleep(1.0)
        settle()
        worker.go()
        times = worker.wait_ready()["times"]
        found = wait_for(place, way, "db", len(times))
        worker.go()
        worker.result()
        lags = sorted(lags_ms(times, found))
        return {"p50": percentile(lags, 0.5), "p99": percentile(lags, 0.99)}


def _idle_rows(setting: Setting) -> list[Row]:
    results = interleave(setting, _BOTH, lambda name: _single(setting, name))
    quickest = sample([r for found in results.values() for r in found], "put_p50")
    slowest = sample([r for found in results.values() for r in found], "put_p99")
    assert quickest is not None
    assert slowest is not None
    rows = []
    for key, what, base, more in (("p50", "p50", quickest, 5), ("p99", "p99", slowest, 15)):
        samples = {name: sample(found, key) for name, found in results.items()}
        goal = at_most(round(base.median + more, 1), f" (a PUT's {what} + {more})")
        rows.append(
            Row("lag", f"idle database, one commit until in the store, ms: {what}", samples, goal)
        )
    return rows


def _single(setting: Setting, name: str) -> dict[str, Any]:
    """Several databases, each idle before each of its commits."""
    n_databases = 8
    with setting.place() as place, contextlib.ExitStack() as stack:
        way = stack.enter_context(proxy(setting.endpoint.url, place.directory / "proxy.log"))
        paths = [place.directory / f"idle-{number}.db" for number in range(n_databases)]
        replicas = {path: place.replica(path.stem, way.url) for path in paths}
        job = {
            "task": "single",
            "contestant": name,
            "directory": str(place.directory),
            "databases": {str(path): replica for path, replica in replicas.items()},
            "commits": int(setting.pick(6, 2)),
            "idle_s": 1.6,
            "seed": len(place.bucket),
        }
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        if name == LITESTREAM:
            stack.enter_context(Litestream(place, replicas))
            for path in paths:
                place.wait_for_object(path.stem)
        settle()
        worker.go()
        times = worker.wait_ready()["times"]
        lags: list[float] = []
        for path, own in zip(paths, times, strict=True):
            found = wait_for(place, way, path.stem, len(own))
            lags += lags_ms(own, found)
        worker.go()
        worker.result()
        lags.sort()
        puts = sorted(put_times_ms(setting, place, way))
    return {
        "p50": percentile(lags, 0.5),
        "p99": percentile(lags, 0.99),
        "put_p50": percentile(puts, 0.5),
        "put_p99": percentile(puts, 0.99),
    }


def put_times_ms(setting: Setting, place: Place, way: Proxy, n: int = 50) -> list[float]:
    """How long one small PUT takes from a Python client, through the same proxy."""
    from dataclasses import replace

    found = []
    with contextlib.closing(replace(setting.endpoint, url=way.url).client()) as client:
        # The SDK would ask first whether it may send: a round trip more.
        client.meta.events.register_last("before-call.s3", _drop_expect)
        for number in range(n + 5):
            before = time.monotonic()
            client.put_object(Bucket=place.bucket, Key=f"put/{number}", Body=b"x" * 600)
            if number >= 5:
                found.append((time.monotonic() - before) * 1e3)
            time.sleep(0.02)
    return found


def _drop_expect(params: dict[str, Any], **_: object) -> None:
    params["headers"].pop("Expect", None)


# --- which object holds which commit --------------------------------------------------------------


def wait_for(place: Place, way: Proxy, path: str, last: int) -> list[tuple[float, int]]:
    """Arrivals in TXID order, ``(time, highest commit number)``, once the last commit is there.

    Raises:
        BenchmarkError: it never arrived.
    """
    deadline = time.monotonic() + _PATIENCE_S
    with contextlib.closing(place.endpoint.client()) as client:
        known: dict[str, int] = {}
        while True:
            arrivals = {
                request.path: request.t1
                for request in reversed(way.requests())
                if request.method in ("PUT", "POST") and request.status == 200
            }
            _read_new(client, place, path, known)
            found = _in_order(place, arrivals, known)
            if found and found[-1][1] >= last:
                return found
            if time.monotonic() > deadline:
                highest = found[-1][1] if found else None
                raise BenchmarkError(f"commit {last} never arrived (only {highest})")
            time.sleep(0.1)


def _read_new(client: Any, place: Place, path: str, known: dict[str, int]) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(
        Bucket=place.bucket, Prefix=f"{path}/0000/"
    ):
        for item in page.get("Contents", ()):
            key = item["Key"]
            if key not in known:
                data = client.get_object(Bucket=place.bucket, Key=key)["Body"].read()
                known[key] = highest_mark(data)


def highest_mark(segment: bytes) -> int:
    """The highest commit number in an LTX segment; -1 if there is none."""
    _, pages = decode(segment)
    return max((int(mark) for _, page in pages for mark in _MARK.findall(page)), default=-1)


def _in_order(
    place: Place, arrivals: Mapping[str, float], known: Mapping[str, int]
) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    at, highest = 0.0, -1
    for key in sorted(known):
        arrived = arrivals.get(f"/{place.bucket}/{key}")
        if arrived is None:
            break  # listed, and its answer is about to be recorded
        at, highest = max(at, arrived), max(highest, known[key])
        found.append((at, highest))
    return found


def lags_ms(times: Sequence[float], found: Sequence[tuple[float, int]]) -> list[float]:
    """Lag of commits 1, 2, ... that were done at ``times``."""
    lags = []
    index = 0
    for number, committed in enumerate(times, start=1):
        while found[index][1] < number:
            index += 1
        lags.append((found[index][0] - committed) * 1e3)
    return lags
