"""The port to SQLite: the only module of the engine that knows apsw.

Everything here works on *plain* connections (the operating system's default VFS) of the same SQLite
library that the application uses through the replicating VFS.  Their POSIX locks share one
bookkeeping inside SQLite, so they are safe beside the application's connections.  They are never
allowed to checkpoint on close, because closing a plain connection as the last one would delete the
WAL with no callback in our VFS.

The errors that have to cross SQLite's own call stack live here too: what leaves a VFS callback must
be an ``apsw.IOError``, or SQLite does not roll the transaction back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

import apsw

from .errors import ReplicaError
from .format.types import WalSalts
from .format.walindex import COPIES_SIZE, IndexHeader, is_initialised, whole

__all__ = [
    "SQLITE_MIN_VERSION",
    "FencedError",
    "NotYetReplicated",
    "Observe",
    "Published",
    "ReadView",
    "RefusedError",
    "SpoolError",
    "SqlitePort",
    "connections_to",
    "descriptors_on",
    "is_asynchronous",
    "refuse_asynchronous",
    "require_sqlite",
    "strangers_on",
]

#: 3.51.3 fixed a corruption in the reset of the WAL, and 3.51 brought the NOOP checkpoint.
SQLITE_MIN_VERSION: Final = 3_051_003

# struct flock of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("hhqqi4x")
# The bytes that a reading connection holds a shared lock on (SQLite's os_unix.c).
_SHARED_FIRST: Final = 0x40000002
_SHARED_SIZE: Final = 510

# The header of the wal-index (SQLite's walformat.html), of which there are two copies: whether it
# is initialised, and the salts as they stand in the WAL's header.

# Bytes of the -shm file that whoever writes, and whoever checkpoints, has locked (walformat.html).
_INDEX_WRITE_LOCK: Final = 120
_INDEX_CHECKPOINT_LOCK: Final = 121

#: Attempts at the wal-index: a torn header or a busy recovery lock clears within microseconds.
_PROBE_ATTEMPTS: Final = 200
#: What goes by: somebody else had a lock or the connection, or closed it.
_PASSING: Final = (
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.ConnectionClosedError,
    apsw.LockedError,
    apsw.ThreadingViolationError,
)
#: Attempts at a read mark between two commits, before writers are kept out for it.
_QUIET_ATTEMPTS: Final = 10


class FencedError(ReplicaError, apsw.IOError):
    """Another writer owns the replica: this database refuses further commits."""


class NotYetReplicated(ReplicaError, apsw.IOError):
    """A wait for the replica ended first.  Everything committed is local and will be shipped.

    Attributes:
        txid: the TXID that was waited for, or None if none was given yet.
        replicated_txid: highest TXID known to be in the replica.
    """

    def __init__(self, message: str, *, txid: int | None, replicated_txid: int) -> None:
        super().__init__(message)
        self.txid = txid
        self.replicated_txid = replicated_txid


class SpoolError(ReplicaError, apsw.IOError):
    """The local spool beside the database cannot be written (disk full, I/O error)."""


class RefusedError(ReplicaError, apsw.IOError):
    """SQLite was asked for something that cannot be replicated; nothing was changed."""


class Published(NamedTuple):
    """What the wal-index says: frames committed and visible, and how many are in the main file."""

    mx_frame: int
    n_backfill: int


class Observe(Protocol):
    """Told where a read mark lies while it is taken."""

    def __call__(self, mx_frame: int, is_still: Callable[[], bool] | None) -> bool:
        """Note where the WAL ends.

        Args:
            mx_frame: frames of the WAL that belong to what the mark shows.
            is_still: tells whether that is still where the WAL ends; if not, the mark is worth
                nothing.  Whoever keeps the WAL from being restarted while asking can rely on the
                answer.  None while writers are kept out.

        Returns:
            Whether the mark can be used.
        """


def require_sqlite() -> None:
    """Refuse an SQLite library that is too old to be trusted with replication.

    Raises:
        RefusedError: naming both versions.
    """
    if apsw.SQLITE_VERSION_NUMBER < SQLITE_MIN_VERSION:
        raise RefusedError(
            f"SQLite {apsw.sqlite_lib_version()} cannot be replicated safely: 3.51.3 or newer is "
            "needed (pip install -U apsw)"
        )


def connections_to(path: str) -> int:
    """How many open connections of this library (any VFS) may have ``path`` as a database.

    One that cannot be asked counts: because another thread is using it, or because it is
    asynchronous and answers its own thread only.
    """
    count = 0
    for connection in apsw.connections():
        if is_asynchronous(connection):
            count += 1
            continue
        try:
            names = connection.db_names()
            count += sum(1 for name in names if connection.db_filename(name) == path)
        except apsw.ThreadingViolationError:
            count += 1
        except apsw.Error:
            continue  # closed meanwhile
    return count


def is_asynchronous(connection: apsw.Connection) -> bool:
    """Whether a connection is one of ``apsw.Connection.as_async``: what it returns is awaited."""
    return bool(getattr(connection, "is_async", False))


def refuse_asynchronous(connection: apsw.Connection, instead: str) -> None:
    """Refuse a connection that gives coroutines for answers.

    Raises:
        RefusedError: saying what to do instead.
    """
    if is_asynchronous(connection):
        raise RefusedError(f"an asynchronous connection cannot be used here: {instead}")


class _Kept:
    """Descriptors of walship's own on database files.  Thread-safe.

    Closing one drops SQLite's locks on the file in this process, so one that is done with while
    others are on the file is kept for whoever wants the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: set[int] = set()
        self._idle: set[int] = set()

    def open(self, path: str) -> int:
        """A descriptor for reading a file.

        Raises:
            OSError: as ``os.open``.
        """
        with self._lock:
            for fd in self._on(os.stat(path), self._idle):
                self._idle.discard(fd)
                return fd
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._all.add(fd)
            return fd

    def close(self, fd: int) -> None:
        """Done with it: close it, and what was kept beside it, now if that harms nobody."""
        with self._lock:
            self._idle.add(fd)
            status = os.fstat(fd)
            idle = self._on(status, self._idle)
            if status.st_nlink and descriptors_on(status) != len(idle):
                return
            for each in idle:
                self._idle.discard(each)
                self._all.discard(each)
                os.close(each)

    def count(self, file: os.stat_result) -> int:
        """How many are on a file, in use or not."""
        with self._lock:
            return len(self._on(file, self._all))

    def close_in_child(self) -> None:
        """In a forked child, which has no locks yet that this could drop: close all."""
        self._lock = threading.Lock()
        for fd in self._all:
            os.close(fd)
        self._all.clear()
        self._idle.clear()

    @staticmethod
    def _on(file: os.stat_result, descriptors: set[int]) -> list[int]:
        found = ((fd, os.fstat(fd)) for fd in descriptors)
        return [fd for fd, it in found if (it.st_dev, it.st_ino) == (file.st_dev, file.st_ino)]


