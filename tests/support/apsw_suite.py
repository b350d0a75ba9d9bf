"""APSW's own test-suite with walship's VFS as the default one; run as a program of its own.

    python apsw_suite.py DIRECTORY (replicated | unconfigured)

Every database file that the suite opens through the default VFS is in WAL mode from its first page
on and gets a directory replica of its own; when it is closed for the last time in the process the
replica is restored and compared with it, byte for byte.  ``DIRECTORY/report.json`` says how all
went.

The suite works in ``DIRECTORY/work``, shuts SQLite down in between, and replaces hooks and modules
of the process as it likes: no other test could live beside it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import unittest
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.runner import _WritelnDecorator

import apsw

from walship.replica.clock import SystemClock
from walship.replica.config.sources import database_settings
from walship.replica.engine import Engine
from walship.replica.restore import restore
from walship.replica.store.local import LocalStore
from walship.vfs import replicating
from walship.vfs.registry import VFS_NAME, registry

#: How long the suite's tests of threads go on, seconds; they take half a minute each without it.
_HEAVY_S = 1


class Everything(replicating.ReplicatingVFS):
    """Gives each database a replica when it is opened.

    Attributes:
        verdicts: what came out of comparing a database with its replica, and how often.
        wrong: the databases that differ from their replicas.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._count = 0
        self.verdicts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        if name is not None and flags[0] & apsw.SQLITE_OPEN_MAIN_DB:
            path = name.filename() if isinstance(name, apsw.URIFilename) else name
            if registry.engine(path) is None:
                self._give_replica(path, bool(flags[0] & apsw.SQLITE_OPEN_CREATE))
        return super().xOpen(name, flags)

    def _give_replica(self, path: str, creates: bool) -> None:
        is_empty = not os.path.exists(path) or not os.path.getsize(path)
        if is_empty and creates and os.path.isdir(os.path.dirname(path)):
            connection = apsw.Connection(path, vfs="unix")
            connection.pragma("journal_mode", "wal")
            connection.close()
        # A file of the same name that is made anew is another database.
        self._count += 1
        place = self._directory / "replicas" / str(self._count)
        registry.configure(
            database_settings(
                path,
                {"path": str(place), "sync_interval": 0.0},
                restore="never",
                meta_path=str(self._directory / "state" / str(self._count)),
            )
        )

    def compare(self, engine: Engine) -> None:
        """Compare a database that was closed with its replica; nobody can open it meanwhile."""
        try:
            verdict = self._compare(engine)
        except Exception as error:  # SQLite would pass over it, in the middle of a close
            verdict = repr(error)
        self.verdicts[verdict] += 1
        if verdict not in ("equal", "gone", "not in WAL mode"):
            self.wrong.append(f"{engine.path} in {_Result.current}: {verdict}")

    def _compare(self, engine: Engine) -> str:
        found = Path(engine.path)
        if not found.exists():
            return "gone"
        if found.read_bytes()[18:20] != b"\2\2":
            return "not in WAL mode"
        copy = self._directory / "copy"
        shutil.copy(found, copy)
        wal = Path(f"{found}-wal")
        if wal.exists():  # the suite interrupts a connection, whose close then leaves it
            shutil.copy(wal, f"{copy}-wal")
            connection = apsw.Connection(str(copy), vfs="unix")
            connection.execute("SELECT * FROM sqlite_schema").fetchall()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            connection.close()
        replica = engine.settings.replica
        assert replica is not None
        store = LocalStore(Path(replica.store.path), SystemClock())  # type: ignore[union-attr]
        restored = self._directory / "restored"
        restore(store, restored, clock=SystemClock(), integrity_check="none", overwrite=True)
        return "equal" if restored.read_bytes() == copy.read_bytes() else "different"


class _Result(unittest.TextTestResult):
    """Outcomes by ``Class.test``; the worst one counts."""

    current = ""

    def __init__(self) -> None:
        # Some tests of the suite write to it as to what prints.
        super().__init__(_WritelnDecorator(io.StringIO()), descriptions=False, verbosity=0)
        self.outcomes: dict[str, str] = {}
        self.details: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        apsw.set_default_vfs(VFS_NAME)  # a test that shuts SQLite down has forgotten it
        _Result.current = ".".join(test.id().split(".")[-2:])
        self.outcomes[_Result.current] = "passed"

    def _fail(self, error: Any, test: unittest.TestCase) -> None:
        self.outcomes[_Result.current] = "failed"
        text = self._exc_info_to_string(error, test)  # type: ignore[attr-defined]
        self.details[_Result.current] = self.details.get(_Result.current, "") + text

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._fail(err, test)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self._fail(err, test)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._fail(err, test)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.outcomes[_Result.current] = f"skipped: {reason}"


def _hide_own_connections() -> None:
    """The suite takes every connection of the process for its own; walship's are plain ones."""
    connections = apsw.connections

    def others() -> list[apsw.Connection]:
        return [c for c in connections() if c.open_vfs != "unix"]

    apsw.connections = others


def main(directory: Path, mode: str) -> None:
    work = directory / "work"
    work.mkdir(parents=True)
    os.chdir(work)
    os.environ["APSW_HEAVY_DURATION"] = str(_HEAVY_S)
    everything: Everything | None = None
    if mode == "replicated":
        everything = Everything(directory)
        replicating._installed = everything
        close = Engine.close

        def close_and_compare(engine: Engine, drained: bool) -> None:
            close(engine, drained)
            everything.compare(engine)

        Engine.close = close_and_compare  # type: ignore[method-assign]
        _hide_own_connections()
    else:
        replicating.install()
    apsw.set_default_vfs(VFS_NAME)

    from apsw.tests import __main__ as suite

    suite.setup()
    result = _Result()
    unittest.defaultTestLoader.loadTestsFromModule(suite).run(result)
    report = {
        "outcomes": result.outcomes,
        "details": result.details,
        "verdicts": everything.verdicts if everything else {},
        "wrong": everything.wrong if everything else [],
    }
    (directory / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
