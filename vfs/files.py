"""The two file shims: check, notify, forward.  The only place that speaks SQLite's file controls.

`MainFile` is the doorbell (a committed transaction rings) and notices checkpoints and the last
close; `WalFile` is the gate (a WAL about to be destroyed is drained first) and refuses commits that
must not happen.  What is not overridden here runs in C.

Rules that both keep, learnt from SQLite the hard way:

* Whatever leaves a callback is an ``apsw.IOError``, or SQLite would not roll the transaction back:
  after any other exception out of a cache spill it goes on and commits a malformed database.
* The bell neither raises nor blocks.
* A refusal comes at the commit frame, before anything is published.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import apsw

from walship.replica.counts import CheckpointMode
from walship.replica.engine import Engine
from walship.replica.sqlite import RefusedError

from .commits import collecting

__all__ = ["Interrupted", "MainFile", "WalFile", "latest_main_file"]

_COMMIT_PHASETWO: Final = apsw.SQLITE_FCNTL_COMMIT_PHASETWO
_CKPT_START: Final = apsw.SQLITE_FCNTL_CKPT_START
_CKPT_DONE: Final = apsw.SQLITE_FCNTL_CKPT_DONE
_HAS_MOVED: Final = apsw.SQLITE_FCNTL_HAS_MOVED
_PRAGMA: Final = apsw.SQLITE_FCNTL_PRAGMA
_LOCK_TIMEOUT: Final = apsw.SQLITE_FCNTL_LOCK_TIMEOUT
_NOTICED: Final = frozenset({_CKPT_START, _CKPT_DONE, _HAS_MOVED, _PRAGMA})
_LOCK_SHARED: Final = apsw.SQLITE_LOCK_SHARED
_LOCK_RESERVED: Final = apsw.SQLITE_LOCK_RESERVED
_LOCK_EXCLUSIVE: Final = apsw.SQLITE_LOCK_EXCLUSIVE

_FRAME_HEADER_SIZE: Final = 24
#: Pragmas of which a replicated database takes one value only, and why.
_ALLOWED_VALUES: Final = {
    "journal_mode": ("wal", "only the WAL can be"),
    "locking_mode": ("normal", "an exclusive lock would keep the uploader out"),
}
_NO_COMMIT: Final = b"\0\0\0\0"
#: Bytes 18 and 19 of page 1 in WAL mode: file format versions for writing and reading.
_WAL_MODE: Final = b"\2\2"

# Calling C's method through the class costs less than super() in the hot path.
_write = apsw.VFSFile.xWrite
_sync = apsw.VFSFile.xSync
_truncate = apsw.VFSFile.xTruncate
_file_control = apsw.VFSFile.xFileControl
_lock = apsw.VFSFile.xLock
_unlock = apsw.VFSFile.xUnlock
_close = apsw.VFSFile.xClose

sync_descriptor = Engine.sync_descriptor
sync_directory_of = Engine.sync_directory_of


# The main file that was locked last in this thread: SQLite opens the -wal right after that, and
# says only its name.
_latest = threading.local()


def latest_main_file(path: str) -> MainFile | None:
    """The main file of the connection that is opening its ``-wal`` in this thread."""
    main: MainFile | None = getattr(_latest, "main", None)
    return main if main is not None and main.path == path else None


class Interrupted(apsw.IOError, KeyboardInterrupt):
    """Ctrl-C inside a VFS callback: an I/O error to SQLite, an interrupt to the program."""


def _as_io_error(error: BaseException, doing: str) -> apsw.Error:
    """The exception to raise out of a callback in place of ``error``."""
    if isinstance(error, apsw.IOError | apsw.FullError):
        return error
    text = f"{doing}: {error or type(error).__name__}; the whole transaction is rolled back"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(text)
    return apsw.IOError(text)


class MainFile(apsw.VFSFile):
    """The main database file of one connection.

    Args:
        released: called with this object after the file was closed.
    """

    def __init__(
        self,
        base: str,
        name: Any,
        flags: list[int],
        engine: Engine,
        released: Callable[[MainFile], None],
    ) -> None:
        super().__init__(base, name, flags)
        self.engine = engine
        self.path = engine.path
        self._uploader = engine.uploader
        self._synced = False
        self._is_read_only = bool(flags[1] & apsw.SQLITE_OPEN_READONLY)
        # In a write transaction with a rollback journal.
        self._is_writing = False
        self._copying_since = 0.0
        self._released: Callable[[MainFile], None] | None = released
        #: Whether this is the last connection of the process; the registry knows.
        self.is_last: Callable[[], bool] = lambda: False

    def xFileControl(self, op: int, ptr: int) -> bool:
        # Three of these come with every transaction.  Declining it turns blocking locks off, whose
        # C code would poll with the same pauses as the busy timeout does through xSleep; forwarding
        # it costs a point read 2 us more than declining it (benchmarks/reads.py).
        if op == _LOCK_TIMEOUT:
            return False
        if op == _COMMIT_PHASETWO:
            try:
                if not self._uploader.dirty:
                    self._uploader.ring()
                commits = collecting.get()
                if commits is not None:
                    commits.add(self.engine)
            except BaseException as error:
                self._uploader.ring_later(isinstance(error, KeyboardInterrupt))
            return False  # the VFS below knows nothing of it
        if op in _NOTICED:
            self._notice(op, ptr)
        return _file_control(self, op, ptr)

    def _notice(self, op: int, ptr: int) -> None:
        if op == _PRAGMA:
            self._check_pragma(ptr)
        elif op == _CKPT_START:
            self._copying_since = self.engine.checkpoints.now()
            self._forgive(self.engine.capture.note_checkpoint)
        elif op == _CKPT_DONE:
            self.engine.checkpoints.ended("PASSIVE", self._copying_since)
        elif self.is_last():
            # sqlite3_close asks whether the file has moved just before it locks, checkpoints and
            # deletes the WAL; once it has, nobody can ask the wal-index any more.
            self._forgive(self.engine.before_close)

    def xLock(self, level: int) -> None:
        # In WAL mode this is called when a connection first reads, and when the last one closes.
        _latest.main = self
        if level == _LOCK_SHARED:
            self._forgive(self.engine.before_reading)
        elif level == _LOCK_RESERVED:
            self._is_writing = True
        elif level == _LOCK_EXCLUSIVE and self._is_read_only:
            # The kernel would refuse it, and the application's close() would fail.  SQLite then
            # leaves the checkpoint to another connection.
            raise apsw.BusyError("opened for reading only")
        elif level == _LOCK_EXCLUSIVE and self.is_last():
            self._forgive(self.engine.before_close)
        _lock(self, level)

    def xUnlock(self, level: int) -> None:
        self._is_writing = False
        _unlock(self, level)
        if level == _LOCK_SHARED:
            # It was not the last close after all, only an exclusive moment.
            self._forgive(self.engine.after_open)

    def drain_before_delete(self) -> None:
        """The ``-wal`` is about to be deleted by the last close.

        Raises:
            apsw.IOError: it must stay, because the spool cannot take what it holds.
        """
        try:
            with self.engine.checkpoints.timed("TRUNCATE"):
                self.engine.gate_discard(self.read)
        except BaseException as error:
            raise _as_io_error(error, "the write-ahead log could not be drained") from error

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, zeros past its end; only in the thread that uses this connection."""
        size = self.xFileSize()
        if offset >= size:
            return bytes(length)
        data = self.xRead(min(length, size - offset), offset)
        return bytes(data).ljust(length, b"\0")

    def _forgive(self, action: Callable[[], None]) -> None:
        """Run a notice whose failure the gate will meet again; it must not fail SQLite's call."""
        try:
            action()
        except Exception as error:
            self.engine.note_trouble(error)

    def _check_pragma(self, ptr: int) -> None:
        try:
            pragma = apsw.VFSFcntlPragma(ptr)
            name, value = pragma.name, pragma.value
        except Exception:
            return
        allowed = _ALLOWED_VALUES.get(name.lower())
        if allowed is not None and value is not None and value.lower() != allowed[0]:
            reason = (
                f"{name}={value} is refused: {self.engine.name} is replicated, and {allowed[1]}"
            )
            pragma.result = reason
            raise RefusedError(reason)

    def xWrite(self, data: bytes, offset: int) -> None:
        # Checkpoints write here in WAL mode.  In any other mode every commit writes page 1, whose
        # header then does not say WAL: nothing of such a commit could be replicated.  But what a
        # rollback journal brings back has to come through, or nobody could read any more: SQLite
        # does that under a lock that it takes at once, and not, as a writer, by way of another.
        if offset == 0 and len(data) >= 100:
            is_wal = bytes(data[18:20]) == _WAL_MODE
            if not is_wal and self._is_writing:
                raise RefusedError(
                    f"{self.engine.name} is not in WAL mode and cannot be replicated: run PRAGMA "
                    "journal_mode=WAL first (walship.connect does)"
                )
            self.engine.note_wal_mode(is_wal)
        _write(self, data, offset)

    def xSync(self, flags: int) -> None:
        fd = self.engine.main_descriptor()
        if fd is None or not self._synced:
            # SQLite's own also syncs the directory of a file it has just made.
            _sync(self, flags)
            self._synced = True
            return
        try:
            sync_descriptor(fd)
        except BaseException as error:
            raise _as_io_error(error, "the database could not be synced") from error

    def look_at_header(self) -> None:
        """Tell the engine whether an existing database is in WAL mode."""
        if self.xFileSize() >= 100:
            self.engine.note_wal_mode(bytes(self.xRead(100, 0))[18:20] == _WAL_MODE)

    def xClose(self) -> None:
        released, self._released = self._released, None
        if getattr(_latest, "main", None) is self:
            _latest.main = None
        try:
            _close(self)
        finally:
            if released is not None:
                self._forgive(lambda: released(self))


