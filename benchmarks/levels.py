"""Levels: what merging and snapshots cost, and whether the application feels them.

A process commits at a steady rate, first beside an engine that only ships, then beside one that
merges into level 1 every second and makes one snapshot of the whole database after the other.
"""

from __future__ import annotations

from typing import Any

from harness import WALSHIP, Row, Sample, Setting, at_least, at_most, interleave, measure, sample

_RATE = 500  # commits a second


def run(setting: Setting) -> list[Row]:
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
