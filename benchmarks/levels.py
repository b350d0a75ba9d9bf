"""Levels: what merging and snapshots cost, and whether the application feels them.

A process commits at a steady rate, first beside an engine that only ships, then beside one that
merges into level 1 every second and makes one snapshot of the whole database after the other.
Another one commits once a second with everybody's defaults, and a proxy counts the requests.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from harness import (
    LITESTREAM,
    WALSHIP,
    Litestream,
    Row,
    Sample,
    Setting,
    Worker,
    at_least,
    at_most,
    interleave,
    measure,
    sample,
)
from proxy import proxy

_RATE = 500  # commits a second


def run(setting: Setting) -> list[Row]:
    return [*_merging(setting), _requests(setting)]


def _requests(setting: Setting) -> Row:
    """Of databases that commit once a second, both contestants at the same time."""
    seconds = int(setting.pick(240, 30))
    counts: dict[str, Sample | None] = {}
    with contextlib.ExitStack() as stack:
        watched = []
        for name in (LITESTREAM, WALSHIP):
            place = stack.enter_context(setting.place())
            way = stack.enter_context(proxy(setting.endpoint.url, place.directory / "proxy.log"))
            job = {
                "task": "paced",
                "contestant": name,
                "directory": str(place.directory),
                "path": str(place.database),
                "replica": place.replica(url=way.url),
                "rate": 1,
                "commits": seconds + 40,
            }
            worker = stack.enter_context(Worker(job, setting))
            worker.wait_ready()
            if name == LITESTREAM:
                stack.enter_context(Litestream(place, {place.database: job["replica"]}))
                place.wait_for_object()
            watched.append((name, way, worker))
        for _, _, worker in watched:
            worker.go()
        time.sleep(34)  # opening is over, and so is the first look at what is there
        began = time.monotonic()
        time.sleep(seconds)
        ended = time.monotonic()
        for name, way, worker in watched:
            found = sum(began <= request.t0 < ended for request in way.requests())
            counts[name] = Sample((found * 3600 / seconds,))
            worker.kill()
    theirs = counts[LITESTREAM]
    assert theirs is not None
    what = "requests an hour of a database that commits once a second"
    return Row("levels", what, counts, at_most(round(theirs.median)))


def _merging(setting: Setting) -> list[Row]:
    n_bytes = int(setting.pick(1_000_000_000, 60_000_000))
    job = {
        "task": "levels",
        "bytes": n_bytes,
        "segments": int(setting.pick(200, 60)),
        "seconds": setting.pick(30, 8),
        "rate": _RATE,
    }

    def once(name: str) -> dict[str, Any]:
        with setting.place() as place:
            return measure(setting, name, dict(job), place)

    found = interleave(setting, (WALSHIP,), once, min(3, setting.rounds))[WALSHIP]

    def ours(key: str) -> dict[str, Sample | None]:
        return {WALSHIP: sample(found, key)}

    idle, merging = sample(found, "idle_p999_us"), sample(found, "merging_p999_us")
    assert idle is not None
    assert merging is not None
    size = f"{n_bytes / 1e9:g} GB"
    how = f"{_RATE} commits/s"
    return [
        Row("levels", "merging into level 1, MB/s read", ours("level_1_mb_per_s"), at_least(100)),
        Row("levels", f"snapshot of {size}, MB/s read", ours("level_9_mb_per_s"), at_least(150)),
        Row("levels", "memory that takes, MB", ours("merging_mb"), at_most(150)),
        Row("levels", f"commit latency p50, us, {how}, idle", ours("idle_p50_us")),
        Row("levels", f"commit latency p50, us, {how}, merging", ours("merging_p50_us")),
        Row("levels", f"commit latency p99.9, us, {how}, idle", {WALSHIP: idle}),
        Row("levels", f"commit latency p99.9, us, {how}, merging", {WALSHIP: merging}),
        Row("levels", "the latter over the former", {WALSHIP: merging / idle}, at_most(1.5)),
        Row("levels", "longest commit, ms, merging", ours("merging_max_ms")),
    ]