#: Those of this process.
kept_descriptors: Final = _Kept()


def strangers_on(path: str) -> bool:
    """Whether another SQLite library (the ``sqlite3`` module) seems to have a file open here.

    That is: there are more descriptors on it than connections of this library and descriptors of
    walship's own.  False where the system does not tell.
    """
    status = os.stat(path)
    found = descriptors_on(status)
    return found is not None and found - kept_descriptors.count(status) > connections_to(path)


def descriptors_on(file: os.stat_result) -> int | None:
    """How many descriptors of this process are on a file; None where the system does not tell."""
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    try:
        numbers = [int(name) for name in os.listdir(directory)]
    except (OSError, ValueError):
        return None
    count = 0
    for number in numbers:
        try:
            status = os.fstat(number)
        except OSError:
            continue  # the one that listed the directory
        count += (status.st_dev, status.st_ino) == (file.st_dev, file.st_ino)
    return count


class ReadView:
    """A consistent state of the database, held by a read mark.  Use in the thread that made it.

    Attributes:
        mx_frame: frames of the current WAL that belong to the state.
        main_only: every page of the state is in the main file; a writer may restart the WAL
            meanwhile, so the WAL must not be read.
    """

    def __init__(
        self, connection: apsw.Connection, descriptor: int, mx_frame: int, main_only: bool
    ) -> None:
        self._connection = connection
        self._descriptor = descriptor
        self.mx_frame = mx_frame
        self.main_only = main_only

    def read_main(self, offset: int, length: int) -> bytes:
        """``length`` bytes of the main file at ``offset``; zeros stand in past its end."""
        return _read_main(self._descriptor, offset, length)

    def verify(self) -> None:
        """Make sure that the mark was held until now, before what was read is used.

        Raises:
            RefusedError: the application has closed the connection, or ended its transaction.
        """
        try:
            is_held = self._connection.in_transaction
        except (apsw.ConnectionClosedError, apsw.ThreadingViolationError):
            is_held = False
        if not is_held:
            raise RefusedError(
                "the application used or closed a connection of walship's own (apsw.connections() "
                "lists them too) while the database was copied"
            )


class SqlitePort:
    """Plain connections to one database, opened on first use.  Thread-safe where it says so.

    Args:
        path: absolute path of the main database file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Guards `_probe`, which any thread may use for the microseconds a NOOP takes.
        self._probe_lock = threading.Lock()
        self._probe: apsw.Connection | None = None
        # Whether it has the WAL open: from then on it has a lock on the main file all the time.
        self._probe_in_wal = False
        self._shut = False
        #: Why the wal-index could not be had last.
        self.trouble = ""
        # Held while a read view is open, so that the last close can let it end first.
        self._view_lock = threading.Lock()
        self._paused_view = False
        self._watch = -1  # descriptor on the main file, for asking about locks only
        self._index = -1  # descriptor on the wal-index
        # Every connection of ours that may be open, for a forked child to close.
        self._owned: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()

    def _open(self, flags: int = apsw.SQLITE_OPEN_READONLY) -> apsw.Connection:
        # The application's connection hooks run for ours too.  What they would write (`PRAGMA
        # optimize` does) would come past the gate, so they find a connection that cannot.
        try:
            connection = apsw.Connection(self.path, flags=flags, vfs=_default_vfs())
        except apsw.Error:
            raise
        except Exception as error:
            raise RefusedError(
                f"a hook in apsw.connection_hooks failed for a connection of walship's own, which "
                f"only reads: {error!r}"
            ) from error
        self._owned.add(connection)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(0)
        connection.wal_autocheckpoint(0)
        return connection

    @property
    def is_shut(self) -> bool:
        """Whether nothing may be opened: the last connection of the application is closing."""
        return self._shut

    def open(self) -> None:
        """Allow connections again after `close`."""
        with self._probe_lock:
            self._shut = False

    def published(self) -> Published | None:
        """What the wal-index says now; None without WAL mode, or if it cannot be had.

        Any thread, also from inside a VFS callback; takes no lock that SQLite waits for.  Recovers
        a hot WAL on the first call, so look at the files before that.  As every connection of ours
        comes after that call, whoever makes it does not meet the locks of a recovery of ours.
        """
        with self._probe_lock:
            if self._shut:
                return None
            try:
                self._open_descriptor()
                self.trouble = "it is in use, or not there"
                return self._ask_probe()
            except (apsw.Error, OSError) as error:
                self.trouble = str(error)
                return None

    def index_salts(self) -> WalSalts | None:
        """Salts of the WAL whose frames the wal-index counts; None if they cannot be had.

        While they are not those of the ``-wal`` file, SQLite is about to start that file over: it
        has reset the index, and everything in the file is in the main file.  Any thread.
        """
        header = self.index_header()
        return None if header is None else IndexHeader.parse(header).salts

    def index_header(self) -> bytes | None:
        """The header of the wal-index, which is another one after every commit; None without one.

        Costs two system calls.  Any thread.
        """
        with self._probe_lock:
            for _ in range(_PROBE_ATTEMPTS):
                try:
                    copies = os.pread(self._open_index(), COPIES_SIZE, 0)
                except OSError:
                    return None
                if not is_initialised(copies):
                    return None
                header = whole(copies)
                if header is not None:
                    return header
            return None

    def is_held_up(self) -> bool:
        """Whether another process keeps writers out while it checkpoints: with FULL, RESTART or
        TRUNCATE, perhaps waiting for a reader of ours.

        Two that each do one of the two things look the same.  Costs a system call or two; Linux
        only, False elsewhere.  Any thread.
        """
        with self._probe_lock:
            if not hasattr(fcntl, "F_OFD_GETLK"):
                return False
            for lock in (_INDEX_WRITE_LOCK, _INDEX_CHECKPOINT_LOCK):
                query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, lock, 1, 0)
                try:
                    answer = fcntl.fcntl(self._open_index(), fcntl.F_GETLK, query)
                except OSError:
                    return False
                if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK:
                    return False
            return True

    def begin_reading(self) -> apsw.Connection:
        """A connection of ours in a read transaction: it holds a read mark until it is closed.

        Raises:
            apsw.Error: somebody was in the way; try again.
        """
        connection = self._open()
        try:
            _begin_reading(connection)
        except BaseException:
            connection.close(True)
            raise
        return connection

    def _open_index(self) -> int:
        """Our descriptor on the ``-shm`` file.  Call with `_probe_lock` held.

        Closing one drops SQLite's locks on the file, so it is not closed while that has its name.
        """
        status = os.stat(self.path + "-shm")
        if self._index >= 0:
            mine = os.fstat(self._index)
            if (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino):
                return self._index
            index, self._index = self._index, -1
            kept_descriptors.close(index)
        self._index = kept_descriptors.open(self.path + "-shm")
        return self._index

    def read_main(self, offset: int, length: int) -> bytes:
        """Bytes of the main file as they are now, zeros past its end; any thread."""
        with self._probe_lock:
            return _read_main(self._open_descriptor(), offset, length)

    def _ask_probe(self) -> Published | None:
        """Ask through the probe, opened if need be.  Call with `_probe_lock` held.

        The application finds our connections in ``apsw.connections()``, and may close or use them.
        """
        for _ in range(_PROBE_ATTEMPTS):
            try:
                if self._probe is None:
                    self._probe, self._probe_in_wal = self._open(), False
                published = _ask(self._probe)
                self._probe_in_wal = self._probe_in_wal or published is not None
                return published
            except (apsw.ConnectionClosedError, apsw.ThreadingViolationError):
                self._probe = None  # another one is had sooner than its use ends
        raise apsw.BusyError("others use walship's connections all the time")

    def _open_descriptor(self) -> int:
        """Our descriptor on the main file.  Call with `_probe_lock` held.

        Reading through it leaves the GIL to others, which reading through SQLite does not.  It
        lives as long as the port: closing it would drop SQLite's locks, the very harm that it is
        there to notice (see `release`).
        """
        if self._watch < 0:
            self._watch = kept_descriptors.open(self.path)
        return self._watch

    def descriptor(self) -> int | None:
        """Our descriptor on the main file, once there is one: for syncing and asking about locks.

        It lives as long as the port.
        """
        return self._watch if self._watch >= 0 else None

    def has_lost_locks(self) -> bool:
        """Whether the kernel has forgotten the locks of this process on the database.

        Another SQLite library that opens and closes the file in this process does that: POSIX locks
        belong to the process, and closing any descriptor of the file drops them all.  Linux only;
        False elsewhere.
        """
        with self._probe_lock:
            if self._probe is None or self._watch < 0 or not hasattr(fcntl, "F_OFD_GETLK"):
                return False
            if not self._probe_in_wal:
                return False  # while the mode is changed, for one, nobody need hold any
            query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _SHARED_FIRST, _SHARED_SIZE, 0)
            answer = fcntl.fcntl(self._watch, fcntl.F_OFD_GETLK, query)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return False
            try:
                return isinstance(self._probe.in_transaction, bool)
            except apsw.ConnectionClosedError:
                return False  # by the application, and its lock is gone rightly

    def has_moved(self) -> bool:
        """Whether the database's file was deleted, renamed or replaced under us.

        Connections go on with the file that they have, and what they write is lost with it.
        """
        with self._probe_lock:
            if self._watch < 0:
                return False
            mine = os.fstat(self._watch)
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # who knows: the next look may
        return not os.path.samestat(mine, named)

    def pause_views(self, wait_s: float) -> None:
        """Keep other threads from opening read views until `resume`: the process is forking.

        A child would inherit SQLite's mutexes as they are, and hang on those held by threads that
        it does not have.

        Args:
            wait_s: how long to wait for a view to end.
        """
        self._paused_view = self._view_lock.acquire(timeout=wait_s)

    def pause_probe(self) -> None:
        """Keep other threads from asking the wal-index until `resume`, and close its connection."""
        self._probe_lock.acquire()
        if self._probe is not None:
            self._probe.close(True)
            self._probe = None

    def resume(self) -> None:
        """Go on after `pause_views` and `pause_probe`, in the parent."""
        self._probe_lock.release()
        if self._paused_view:
            self._view_lock.release()

    def close_in_child(self) -> None:
        """In a forked child: close what was inherited; none of it may checkpoint."""
        self._probe_lock, self._view_lock = threading.Lock(), threading.Lock()
        self._shut = True
        self._probe = None
        for connection in list(self._owned):
            connection.close(True)
        kept_descriptors.close_in_child()
        self._watch = self._index = -1

    @contextmanager
    def read_view(self, observe: Observe) -> Iterator[ReadView | None]:
        """Take a read mark; None if a writer or a checkpoint was in the way (try again later).

        Args:
            observe: called when the mark is taken, perhaps more than once; must be quick.
        """
        with self._view_lock:
            try:
                reader = self._open() if self.published() is not None else None
            except _PASSING:
                reader = None
            if reader is None:
                yield None
                return
            try:
                try:
                    view = self._mark(reader, observe)
                except apsw.Error as error:
                    raise ReplicaError(f"{self.path} cannot be read: {error}") from error
                yield view
            finally:
                reader.close(True)

    def _mark(self, reader: apsw.Connection, observe: Observe) -> ReadView | None:
        asker = self._open()
        try:
            if reader.pragma("journal_mode") != "wal":
                return None
            for _ in range(_QUIET_ATTEMPTS):
                view = self._mark_between_commits(reader, asker, observe)
                if view is not None:
                    return view
            return self._mark_without_writers(reader, asker, observe)
        except _PASSING:
            return None
        finally:
            asker.close(True)

    def _mark_between_commits(
        self, reader: apsw.Connection, asker: apsw.Connection, observe: Observe
    ) -> ReadView | None:
        """A mark does not say where it lies; but if nothing was committed meanwhile, we know."""
        before = self._end_of_wal(asker)
        if before is None:
            return None
        _begin_reading(reader)
        main_only = False

        def is_still() -> bool:
            nonlocal main_only
            now = self._end_of_wal(asker)
            if now is None or now[0] != before[0] or now[1].mx_frame != before[1].mx_frame:
                return False
            # If this became so after the mark was taken, the WAL is as good.
            main_only = now[1].n_backfill == now[1].mx_frame
            return True

        if observe(before[1].mx_frame, is_still):
            return ReadView(reader, self._watch, before[1].mx_frame, main_only)
        reader.execute("ROLLBACK")
        return None

    def _end_of_wal(self, asker: apsw.Connection) -> tuple[bytes, Published] | None:
        """Which WAL it is, by its header, and where it ends.

        The header comes first: that of a new WAL is written before anything in it is published.
        """
        try:
            with open(self.path + "-wal", "rb") as wal:
                header = wal.read(32)
        except FileNotFoundError:
            return None
        published = _ask(asker)
        return None if published is None else (header, published)

    def _mark_without_writers(
        self, reader: apsw.Connection, asker: apsw.Connection, observe: Observe
    ) -> ReadView | None:
        """The same beside writers that never pause: they are kept out, for microseconds.

        One without a busy timeout is told that the database is locked, so this comes last.
        """
        locker = self._open(apsw.SQLITE_OPEN_READWRITE)
        try:
            locker.execute("BEGIN IMMEDIATE")
            _begin_reading(reader)
            published = _ask(asker)
            usable = published is not None and observe(published.mx_frame, None)
            locker.execute("ROLLBACK")
            if published is None or not usable:
                return None
            main_only = published.n_backfill == published.mx_frame
            return ReadView(reader, self._watch, published.mx_frame, main_only)
        finally:
            locker.close(True)

    def close(self, wait_s: float = 0.0) -> None:
        """Close the connections; nothing is checkpointed.  Safe to call twice, any thread.

        Args:
            wait_s: how long to wait for a read view to end; it is left alone then.
        """
        self._shut = True
        if wait_s and self._view_lock.acquire(timeout=wait_s):
            self._view_lock.release()
        with self._probe_lock:
            self._shut = True
            if self._probe is not None:
                self._probe.close(True)
                self._probe = None

    def remove_empty_wal(self) -> None:
        """Have SQLite remove an empty ``-wal`` that connections of ours brought into being.

        Closes them: only the last one can.
        """
        self.close()
        try:
            with self._view_lock:
                if os.stat(self.path + "-wal").st_size:
                    return
                connection = apsw.Connection(
                    self.path, flags=apsw.SQLITE_OPEN_READWRITE, vfs=_default_vfs()
                )
                with contextlib.suppress(apsw.Error):
                    _read_once(connection)
                connection.close(True)
        except (OSError, apsw.Error):
            return  # it is gone, or somebody else's by now

    def release(self) -> None:
        """Close everything for good; what other connections still need is kept for the next."""
        self.close()
        for name in ("_watch", "_index"):
            fd: int = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                kept_descriptors.close(fd)


def _default_vfs() -> str:
    return "unix"


def _ask(connection: apsw.Connection) -> Published | None:
    """The wal-index by a NOOP checkpoint; None without WAL mode, or if it cannot be had."""
    for _ in range(_PROBE_ATTEMPTS):
        try:
            mx_frame, n_backfill = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
            if mx_frame >= 0:
                return Published(mx_frame, n_backfill)
            # Not opened yet, torn, or not in WAL mode: reading tells which.
            _read_once(connection)
            if connection.pragma("journal_mode") != "wal":
                return None
        except (apsw.BusyError, apsw.LockedError, apsw.ProtocolError):
            continue
        except (apsw.CantOpenError, apsw.NotADBError, apsw.IOError):
            return None
    return None


def _begin_reading(connection: apsw.Connection) -> None:
    connection.execute("BEGIN")
    _read_once(connection)


def _read_once(connection: apsw.Connection) -> None:
    """Make SQLite open the WAL: nothing is known of it before the first read."""
    connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()


def _read_main(descriptor: int, offset: int, length: int) -> bytes:
    return os.pread(descriptor, length, offset).ljust(length, b"\0")
