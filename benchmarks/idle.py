"""Requests that an idle database causes, counted by a proxy before the store.

All rounds run at the same time: nothing happens in them.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from harness import (
    LITESTREAM,
    WALSHIP,
    Litestream,
    Row,
    Sample,
    Setting,
    Worker,
    at_most,
)
from proxy import Proxy, proxy


def run(setting: Setting) -> list[Row]:
    seconds = setting.pick(60, 10)
    settle_s = setting.pick(8, 4)
    counts: dict[str, list[float]] = {LITESTREAM: [], WALSHIP: []}
    with contextlib.ExitStack() as stack:
        watched: list[tuple[str, Proxy, Worker]] = []
        for number in range(setting.rounds):
            for name in counts:
                place = stack.enter_context(setting.place())
                log = Path(place.directory) / f"proxy-{number}.log"
                way = stack.enter_context(proxy(setting.endpoint.url, log))
                replica = place.replica(url=way.url)
                job = {
                    "task": "idle",
                    "contestant": name,
                    "directory": str(place.directory),
                    "path": str(place.database),
                    "replica": replica,
                }
                worker = stack.enter_context(Worker(job, setting))
                worker.wait_ready()
                worker.go()
                if name == LITESTREAM:
                    stack.enter_context(Litestream(place, {place.database: replica}))
                    place.wait_for_object()
                watched.append((name, way, worker))
        time.sleep(settle_s)
        began = time.monotonic()
        time.sleep(seconds)
        ended = time.monotonic()
        for name, way, _ in watched:
            counts[name].append(
                float(sum(began <= request.t0 < ended for request in way.requests()))
            )
        for _, _, worker in watched:
            worker.go()
            worker.result()
    samples: dict[str, Sample | None] = {
        name: Sample(tuple(found)) for name, found in counts.items()
    }
    return [Row("idle", f"requests of an idle database in {seconds:g} s", samples, at_most(0))]
