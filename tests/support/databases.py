"""Replicated databases for tests: open, write, restore, and compare byte for byte."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

import walship
from support.faulty import FaultyStore
from walship.replica.check import integrity_check
from walship.replica.clock import Clock, SystemClock
from walship.replica.engine import Engine
from walship.replica.format.ltx import Decoder
from walship.replica.restore import RestoreResult, restore
from walship.replica.store.base import ObjectStore
from walship.replica.store.local import LocalStore
from walship.replica.store.opening import open_store
from walship.replica.store.settings import LocalSettings, S3Settings
from walship.vfs.registry import canonical, registry

StoreSettings = LocalSettings | S3Settings

#: Longest wait of any test for the replica, seconds; nothing is measured with it.
WAIT_S = 30.0


class Database:
    """A database file with a directory replica.

    Args:
        directory: where both lie.
        name: of the database file.
        settings: keywords of every ``connect``.
    """

    def __init__(self, directory: Path, name: str = "app.db", **settings: Any) -> None:
        self.directory = directory
        self.path = directory / name
        self.replica = directory / f"{name}-replica"
        # Merging begins at a multiple of 30 s by the clock on the wall: only where it is wanted.
        quiet = {"levels": [], "snapshot_interval": 0}
        self.settings: dict[str, Any] = {"sync_interval": 0.0, **quiet, **settings}
        self._restored = 0

    def connect(self, **settings: Any) -> walship.Connection:
        """A connection through the VFS."""
        given = {**self.settings, **settings}
        page_size = given.pop("page_size", None)
        busy_timeout = given.pop("busy_timeout", None)
        interval = given.pop("sync_interval")
        replica = {"path": str(self.replica), "sync_interval": interval}
        return walship.connect(
            self.path, replica, page_size=page_size, busy_timeout=busy_timeout, **given
        )

    @contextlib.contextmanager
    def opened(self, **settings: Any) -> Iterator[walship.Connection]:
        """A connection that is closed at the end."""
        connection = self.connect(**settings)
        try:
            yield connection
        finally:
            connection.close(True)

    def engine(self) -> Engine:
        """The engine at work on the open database."""
        engine = registry.engine(canonical(self.path))
        assert engine is not None, "the database is not open"
        return engine

    def demand_full_copy(self) -> None:
        """Give up continuity, and the page map that would save a full copy."""
        capture = self.engine().capture
        with capture.mutex:
            capture.record.require_full_copy("the test wants one")
            (capture.record.scratch_path("").parent / "pages").unlink(missing_ok=True)

    def sync(self) -> int:
        """Wait until everything committed is in the replica."""
        return walship.replication(self.path).sync(WAIT_S)

    def store(self) -> LocalStore:
        """The replica, as a store."""
        return LocalStore(self.replica, SystemClock())

    def restore(self, **options: Any) -> Path:
        """Restore the newest state to a new file, checked by SQLite."""
        self._restored += 1
        target = self.directory / f"restored-{self.path.name}-{self._restored}"
        self.restore_to(target, **options)
        return target

    def restore_to(self, target: Path, **options: Any) -> RestoreResult:
        """Restore to ``target``, checked by SQLite."""
        return restore(self.store(), target, clock=SystemClock(), integrity_check="full", **options)

    def segments(self) -> dict[str, int]:
        """Names and sizes of the level-0 segments in the replica."""
        directory = self.replica / "ltx" / "0"
        if not directory.is_dir():
            return {}
        return {
            entry.name: entry.stat().st_size
            for entry in sorted(directory.iterdir())
            if entry.suffix == ".ltx"
        }

    def full_copies(self) -> list[str]:
        """Names of the level-0 segments that hold every page of the database."""
        return [name for name in self.segments() if self._is_full(name)]

    def _is_full(self, name: str) -> bool:
        with (self.replica / "ltx" / "0" / name).open("rb") as file:
            decoder = Decoder(file.read)
            header = decoder.header
            pages = sum(1 for _ in decoder)
        return pages >= header.commit - 1 and header.commit > 8

    def assert_replica_equals_file(self) -> None:
        """After the last close: the replica restores to the main file's very bytes."""
        assert not os.path.exists(f"{self.path}-wal"), "the database is still open"
        restored = self.restore()
        assert integrity_check(self.path, "full") == []
        assert_same_bytes(restored, self.path)
        restored.unlink()

    def assert_replica_equals_now(self) -> None:
        """While open: after a sync the replica restores to what SQLite reads."""
        self.sync()
        restored = self.restore()
        assert dump(restored) == dump(self.path)
        restored.unlink()


class Stores:
    """Puts a `FaultyStore` before every replica that is opened while this is in force.

    Attributes:
        threads: identifiers of the threads that sent requests.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[FaultyStore] = []
        self.threads: set[int] = set()
        self.blocked: Sequence[str] = ()
        self.before = 0.0
        self.after = 0.0
        monkeypatch.setattr("walship.replica.host.open_store", self._open)

    def _open(
        self, settings: StoreSettings, clock: Clock, sent: Callable[[str], None] | None = None
    ) -> FaultyStore:
        store = _Watched(open_store(settings, clock, sent), self)
        store.before, store.after = self.before, self.after
        if self.blocked:
            store.block(self.blocked)
        self.opened.append(store)
        return store

    @property
    def last(self) -> FaultyStore:
        """The store that was opened last."""
        return self.opened[-1]

    def block(self, operations: Sequence[str] = ("put", "get", "head", "list", "delete")) -> None:
        """No store answers these requests any more, those opened from now on included."""
        self.blocked = operations
        for store in self.opened:
            store.block(operations)

    def release(self) -> None:
        """All answer again."""
        self.blocked = ()
        for store in self.opened:
            store.release()

    def fail(self, before: float, after: float) -> None:
        """Requests fail by chance, before or after their effect."""
        self.before, self.after = before, after
        for store in self.opened:
            store.before, store.after = before, after


class _Watched(FaultyStore):
    """A faulty store that notes which threads use it."""

    def __init__(self, store: ObjectStore, stores: Stores) -> None:
        super().__init__(store, seed=len(stores.opened))
        self._stores = stores

    def _enter(self, operation: str) -> str:
        self._stores.threads.add(threading.get_ident())
        return super()._enter(operation)


def assert_same_bytes(found: Path, expected: Path) -> None:
    """Equal files; says which pages differ otherwise."""
    a, b = found.read_bytes(), expected.read_bytes()
    if a == b:
        return
    page_size = int.from_bytes(b[16:18], "big") or 512
    page_size = 65536 if page_size == 1 else page_size
    differing = [
        1 + offset // page_size
        for offset in range(0, max(len(a), len(b)), page_size)
        if a[offset : offset + page_size] != b[offset : offset + page_size]
    ]
    raise AssertionError(
        f"{found} has {len(a)} bytes and {expected} {len(b)}; pages that differ: {differing[:20]}"
    )


def dump(path: Path) -> list[tuple[Any, ...]]:
    """Everything in a database, through a plain connection that changes nothing on close."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(5000)
        with connection:  # one read transaction
            tables = connection.execute(
                "SELECT name, sql FROM sqlite_schema WHERE type = 'table' "
                "AND name NOT LIKE 'sqlite_%' ORDER BY name"
            ).fetchall()
            rows: list[tuple[Any, ...]] = [tuple(row) for row in tables]
            for name, _ in tables:
                content = connection.execute(f'SELECT rowid, * FROM "{name}" ORDER BY rowid')
                rows.extend((name, *row) for row in content)
        return rows
    finally:
        connection.close(True)
