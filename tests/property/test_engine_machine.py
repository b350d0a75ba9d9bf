"""A database under everything that can happen to it, against SQLite's own content as the model.

Hypothesis chooses the order of writes, checkpoints, reopening, kills and outages.  A kill is played
by a copy: the files are copied, in an order that a running process could have left them in, while
nothing writes, and the copy is opened as the database of the next life.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from pathlib import Path

import apsw
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import walship
from support.databases import Database, Stores, dump
from walship.replica.check import integrity_check

_MODES = ("NOOP", "PASSIVE", "FULL", "RESTART", "TRUNCATE")


class Machine(RuleBasedStateMachine):
    """One database, up to two connections, one replica."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="walship-machine-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("walship.replica.uploader._JOIN_S", 0.02)
        self.stores = Stores(self.patch)
        self.connections: list[walship.Connection] = []
        self.outage = False
        self.reading = False

    @initialize(
        page_size=st.sampled_from((512, 1024, 4096, 65536)),
        interval=st.sampled_from((0.0, 3600.0)),
        limit=st.sampled_from(("8KB", "64MB")),
    )
    def begin(self, page_size: int, interval: float, limit: str) -> None:
        self.database = Database(
            self.directory,
            page_size=page_size,
            sync_interval=interval,
            max_sync_wal_bytes=limit,
            shutdown_sync_timeout="0.05s",
            open_timeout="0.05s",  # with puts held up, the lease cannot be taken
        )
        self.connections = [self.database.connect()]
        self.writer.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)")
        self.writer.execute("CREATE INDEX i ON t (b)")

    @property
    def writer(self) -> walship.Connection:
        return self.connections[0]

    @rule(first=st.integers(0, 30), count=st.integers(1, 12), size=st.integers(0, 4000))
    def write(self, first: int, count: int, size: int) -> None:
        with self.writer:
            for n in range(first, first + count):
                self.writer.execute("REPLACE INTO t VALUES (?, randomblob(?))", (n, size))

    @rule(first=st.integers(0, 30), count=st.integers(1, 30))
    def delete(self, first: int, count: int) -> None:
        self.writer.execute("DELETE FROM t WHERE id BETWEEN ? AND ?", (first, first + count))

    @rule(size=st.integers(100, 2000))
    def spill_and_roll_back(self, size: int) -> None:
        self.writer.execute("PRAGMA cache_size = 5")
        self.writer.execute("BEGIN")
        for n in range(40):
            self.writer.execute("REPLACE INTO t VALUES (?, randomblob(?))", (n, size))
        self.writer.execute("ROLLBACK")
        self.writer.execute("PRAGMA cache_size = -2000")

    @rule(mode=st.sampled_from(_MODES))
    def checkpoint(self, mode: str) -> None:
        self.writer.set_busy_timeout(0)  # a read mark held here would be waited for in vain
        self.writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        self.writer.set_busy_timeout(5000)

    @precondition(lambda self: not self.reading)
    @rule()
    def vacuum(self) -> None:
        with contextlib.suppress(apsw.BusyError):  # a first copy may hold its mark
            self.writer.execute("VACUUM")

    @precondition(lambda self: len(self.connections) == 1)
    @rule()
    def open_another(self) -> None:
        self.connections.append(self.database.connect())

    @precondition(lambda self: len(self.connections) == 2 and not self.reading)
    @rule()
    def hold_a_read_mark(self) -> None:
        self.connections[1].execute("BEGIN")
        self.connections[1].execute("SELECT count(*) FROM t").fetchall()
        self.reading = True

    @precondition(lambda self: self.reading)
    @rule()
    def drop_the_read_mark(self) -> None:
        self.connections[1].execute("COMMIT")
        self.reading = False

    @precondition(lambda self: len(self.connections) == 2)
    @rule()
    def close_another(self) -> None:
        self.connections.pop().close(True)
        self.reading = False

    @rule()
    def reopen(self) -> None:
        self.close_all()
        self.connections = [self.database.connect()]

    @rule()
    def be_killed(self) -> None:
        """Copy the files as they are, end without another request, and open the copy instead."""
        saved = self.directory / "saved"
        saved.mkdir()
        files = [self.database.path, Path(f"{self.database.path}-wal")]
        state = self.directory / ".app.db-walship"
        with self.database.engine().capture.mutex:
            # What is in flight may still arrive: its bytes are in the spool that is copied.
            self.stores.fail(before=1.0, after=0.0)
            for file in files:
                if file.exists():
                    shutil.copy2(file, saved)
            shutil.copytree(
                state, saved / "state", ignore=shutil.ignore_patterns("*.fifo", "*.tmp")
            )
        self.close_all()
        self.stores.fail(before=0.0, after=0.0)
        for file in (*files, Path(f"{self.database.path}-shm")):
            if (saved / file.name).exists():
                file.write_bytes((saved / file.name).read_bytes())
            else:
                file.unlink(missing_ok=True)
        _remove(state)
        (saved / "state").rename(state)
        shutil.rmtree(saved)
        self.connections = [self.database.connect()]

    @precondition(lambda self: not self.outage)
    @rule()
    def begin_outage(self) -> None:
        self.stores.block(("put",))
        self.outage = True

    @precondition(lambda self: self.outage)
    @rule()
    def end_outage(self) -> None:
        self.stores.release()
        self.outage = False

    @precondition(lambda self: not self.outage)
    @rule()
    def sync_and_restore(self) -> None:
        self.database.assert_replica_equals_now()

    @invariant()
    def replica_is_whole(self) -> None:
        if not self.database.segments():
            return
        restored = self.database.restore()
        assert integrity_check(restored, "full") == []
        restored.unlink()

    def close_all(self) -> None:
        while self.connections:
            self.connections.pop().close(True)
        self.reading = False

    def teardown(self) -> None:
        try:
            self.stores.release()
            if self.connections:
                self.database.sync()
                expected = dump(self.database.path)
                self.close_all()
                self.database.assert_replica_equals_file()
                assert dump(self.database.restore()) == expected
        finally:
            self.close_all()
            self.patch.undo()
            shutil.rmtree(self.directory, ignore_errors=True)


def _remove(state: Path) -> None:
    """Remove a state directory; threads of the life that ended may still be at it."""
    for thread in threading.enumerate():
        if thread.name == "walship:app.db":
            thread.join(10)
    for _ in range(500):
        with contextlib.suppress(OSError):
            shutil.rmtree(state)
            return
        threading.Event().wait(0.01)
    shutil.rmtree(state)


_CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=12, stateful_step_count=20, suppress_health_check=_CHECKS
)


class DeepMachine(Machine):
    """The same, deeper."""


TestDeepMachine = pytest.mark.slow(DeepMachine.TestCase)
TestDeepMachine.settings = settings(
    max_examples=60, stateful_step_count=40, suppress_health_check=_CHECKS
)
