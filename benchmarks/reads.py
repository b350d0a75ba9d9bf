"""Reads: point reads by rowid in four situations, and a scan.

Beside plain, Litestream and walship runs a VFS that does nothing but forward, to show what is due
to a VFS in Python at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import apsw
from harness import (
    CONTESTANTS,
    Row,
    Setting,
    against,
    at_least,
    interleave,
    measure,
    sample,
)
from worker import filler, load

PASS_THROUGH = "pass-through VFS"
KINDS = (
    ("own", "point reads, each its own transaction", 0.85),
    ("one", "point reads inside one transaction", 0.97),
    ("small_cache", "point reads inside one transaction, 2 MB cache", 0.80),
    ("scan", "full scan with a cold cache", 0.85),
)


def run(setting: Setting) -> list[Row]:
    rows = int(setting.pick(120_000, 40_000))
    original = setting.directory / "reads.db"
    make_database(original, rows)
    results = interleave(
        setting,
        [*CONTESTANTS, PASS_THROUGH],
        lambda name: _once(setting, name, original, rows),
        2 * setting.rounds,  # short ones, and more of them
    )
    original.unlink()
    found = []
    for key, what, limit in KINDS:
        samples = {name: sample(result, key) for name, result in results.items()}
        found.append(Row("reads", f"{what}, per s", samples))
        found.append(Row("reads", f"{what}, against plain", against(samples), at_least(limit)))
    return found


def make_database(path: Path, rows: int) -> None:
    """``rows`` rows of about 500 bytes."""
    path.unlink(missing_ok=True)
    db = apsw.Connection(str(path))
    db.pragma("journal_mode", "wal")
    db.execute("create table t(id integer primary key, b blob)")
    load(db, filler(480), rows * 500, 500)
    db.close()


def _once(setting: Setting, name: str, original: Path, rows: int) -> dict[str, Any]:
    job = {"task": "reads", "seconds": setting.pick(0.4, 0.2), "rows": rows}
    with setting.place() as place:
        shutil.copyfile(original, place.database)
        return measure(setting, name, job, place)
