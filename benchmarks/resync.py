"""Resync: other programs changed a large database, and the replica has to follow.

One case is a program that writes while the application is away, the other one that writes beside it
and checkpoints on its own account; both make a hundred row changes all over the database.  What was
uploaded is counted in the store, and at last the restored database is compared with the file.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    LITESTREAM,
    PLAIN,
    WALSHIP,
    BenchmarkError,
    Litestream,
    Place,
    Row,
    Setting,
    Worker,
    at_most,
    interleave,
    sample,
    settle,
)

from crash import restore

CHANGES = 100
#: How long any of them may take to upload the whole database, seconds.
_PATIENCE_S = 600.0


def run(setting: Setting) -> list[Row]:
    n_bytes = int(setting.pick(1_000_000_000, 50_000_000))
    rows = []
    for closed, who in ((True, (LITESTREAM, WALSHIP)), (False, (WALSHIP,))):
        results = interleave(setting, who, partial(_once, setting, n_bytes, closed))
        where = "while nobody replicates" if closed else "beside, with a checkpoint"
        what = f"{CHANGES} foreign row changes in {n_bytes / 1e9:g} GB, {where}"
        seconds = {name: sample(found, "seconds") for name, found in results.items()}
        sent = {name: sample(found, "sent_mb") for name, found in results.items()}
        rows += [
            Row("resync", f"s until the replica has them: {what}", seconds, at_most(3)),
            Row("resync", f"MB uploaded for them, {where}", sent, at_most(1)),
        ]
    return rows


def _once(setting: Setting, n_bytes: int, closed: bool, name: str) -> dict[str, Any]:
    with setting.place() as place:
        job: dict[str, Any] = {
            "task": "resync",
            "contestant": name,
            "directory": str(place.directory),
            "path": str(place.database),
            "bytes": n_bytes,
            "closed": closed,
        }
        if name == LITESTREAM:
            return _litestream(setting, place, job)
        job["replica"] = place.replica()
        with Worker(job, setting) as worker:
            worker.wait_ready()
            _change(setting, place)
            settle()
            before = place.endpoint.keys(place.bucket, "db/")
            worker.go()
            found = worker.result()
        found["sent_mb"] = sum(_new(place, before).values()) / 1e6
        _compare(place, name)
        return found


def _litestream(setting: Setting, place: Place, job: dict[str, Any]) -> dict[str, Any]:
    with Worker({**job, "closed": True}, setting) as worker:  # makes the database
        worker.wait_ready()
        worker.go()
        worker.result()
    with Litestream(place, {place.database: place.replica()}) as litestream:
        place.wait_for_object(timeout_s=_PATIENCE_S)
        litestream.stop()
    _change(setting, place)
    settle()
    before = place.endpoint.keys(place.bucket, "db/")
    started = time.monotonic()
    with Litestream(place, {place.database: place.replica()}) as litestream:
        while not any("/0000/" in key for key in _new(place, before)):
            if time.monotonic() > started + _PATIENCE_S:
                raise BenchmarkError("Litestream does not notice the changes")
            time.sleep(0.05)
        seconds = time.monotonic() - started
        litestream.stop()
    found = {"seconds": seconds, "sent_mb": sum(_new(place, before).values()) / 1e6}
    _compare(place, LITESTREAM)
    return found


def _change(setting: Setting, place: Place) -> None:
    """Let another program change rows."""
    job = {
        "task": "foreign",
        "contestant": PLAIN,
        "directory": str(place.directory),
        "path": str(place.database),
        "changes": CHANGES,
        "seed": len(place.bucket),
    }
    with Worker(job, setting) as worker:
        worker.wait_ready()
        worker.go()
        worker.result()


def _new(place: Place, before: dict[str, int]) -> dict[str, int]:
    """Segments that were not there before, with their sizes."""
    after = place.endpoint.keys(place.bucket, "db/")
    return {key: size for key, size in after.items() if key not in before and key.endswith(".ltx")}


def _compare(place: Place, name: str) -> None:
    """The restored database must be the file, byte for byte."""
    output = place.directory / "restored.db"
    fault = restore(place, name, output)
    if fault is not None:
        raise BenchmarkError(f"{name}: {fault}")
    if not _same(output, place.database):
        raise BenchmarkError(f"{name}: the replica is not what the database is")


def _same(one: Path, other: Path) -> bool:
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(path.open("rb")) for path in (one, other))
        while data := a.read(1 << 20):
            if data != b.read(1 << 20):
                return False
        return not b.read(1)
