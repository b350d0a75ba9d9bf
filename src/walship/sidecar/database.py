"""One database that other programs write to with SQLite as it comes: watched, held and shipped.

The engine is the application's own one (`replica.engine`).  What the VFS does there is done from
outside here.  In place of the doorbell the wal-index is looked at, whose header changes with every
commit.  In place of the gate a read transaction keeps everybody from restarting the WAL (`hold`);
when it has grown long, it is restarted here, through the gate, while writers are kept out: a few
milliseconds, in which nothing can be committed that was not seen.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Final

import apsw

from walship.replica.config.settings import DatabaseSettings
from walship.replica.engine import Engine
from walship.replica.errors import ReplicaError
from walship.replica.format.walindex import IndexHeader
from walship.vfs.connection import connect, replication
from walship.vfs.registry import canonical, registry

from .hold import Hold

__all__ = ["Sidecar"]

log = logging.getLogger("walship.sidecar")

#: Attempts at a moment in which the whole WAL is in the main file and nobody writes.
_RESTARTS: Final = 5
#: Pause before the next one after that, seconds.
_RESTART_PAUSE_S: Final = 5.0
#: How long one waits for the write lock, seconds.
_LOCK_WAIT_S: Final = 1.0
#: Time between two renewals of what holds the WAL, seconds.
_HOLD_S: Final = 0.2
#: Pause after an unexpected error, seconds.
_TROUBLE_S: Final = 2.0
#: How long a single attempt at the last sync may take, and how often it is looked at, seconds.
_ATTEMPT_S: Final = 30.0
_LOOK_S: Final = 0.05


class Sidecar:
    """Ships one database from beside.  Not thread-safe; `close` it in the thread that made it.

    Args:
        settings: the database, with its replica; the file must exist.

    Raises:
        ReplicaError: it cannot be replicated; the message says what to do.
        apsw.Error: SQLite could not open it.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        path = canonical(settings.path)
        registry.configure(replace(settings, restore="never"))
        self._writer = _connect(path)
        try:
            # A connection cannot checkpoint in its own transaction.
            self._copier = _connect(path)
            self._engine = replication(self._writer).engine
            self._clock = self._engine.clock
            self._path = path
            self._pages = settings.min_checkpoint_page_count
            self._identity = _identity(path)
            self._hold = Hold(self._engine.port)
            self._gave_way = False
            self._seen: bytes | None = None
            self._next_hold = self._next_restart = 0.0
            # A transaction on a WAL that is in the main file already holds nothing: begin anew.
            self._hold.advance()
            self._restart_wal()
        except BaseException:
            self._writer.close(True)
            raise

    @property
    def engine(self) -> Engine:
        """What ships it."""
        return self._engine

    @property
    def fatal(self) -> ReplicaError | None:
        """Why it may not be shipped any more, or None: close this one."""
        return self._engine.uploader.fatal

    @property
    def is_replaced(self) -> bool:
        """Whether the path is another file by now, or none: close this one and begin again."""
        return _identity(self._path) != self._identity

    def poll(self) -> bool:
        """Look whether something was committed, and keep the WAL from growing; never raises.

        Costs a few microseconds while nothing happens.

        Returns:
            Whether something has happened since it was last false.
        """
        is_held_up = self._engine.port.is_held_up()
        if is_held_up:
            self._let_through()
        header = self._engine.port.index_header()
        if header == self._seen:
            return is_held_up
        self._engine.uploader.ring()
        now = self._clock.monotonic()
        if now < self._next_hold:
            return True  # and looked at again, because it was not noted
        self._next_hold = now + _HOLD_S
        try:
            self._advance()
            self._seen = header
            if header is not None and now >= self._next_restart:
                mx_frame = IndexHeader.parse(header).mx_frame
                if mx_frame >= self._pages and not self._restart_wal():
                    self._next_restart = now + _RESTART_PAUSE_S
        except apsw.BusyError:
            pass  # the next look tries again
        except (apsw.Error, ReplicaError) as error:
            self._engine.note_trouble(error)
            self._next_hold = now + _TROUBLE_S
        return True

    def _advance(self) -> None:
        """Have the hold where the WAL is now."""
        if self._gave_way:
            published = self._engine.port.published()
            if published is None or published.n_backfill == published.mx_frame:
                return  # nothing was written since, neither to this WAL nor to a new one
            self._engine.capture.hold_on()
            self._gave_way = False
        self._hold.advance()

    def _let_through(self) -> None:
        """Somebody waits with a checkpoint that restarts the WAL, and keeps writers out: what it
        waits for is that all is sealed, and that our mark goes on."""
        engine = self._engine
        if self._gave_way or not engine.uploader.leads:
            return
        try:
            engine.capture.drain()
            self._hold.advance()
            self._gave_way = self._hold.give_way(engine.capture.release)
        except apsw.BusyError:
            pass  # the next look tries again
        except (apsw.Error, ReplicaError) as error:
            engine.note_trouble(error)

    def sync(self, timeout: float | None) -> int:
        """As `walship.Replication.sync`."""
        return self._engine.sync(timeout)

    def drain(self, timeout: float) -> bool:
        """Ship what is there.

        Args:
            timeout: seconds; 0 for one attempt.

        Returns:
            False if something stayed.
        """
        self._engine.uploader.ring()
        if timeout > 0:
            return self._engine.drain(timeout)
        deadline = self._clock.monotonic() + _ATTEMPT_S
        while not self._engine.drain(_LOOK_S):
            failed = self._engine.uploader.progress.last_error is not None
            if failed or self._clock.monotonic() >= deadline:
                return False
        return True

    def close(self, timeout: float | None = None) -> None:
        """Let go of the database.

        Args:
            timeout: how long to wait for uploads at most, seconds; None: ``shutdown-sync-timeout``.
        """
        if timeout is not None:
            self._engine.close_within(timeout)
        if self._gave_way:
            try:
                self._engine.capture.hold_on()
            except ReplicaError as error:
                self._engine.note_trouble(error)
        self._hold.end()
        self._copier.close(True)
        self._writer.close(True)

    def _restart_wal(self) -> bool:
        """Have the WAL started over, through the gate; False if there was no moment for it.

        What is written for that changes nothing: SQLite then copies page 1 to a new WAL.
        """
        self._copy_wal()
        for _ in range(_RESTARTS):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                published = self._engine.port.published()
                if published is not None and published.n_backfill == published.mx_frame:
                    self._engine.capture.drain()
                    self._hold.renew()
                    version = self._writer.pragma("user_version")
                    self._writer.pragma("user_version", version)
                    self._writer.execute("COMMIT")
                    self._hold.advance()
                    return self._was_restarted(published.mx_frame)
                # Only who begins to write with all of it copied can restart it.
                self._hold.advance()
                self._copy_wal()
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
        return False

    def _copy_wal(self) -> None:
        """Copy into the main file what nobody's transaction is in the way of."""
        self._copier.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _was_restarted(self, before: int) -> bool:
        """Whether the WAL has fewer frames than before; somebody's read mark may prevent that."""
        now = self._engine.port.published()
        return now is not None and now.mx_frame <= max(1, before // 2)


def _connect(path: str) -> apsw.Connection:
    connection = connect(path, flags=apsw.SQLITE_OPEN_READWRITE, busy_timeout=_LOCK_WAIT_S)
    connection.wal_autocheckpoint(0)
    return connection


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
