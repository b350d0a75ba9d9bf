"""Bulk load: a large transaction, then several smaller ones, until all is in the replica.

The end is seen from outside, for both alike: the newest segment in the store says in its header
that the database has as many pages as the application found at its end.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from harness import (
    CONTESTANTS,
    LITESTREAM,
    PLAIN,
    WALSHIP,
    BenchmarkError,
    Litestream,
    Place,
    Row,
    Setting,
    Worker,
    at_least,
    interleave,
    sample,
    settle,
)

from walship.replica.format.ltx import HEADER_SIZE, Header

_PATIENCE_S = 300.0


def run(setting: Setting) -> list[Row]:
    first = int(setting.pick(200, 40)) * 1_000_000
    others = [int(setting.pick(10, 2)) * 1_000_000] * 20
    results = interleave(setting, CONTESTANTS, lambda name: _once(setting, name, [first, *others]))
    mb = f"{first // 1_000_000} MB, then 20 of {others[0] // 1_000_000} MB"

    def row(what: str, key: str, goal: float | None = None) -> Row:
        return Row(
            "bulk",
            f"{what} ({mb})",
            {name: sample(found, key) for name, found in results.items()},
            at_least(goal) if goal is not None else None,
        )

    return [
        row("bulk load until in the replica, MB/s", "end_to_end", 110),
        row("the same until the last commit, MB/s", "committed"),
        row("seconds from the last commit until in the replica", "behind_s"),
        row("peak memory of the application, MB", "peak_mb"),
    ]


def _once(setting: Setting, name: str, transactions: list[int]) -> dict[str, Any]:
    with setting.place() as place, contextlib.ExitStack() as stack:
        job: dict[str, Any] = {
            "task": "bulk",
            "contestant": name,
            "directory": str(place.directory),
            "path": str(place.database),
            "transactions": transactions,
        }
        if name == WALSHIP:
            job["replica"] = place.replica()
        worker = stack.enter_context(Worker(job, setting))
        worker.wait_ready()
        if name == LITESTREAM:
            stack.enter_context(Litestream(place, {place.database: place.replica()}))
            place.wait_for_object()
            time.sleep(1.0)
        settle()
        worker.go()
        facts = worker.wait_ready()
        arrived = None
        if name == LITESTREAM:
            arrived = _wait_for_pages(place, facts["pages"])
        elif name == WALSHIP:
            # It knows itself; the store must agree.
            _wait_for_pages(place, facts["pages"])
            arrived = facts["synced"]
        worker.go()
        peak_mb = worker.result()["peak_mb"]
    n_mb = facts["pages"] * facts["page_size"] / 1e6
    return {
        "end_to_end": n_mb / (arrived - facts["started"]) if arrived else None,
        "behind_s": arrived - facts["committed"] if arrived else None,
        "committed": n_mb / (facts["committed"] - facts["started"]),
        "peak_mb": peak_mb if name in (PLAIN, WALSHIP) else None,
    }


def _wait_for_pages(place: Place, pages: int) -> float:
    """Wait until the newest segment says that the database has ``pages``; when that was."""
    deadline = time.monotonic() + _PATIENCE_S
    newest = ""
    with contextlib.closing(place.endpoint.client()) as client:
        while True:
            answer = client.list_objects_v2(
                Bucket=place.bucket, Prefix="db/0000/", StartAfter=newest or "db/0000/"
            )
            now = time.monotonic()
            keys = [item["Key"] for item in answer.get("Contents", ())]
            if keys:
                newest = keys[-1]
                got = client.get_object(
                    Bucket=place.bucket, Key=newest, Range=f"bytes=0-{HEADER_SIZE - 1}"
                )
                if Header.unpack(got["Body"].read()).commit >= pages:
                    return now
            elif now > deadline:
                raise BenchmarkError(f"the bulk load did not arrive within {_PATIENCE_S:g} s")
            time.sleep(0.02)
