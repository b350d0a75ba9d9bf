"""A copy that is an hour old is brought up to date: 1% of its pages differ.

`walship restore -delta` fetches what was uploaded since and is measured against a full restore of
the same state.  40 segments are about what compaction has left of an hour: eleven of five minutes,
nine of half a minute, and those of the last moments.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
from pathlib import Path
from typing import Any

from harness import (
    WALSHIP,
    BenchmarkError,
    Place,
    Row,
    Setting,
    Worker,
    at_least,
    environment,
    interleave,
    peak_memory,
    sample,
    settle,
)

from crash import restore_command

FULL = "full restore"
SEGMENTS = 40
_ROW_BYTES = 3400


def run(setting: Setting) -> list[Row]:
    n_bytes = int(setting.pick(1450, 100)) * 1_000_000
    changes = n_bytes // _ROW_BYTES // 100 // SEGMENTS
    with setting.place() as place:
        _build(setting, place, n_bytes, changes)
        first = place.directory / "first.db"
        _bring(place, first, "-txid", f"{1:016x}")
        results = interleave(
            setting, [FULL, WALSHIP], lambda name: _once(setting, place, name, first)
        )
    what = f"1% of {n_bytes / 1e9:.2f} GB in {SEGMENTS} segments"
    seconds = {name: sample(found, "seconds") for name, found in results.items()}
    full, delta = seconds[FULL], seconds[WALSHIP]
    times = full / delta if full is not None and delta is not None else None
    peaks = {name: sample(found, "peak_mb") for name, found in results.items()}
    return [
        Row("delta", f"update of a copy by {what}, s", seconds),
        Row("delta", "peak memory of that, MB", peaks),
        Row(
            "delta",
            "how many times as fast as the full restore",
            {WALSHIP: times},
            at_least(10),
        ),
    ]


def _build(setting: Setting, place: Place, n_bytes: int, changes: int) -> None:
    job = {
        "task": "build",
        "contestant": WALSHIP,
        "directory": str(place.directory),
        "path": str(place.database),
        "replica": place.replica(**{"sync-interval": "10ms"}),
        "bytes": n_bytes,
        "segments": SEGMENTS,
        "changes": changes,
    }
    with Worker(job, setting) as worker:
        worker.wait_ready()
        worker.go()
        worker.result()


def _once(setting: Setting, place: Place, name: str, first: Path) -> dict[str, Any]:
    output = place.directory / ("full.db" if name == FULL else "copy.db")
    note = place.directory / "copy.db-txid"
    if name == FULL:
        output.unlink(missing_ok=True)
        settle()
        command = restore_command(WALSHIP, place.url(), output)
        return peak_memory(command, environment(place.endpoint))
    shutil.copy2(first, output)
    shutil.copy2(f"{first}-txid", note)
    settle()
    found = peak_memory(_delta(place, output), environment(place.endpoint))
    full = place.directory / "full.db"
    if full.exists() and not filecmp.cmp(output, full, shallow=False):
        raise BenchmarkError("the copy is not what a full restore makes")
    return found


def _bring(place: Place, output: Path, *options: str) -> None:
    done = subprocess.run(
        _delta(place, output, *options),
        env=environment(place.endpoint),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BenchmarkError(f"no first copy: {done.stderr[-800:]}")


def _delta(place: Place, output: Path, *options: str) -> list[str]:
    return [*restore_command(WALSHIP, place.url(), output), "-delta", *options]
