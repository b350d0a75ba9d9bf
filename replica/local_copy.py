"""A database file that is taken from one state to the next while others read it.

It sits under `replica.follow`, which knows what the next state is.  SQLite has no call that writes
given pages as a transaction, so this appends them to the database's WAL itself, in SQLite's format:
readers with plain SQLite see each transaction whole or not at all.  Read transactions go on; one
that begins while the index is rebuilt, which takes as long as reading the log (a few MiB), waits if
it has a busy timeout.

How a transaction happens::

    BEGIN IMMEDIATE       SQLite's write lock, through SQLite
    frames                behind the last published one; nobody looks there
    commit frame, fsync   from here on a recovery of the log includes the transaction
    wal-index: header 0   the index is unreadable now ...
    COMMIT, read          ... so SQLite rebuilds it from the log, as after a crash: published

A crash before the commit frame leaves the old state, one behind it the new.  In between one or the
other comes back, depending on who reads next; both are states of the replica, and whoever goes on
must reach at least the new one in its next transaction (`replica.follow` keeps a note of it).

The file stays in WAL mode, whatever mode the original was in.  Nobody else may write to it: its end
of the log is compared before each transaction.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import apsw

from .errors import FormatError, RestoreError
from .files import write_all
from .format.checksum import wal_checksum
from .format.types import WalSalts
from .format.wal import WalHeader, frame_offset
from .format.walindex import COPIES_SIZE, IndexHeader, whole
from .sqlite import connections_to
from .store.local import fsync_file, sync_data

__all__ = ["FileMark", "LocalCopy", "LogEnd", "Transaction", "put_into_wal_mode"]

_FRAME_PREFIX: Final = struct.Struct(">2I")
_FRAME_REST: Final = struct.Struct(">4I")

#: Pages written at once.
_BATCH_PAGES: Final = 128
#: A log longer than this is copied into the database when nobody reads it.
_LOG_BYTES: Final = 4 << 20
#: Looks at the index until its two copies are the same.
_INDEX_ATTEMPTS: Final = 200
#: How long to wait for somebody's lock: nobody but us should hold one for long.
_BUSY_MS: Final = 5_000
#: Where page 1 tells the journal mode, for writing and for reading: 2 is WAL.
_MODE_OFFSET: Final = 18
_MODE_WAL: Final = b"\x02\x02"


class LogEnd(NamedTuple):
    """Where the published part of a WAL ends; equal ends are the same log.

    Attributes:
        n_frames: 0 if everything is in the database file.
        checksum: running checksum of the last frame, and 0 without one.
    """

    salts: WalSalts
    n_frames: int
    checksum: tuple[int, int]


class FileMark(NamedTuple):
    """By what a database file that nobody has open is known again: any change alters it."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileMark:
        return cls(status.st_size, status.st_mtime_ns)


def put_into_wal_mode(path: Path) -> None:
    """Make a database that nobody has open, and that has no journal, one in WAL mode; durable."""
    with _explained(path), open(path, "r+b", buffering=0) as file:
        file.seek(_MODE_OFFSET)
        if file.read(len(_MODE_WAL)) != _MODE_WAL:
            os.pwrite(file.fileno(), _MODE_WAL, _MODE_OFFSET)
            fsync_file(file.fileno())


class LocalCopy:
    """An open copy.  Use from one thread, and close it.

    Args:
        path: an existing database.

    Attributes:
        page_size: of the database, in bytes.

    Raises:
        RestoreError: it is not a database, or cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = self._index = self._main = -1
        with _explained(path):
            self._connection = apsw.Connection(
                str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix"
            )
        try:
            with _explained(path):
                self._connection.set_busy_timeout(_BUSY_MS)
                self._connection.wal_autocheckpoint(0)
                mode = self._connection.pragma("journal_mode", "wal")
                if mode != "wal":
                    raise RestoreError(f"{path} cannot be put into WAL mode: it says {mode}")
                self._read()
                self.page_size = int(self._connection.pragma("page_size"))
                self._log = os.open(f"{path}-wal", os.O_RDWR | os.O_CLOEXEC)
                self._index = os.open(f"{path}-shm", os.O_RDWR | os.O_CLOEXEC)
                self._main = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._release()
            raise

    def end(self) -> LogEnd:
        """Where the log ends now."""
        n_frames, checksum, salts, _ = self._header()
        return LogEnd(salts, n_frames, checksum if n_frames else (0, 0))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Hold the write lock for one transaction, which is dropped unless it is committed.

        Raises:
            RestoreError: somebody else holds the lock, or the file cannot be written.
        """
        with _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            made = Transaction(self)
            try:
                yield made
            finally:
                # Rolling back would restore SQLite's view from the index; there is nothing to undo.
                self._connection.execute("COMMIT")
            if made.is_committed:
                self._read()
                found = self.end()
                if found != made.end and found.n_frames:
                    raise RestoreError(
                        f"{self.path}: SQLite does not accept the transaction that was written"
                    )

    def is_main_complete(self) -> bool:
        """Try to copy the whole log into the file; whether the file alone holds the state now."""
        with _explained(self.path):
            n_frames, n_copied = self._connection.wal_checkpoint(
                mode=apsw.SQLITE_CHECKPOINT_PASSIVE
            )
            return n_frames == n_copied

    def trim(self, *, at_bytes: int = _LOG_BYTES) -> bool:
        """Empty the log if it is longer than this and nobody needs it; whether that was done."""
        if os.fstat(self._log).st_size < at_bytes:
            return False
        with _explained(self.path):
            self._connection.set_busy_timeout(0)
            try:
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except (apsw.BusyError, apsw.LockedError):
                return False  # readers; the next time perhaps
            finally:
                self._connection.set_busy_timeout(_BUSY_MS)
        return self.end().n_frames == 0

    def mark(self) -> FileMark | None:
        """What the file is known by while the log is empty, else None."""
        # A power cut must not bring back an older time than the one that is noted.
        fsync_file(self._main)
        return None if self.end().n_frames else FileMark.of(os.stat(self.path))

    def close(self) -> FileMark | None:
        """Copy the log into the file if nobody needs it, and close.

        Returns:
            What the file is known by from now on; None if the state is in the log in part.
        """
        mark = None
        try:
            self.trim(at_bytes=1)
            mark = self.mark()
        finally:
            self._release()
        return mark

    def read_page(self, pgno: int) -> bytes:
        """A page of the file, whatever the log holds; short or empty behind the file's end."""
        return os.pread(self._main, self.page_size, (pgno - 1) * self.page_size)

    def _read(self) -> None:
        """Have SQLite look at the log, and rebuild its index where that is unreadable."""
        self._connection.pragma("user_version")

    def _header(self) -> IndexHeader:
        """Of the wal-index."""
        for _ in range(_INDEX_ATTEMPTS):
            header = whole(os.pread(self._index, COPIES_SIZE, 0))
            if header is not None:
                return IndexHeader.parse(header)
            # Somebody is writing it, whose checkpoint empties the log.
        raise RestoreError(f"the index of the log of {self.path} stays torn: start again")

    def _release(self) -> None:
        if self._log >= 0:
            os.close(self._log)
        self._connection.close(True)
        # Closing a descriptor drops the locks that other connections of this process have on the
        # file; then it is left open.
        if not connections_to(str(self.path)):
            for fd in (self._index, self._main):
                if fd >= 0:
                    os.close(fd)
        self._log = self._index = self._main = -1


class Transaction:
    """Pages on their way into the log.  Made by `LocalCopy.transaction`.

    Attributes:
        is_committed: whether `commit` has returned.
        start: where the log ended before.
        end: where it ends behind what was added; the transaction's own once all is.
    """

    def __init__(self, copy: LocalCopy) -> None:
        self._copy = copy
        self.start = copy.end()
        self.is_committed = False
        n_frames, checksum, salts, big_endian = copy._header()
        if not n_frames:
            # Everything is in the file, so what the log still holds may go.
            fresh = WalSalts(secrets.randbits(32), secrets.randbits(32))
            header = WalHeader.make(copy.page_size, fresh)
            write_all(copy._log, [header.pack()], 0)
            checksum, salts, big_endian = header.checksum, header.salts, header.big_endian
        self._salts = salts
        self._checksum = checksum
        self._big_endian = big_endian
        self._n_frames = n_frames
        self._pending: tuple[int, bytes] | None = None
        self._pieces: list[bytes] = []

    @property
    def end(self) -> LogEnd:
        return LogEnd(self._salts, self._n_frames, self._checksum)

    @property
    def is_empty(self) -> bool:
        """Whether no page was added."""
        return self._pending is None

    def add(self, pgno: int, page: bytes) -> None:
        """Add a page; where one comes twice the later one counts."""
        if self._pending is not None:
            self._frame(*self._pending, 0)
        if pgno == 1:
            page = page[:_MODE_OFFSET] + _MODE_WAL + page[_MODE_OFFSET + len(_MODE_WAL) :]
        self._pending = (pgno, page)

    def prepare(self, commit: int) -> None:
        """Write all but the last page and decide where the log will end.

        Args:
            commit: size of the database in pages behind this transaction, at least 1.
        """
        if self._pending is None:
            raise FormatError("a transaction without pages")
        self._flush()
        self._frame(*self._pending, commit)

    def commit(self) -> None:
        """Write the last page and publish; durable when this returns.  `prepare` comes before."""
        copy = self._copy
        self._flush()
        sync_data(copy._log)
        os.pwrite(copy._index, bytes(COPIES_SIZE), 0)
        self.is_committed = True

    def _frame(self, pgno: int, page: bytes, commit: int) -> None:
        prefix = _FRAME_PREFIX.pack(pgno, commit)
        sums = wal_checksum(prefix, *self._checksum, self._big_endian)
        self._checksum = sums = wal_checksum(page, *sums, self._big_endian)
        self._pieces += (prefix + _FRAME_REST.pack(*self._salts, *sums), page)
        self._n_frames += 1
        if len(self._pieces) >= 2 * _BATCH_PAGES:
            self._flush()

    def _flush(self) -> None:
        first = self._n_frames - len(self._pieces) // 2 + 1
        write_all(self._copy._log, self._pieces, frame_offset(first, self._copy.page_size))
        self._pieces.clear()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the operating system say into one clear line."""
    try:
        yield
    except apsw.NotADBError as error:
        raise RestoreError(f"{path} is not a database: {error}") from error
    except (apsw.BusyError, apsw.LockedError) as error:
        raise RestoreError(
            f"{path} is locked by another program, which must not write to it: {error}"
        ) from error
    except apsw.Error as error:
        raise RestoreError(f"cannot write {path}: {error}") from error
    except OSError as error:
        raise RestoreError(f"cannot write {path}: {error.strerror or error}") from error