class WalFile(apsw.VFSFile):
    """The ``-wal`` file of one connection.

    Args:
        main: the main file of the same connection.
    """

    def __init__(self, base: str, name: Any, flags: list[int], main: MainFile) -> None:
        super().__init__(base, name, flags)
        self._main = main
        self._engine = main.engine
        self._path = os.fspath(name if isinstance(name, str) else name.filename())
        self._fd = -1
        self._is_named = False  # for certain: the directory was synced since the file was opened

    def xWrite(self, data: bytes, offset: int) -> None:
        try:
            if offset == 0:
                with self._counted("RESTART"):
                    self._engine.gate_restart(bytes(data), self._main.read)
            elif self._engine.refusal is not None and len(data) == _FRAME_HEADER_SIZE:
                self._refuse_commit(data)
            _write(self, data, offset)
        except BaseException as error:
            raise _as_io_error(error, "the write-ahead log could not be written") from error

    def _counted(self, mode: CheckpointMode) -> AbstractContextManager[None]:
        """Nothing is begun anew, or cut, where there was nothing."""
        return self._engine.checkpoints.timed(mode) if self.xFileSize() else nullcontext()

    def _refuse_commit(self, header: bytes) -> None:
        """Stop a transaction at its last frame, while nothing of it is published."""
        refusal = self._engine.refusal
        if refusal is not None and bytes(header[4:8]) != _NO_COMMIT:
            raise refusal

    def xTruncate(self, size: int) -> None:
        try:
            if size == 0:
                with self._counted("TRUNCATE"):
                    self._engine.gate_discard(self._main.read)
            _truncate(self, size)
        except BaseException as error:
            raise _as_io_error(error, "the write-ahead log could not be truncated") from error

    def xSync(self, flags: int) -> None:
        # Through a descriptor of our own the GIL is free while the disk works; closing it drops no
        # lock of SQLite's, because there are none on this file.
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            sync_descriptor(self._fd)
            if not self._is_named:
                # The first time its name too, as SQLite does: who opens a WAL may have made it.
                sync_directory_of(self._path)
                self._is_named = True
        except BaseException as error:
            raise _as_io_error(error, "the write-ahead log could not be synced") from error

    def xClose(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        _close(self)
