"""Restore of a large replica: one segment of about 1 GB and 500 small ones.

Both restore the same replica, written by walship, from the same server; the floor is how long the
large object's bytes take by parallel ranged GETs when nothing is done with them, and how long the
disk takes for a copy of the restored file.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import time
from pathlib import Path
from typing import Any

from harness import (
    LITESTREAM,
    WALSHIP,
    BenchmarkError,
    Place,
    Row,
    Setting,
    Worker,
    at_most,
    environment,
    interleave,
    peak_memory,
    sample,
    settle,
)

from crash import restore_command

FLOOR = "parallel GETs"
COPY = "copy and fsync"


def run(setting: Setting) -> list[Row]:
    n_bytes = int(setting.pick(1450, 100)) * 1_000_000
    segments = int(setting.pick(500, 100))
    with setting.place() as place:
        build(setting, place, n_bytes, segments)
        sizes = place.endpoint.keys(place.bucket, "db/0000/")
        largest = max(sizes, key=lambda key: sizes[key])
        results = interleave(
            setting,
            [FLOOR, LITESTREAM, WALSHIP, COPY],
            lambda name: once(setting, place, name, largest, sizes[largest]),
        )
        how = (
            f"{n_bytes / 1e9:.2f} GB (one object of {sizes[largest] / 1e9:.2f} GB and "
            f"{len(sizes) - 1} small ones)"
        )
    seconds = {name: sample(found, "seconds") for name, found in results.items()}
    peaks = {name: sample(found, "peak_mb") for name, found in results.items()}
    del peaks[FLOOR], peaks[COPY]
    return [
        Row("restore", f"restore of {how}, s", seconds, at_most(5)),
        Row("restore", "peak memory of that restore, MB", peaks, at_most(200)),
    ]


def build(
    setting: Setting,
    place: Place,
    n_bytes: int,
    segments: int,
    *,
    rest_s: float = 0,
    **settings: object,
) -> None:
    """A replica of a database of so many bytes: the first copy, then small segments.

    Args:
        rest_s: how long the database stays open after the last commit, seconds.
        settings: of the database, in place of the defaults.
    """
    job = {
        "task": "build",
        "contestant": WALSHIP,
        "directory": str(place.directory),
        "path": str(place.database),
        "replica": place.replica(**{"sync-interval": "10ms"}),
        "bytes": n_bytes,
        "segments": segments,
        "settings": settings,
        "rest_s": rest_s,
    }
    with Worker(job, setting) as worker:
        worker.wait_ready()
        worker.go()
        worker.result()


def once(setting: Setting, place: Place, name: str, largest: str, size: int) -> dict[str, Any]:
    """One restore, by whoever is meant; what the contestants make is compared byte by byte.

    Args:
        name: LITESTREAM, WALSHIP, FLOOR (parallel GETs of ``largest``, thrown away) or COPY.
        largest, size: key and size of the largest object.
    """
    settle()
    if name == FLOOR:
        job = {
            "task": "fetch",
            "contestant": FLOOR,
            "directory": str(place.directory),
            "endpoint": place.endpoint.url,
            "bucket": place.bucket,
            "key": largest,
            "size": size,
        }
        with Worker(job, setting) as worker:
            worker.wait_ready()
            worker.go()
            return worker.result()
    output = place.directory / "restored.db"
    output.unlink(missing_ok=True)
    if name == COPY:
        return {"seconds": _copy(place.directory / "first.db", output)}
    found = peak_memory(restore_command(name, place.url(), output), environment(place.endpoint))
    reference = place.directory / "first.db"
    if not reference.exists():
        output.rename(reference)
    elif not filecmp.cmp(output, reference, shallow=False):
        raise BenchmarkError(f"{name} restored other bytes than the restore before")
    with contextlib.suppress(FileNotFoundError):
        output.unlink()
    return found


def _copy(source: Path, target: Path) -> float:
    """Seconds for a copy that has reached the disk."""
    started = time.monotonic()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds
