"""Durable commits: writers that go on when the replica has their last commit.

The store is kept at a distance by a proxy, which also records how long each PUT took on its way to
the store and back; their median, of small PUTs that one client sends before the writers start, is
L.  All that comes on top is walship's: sealing, the SDK, handing over between threads, and writers
that wait for SQLite's write lock.
"""

from __future__ import annotations

import contextlib
from typing import Any

from harness import (
    WALSHIP,
    BenchmarkError,
    Place,
    Row,
    Sample,
    Setting,
    Worker,
    at_least,
    at_most,
    sample,
    settle,
)
from lag import put_times_ms
from proxy import Proxy, proxy

#: What the proxy adds to each PUT.
DISTANCE_MS = 15
#: Share of the rate that writers without any work of their own would reach.
SHARE = 0.75

#: Writers, and the processes that they are spread over.
CASES = ((1, 1), (16, 1), (64, 1), (16, 4), (64, 4))


def run(setting: Setting) -> list[Row]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(setting.rounds):
        for case in CASES:
            found[case].append(_once(setting, *case))
    put_ms = _need(sample([r for results in found.values() for r in results], "put_ms"))
    rows = [
        Row("durable", f"a PUT to a store {DISTANCE_MS} ms away, ms: p50 (L)", {WALSHIP: put_ms})
    ]
    for (writers, processes), results in found.items():
        rows += _rows(writers, processes, results, put_ms.median)
    return rows


def _rows(writers: int, processes: int, results: list[dict[str, Any]], put_ms: float) -> list[Row]:
    who = "one writer" if writers == 1 else f"{writers} writers"
    if processes > 1:
        who += f" in {processes} processes"
    rate = _need(sample(results, "per_s"))
    ideal = writers / (put_ms / 1e3)
    share = Sample(tuple(value / ideal for value in rate.values))
    p50, p99 = sample(results, "p50_ms"), sample(results, "p99_ms")
    alone = writers == 1
    return [
        Row("durable", f"durable commits/s, {who}", {WALSHIP: rate}),
        Row("durable", f"share of {writers} / L, {who}", {WALSHIP: share}, at_least(SHARE)),
        Row(
            "durable",
            f"durable commit latency, ms, {who}: p50",
            {WALSHIP: p50},
            at_most(round(put_ms + 5, 1), " (L + 5)") if alone else None,
        ),
        Row(
            "durable",
            f"durable commit latency, ms, {who}: p99",
            {WALSHIP: p99},
            at_most(round(put_ms + 20, 1), " (L + 20)") if alone else None,
        ),
        Row("durable", f"commits a PUT, {who}", {WALSHIP: sample(results, "shared")}),
        Row(
            "durable",
            f"CPU, us a commit, {who}",
            {WALSHIP: sample(results, "cpu_us")},
        ),
    ]


def _once(setting: Setting, writers: int, processes: int) -> dict[str, Any]:
    with setting.place() as place, contextlib.ExitStack() as stack:
        log = place.directory / "proxy.log"
        way = stack.enter_context(proxy(setting.endpoint.url, log, DISTANCE_MS))
        put_ms = _put_ms(setting, place, way)
        job: dict[str, Any] = {
            "task": "durable",
            "contestant": WALSHIP,
            "directory": str(place.directory),
            "path": str(place.database),
            "replica": place.replica(url=way.url),
            "writers": writers // processes,
            "warm_up_s": 0.5,
            "seconds": setting.pick(6, 2),
        }
        workers = []
        for _ in range(processes):
            workers.append(stack.enter_context(Worker(job, setting)))
            workers[-1].wait_ready()
        settle()
        n_before = len(way.requests())
        for worker in workers:
            worker.go()
        results = [worker.result() for worker in workers]
        n_puts = sum(request.is_put for request in way.requests()[n_before:])
    n_commits = sum(result["n"] for result in results)
    return {
        "put_ms": put_ms,
        "per_s": sum(result["per_s"] for result in results),
        "p50_ms": max(result["p50_ms"] for result in results),
        "p99_ms": max(result["p99_ms"] for result in results),
        "cpu_us": sum(r["cpu_us"] * r["n"] for r in results) / n_commits,
        # The warm-up's are among the PUTs.
        "shared": n_commits / max(1, n_puts) * (1 + job["warm_up_s"] / job["seconds"]),
    }


def _put_ms(setting: Setting, place: Place, way: Proxy) -> float:
    """L: the median of what small PUTs of one client take from here to the store and back."""
    put_times_ms(setting, place, way)
    times = sorted(way.latencies_ms(r for r in way.requests() if r.is_put))
    return times[len(times) // 2]


def _need(found: Sample | None) -> Sample:
    if found is None:
        raise BenchmarkError("nothing was measured")
    return found
