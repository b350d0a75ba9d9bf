"""Memory: the application's peak with walship over its peak without."""

from __future__ import annotations

from typing import Any

from harness import PLAIN, WALSHIP, Row, Sample, Setting, at_most, interleave, measure, sample

_BOTH = (PLAIN, WALSHIP)


def run(setting: Setting) -> list[Row]:
    rows = []
    small = {"task": "commits", "seconds": setting.pick(3.0, 1.0)}
    rows += _rows(setting, small, "busy with single-row commits", 60)
    n_bytes = int(setting.pick(2000, 150)) * 1_000_000
    large = {"task": "transaction", "bytes": n_bytes}
    rows += _rows(setting, large, f"one transaction of {n_bytes // 1_000_000} MB", 100)
    return rows


def _rows(setting: Setting, job: dict[str, Any], how: str, limit: float) -> list[Row]:
    def once(name: str) -> dict[str, Any]:
        with setting.place() as place:
            return measure(setting, name, dict(job), place)

    rounds = 3 if job["task"] == "transaction" else setting.rounds  # half a minute each
    results = interleave(setting, _BOTH, once, min(rounds, setting.rounds))
    peaks: dict[str, Sample | None] = {
        name: sample(found, "peak_mb") for name, found in results.items()
    }
    plain, walship = peaks[PLAIN], peaks[WALSHIP]
    assert plain is not None
    assert walship is not None
    return [
        Row("memory", f"application's peak memory, MB, {how}", peaks),
        Row(
            "memory", f"the same over plain, MB, {how}", {WALSHIP: walship - plain}, at_most(limit)
        ),
    ]
