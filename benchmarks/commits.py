"""Single-row commits: how many a second, and how long each takes.

The database has automatic checkpoints as SQLite sets them.  For Litestream there is a second
contestant with them switched off, as its guide recommends for busy databases; its WAL then grows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from harness import (
    CONTESTANTS,
    LITESTREAM,
    PLAIN,
    WALSHIP,
    Row,
    Sample,
    Setting,
    against,
    at_least,
    at_most,
    interleave,
    measure,
    sample,
)

WITHOUT_CHECKPOINTS = "litestream, autocheckpoint off"
Results = dict[str, list[dict[str, Any]]]


def run(setting: Setting) -> list[Row]:
    rows = []
    for synchronous, limit in (("NORMAL", 0.75), ("FULL", 0.95)):
        names = list(CONTESTANTS)
        if synchronous == "NORMAL":
            names.append(WITHOUT_CHECKPOINTS)
        results = interleave(setting, names, partial(_once, setting, synchronous))
        rows += _rows(results, f"synchronous={synchronous}", limit)
    threads = interleave(setting, CONTESTANTS, partial(_once, setting, "NORMAL", threads=4))
    return rows + _rows(threads, "synchronous=NORMAL, 4 threads", None)


def _once(setting: Setting, synchronous: str, name: str, *, threads: int = 1) -> dict[str, Any]:
    job: dict[str, Any] = {
        "task": "commits",
        "seconds": setting.pick(1.6, 0.6),
        "synchronous": synchronous,
        "threads": threads,
    }
    if name == WITHOUT_CHECKPOINTS:
        job["autocheckpoint"] = 0
    with setting.place() as place:
        return measure(setting, name, job, place)


def _rows(results: Results, how: str, limit: float | None) -> list[Row]:
    def samples(key: str) -> dict[str, Sample | None]:
        return {name: sample(found, key) for name, found in results.items()}

    per_s = samples("per_s")
    p999 = samples("p999_us")
    rows = [
        Row("commits", f"single-row commits/s, {how}", per_s),
        Row(
            "commits",
            f"commits/s against plain, {how}",
            against(per_s),
            at_least(limit) if limit else None,
        ),
        Row("commits", f"commit latency p50, us, {how}", samples("p50_us")),
        Row("commits", f"commit latency p99, us, {how}", samples("p99_us")),
        Row("commits", f"commit latency p99.9, us, {how}", p999),
        Row(
            "commits",
            f"p99.9 against plain, {how}",
            against(p999),
            at_most(1.5) if limit else None,
        ),
        _longest(samples("max_ms"), how, limit is not None),
    ]
    if how.endswith("NORMAL"):
        wal = samples("wal_mb")
        rows.append(Row("commits", f"WAL at the end, MB, {how}", wal))
    return rows


def _longest(longest: dict[str, Sample | None], how: str, judged: bool) -> Row:
    plain = longest.get(PLAIN)
    goal = None
    if judged and plain is not None and longest.get(WALSHIP) is not None:
        goal = at_most(round(plain.high, 1), " (plain's longest)")
    order = {name: longest[name] for name in (PLAIN, LITESTREAM, WALSHIP) if name in longest}
    order.update({name: found for name, found in longest.items() if name not in order})
    return Row("commits", f"longest commit, ms, {how}", order, goal)
