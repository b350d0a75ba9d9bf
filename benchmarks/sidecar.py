"""``walship replicate`` and ``litestream replicate`` beside an application that knows neither.

Both get the same configuration file.  The application is the same program, with SQLite as it comes.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    BESIDE,
    LITESTREAM,
    PLAIN,
    WALSHIP,
    Row,
    Setting,
    Worker,
    at_most,
    interleave,
    percentile,
    sample,
    settle,
)
from lag import RATE, lags_ms, wait_for
from proxy import proxy

_BOTH = (LITESTREAM, WALSHIP)


def run(setting: Setting) -> list[Row]:
    rows = []
    idle = interleave(setting, _BOTH, partial(_idle, setting))
    rows += _rows(idle, "cpu", "CPU of an idle database, ms a second", share=True)
    rows += _rows(idle, "rss_mb", "memory (RSS) of an idle database, MB")
    rows += _rows(idle, "requests", "requests of an idle database")
    busy = interleave(setting, _BOTH, partial(_paced, setting, RATE))
    rows += _rows(busy, "p50", f"lag at {RATE} commits/s, default settings, ms: p50", share=True)
    rows += _rows(busy, "p99", f"lag at {RATE} commits/s, default settings, ms: p99")
    rows += _rows(busy, "cpu", f"CPU at {RATE} commits/s, ms a second")
    slow = interleave(setting, _BOTH, partial(_paced, setting, 1))
    return rows + _rows(slow, "requests_h", "requests an hour at one commit a second", share=True)


def _rows(
    results: dict[str, list[dict[str, Any]]], key: str, what: str, *, share: bool = False
) -> list[Row]:
    """What was measured, and perhaps walship's share of Litestream's, which has to be 1 at most."""
    samples = {name: sample(found, key) for name, found in results.items()}
    rows = [Row("sidecar", what, samples)]
    ours, theirs = samples[WALSHIP], samples[LITESTREAM]
    if share and ours is not None and theirs is not None:
        rows.append(
            Row("sidecar", f"{what}, against Litestream", {WALSHIP: ours / theirs}, at_most(1))
        )
    return rows


def _idle(setting: Setting, name: str) -> dict[str, Any]:
    seconds = setting.pick(20, 6)
    with setting.place() as place, contextlib.ExitStack() as stack:
        way = stack.enter_context(proxy(setting.endpoint.url, place.directory / "proxy.log"))
        job = {
            "task": "idle",
            "contestant": PLAIN,
            "directory": str(place.directory),
            "path": str(place.database),
        }
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        worker.go()
        beside = stack.enter_context(
            BESIDE[name](place, {place.database: place.replica(url=way.url)})
        )
        place.wait_for_object()
        time.sleep(setting.pick(5, 3))
        before, cpu = len(way.requests()), _cpu_s(beside.process.pid)
        time.sleep(seconds)
        cpu = _cpu_s(beside.process.pid) - cpu
        requests = len(way.requests()) - before
        rss_mb = _rss_mb(beside.process.pid)
        worker.go()
        worker.result()
    return {"cpu": cpu / seconds * 1e3, "rss_mb": rss_mb, "requests": requests}


def _paced(setting: Setting, rate: int, name: str) -> dict[str, Any]:
    seconds = setting.pick(8 if rate > 1 else 60, 3 if rate > 1 else 10)
    with setting.place() as place, contextlib.ExitStack() as stack:
        way = stack.enter_context(proxy(setting.endpoint.url, place.directory / "proxy.log"))
        job: dict[str, Any] = {
            "task": "paced",
            "contestant": PLAIN,
            "directory": str(place.directory),
            "path": str(place.database),
            "rate": rate,
            "commits": int(seconds * rate),
        }
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        beside = stack.enter_context(
            BESIDE[name](place, {place.database: place.replica(url=way.url)})
        )
        place.wait_for_object()
        time.sleep(1.0)
        settle()
        before, cpu = len(way.requests()), _cpu_s(beside.process.pid)
        worker.go()
        times = worker.wait_ready()["times"]
        cpu = _cpu_s(beside.process.pid) - cpu
        requests = len(way.requests()) - before
        found = wait_for(place, way, "db", len(times))
        worker.go()
        worker.result()
    lags = sorted(lags_ms(times, found))
    return {
        "p50": percentile(lags, 0.5),
        "p99": percentile(lags, 0.99),
        "cpu": cpu / seconds * 1e3,
        "requests_h": requests / seconds * 3600,
    }


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
