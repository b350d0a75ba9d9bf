"""Objects as files below a directory, and the one helper that makes a file durable.

``write_durably`` is used wherever a file has to be whole under its name or not there at all:
temporary file, write, fsync, rename (or link, to create only), fsync of the directory.

Layout: ``ltx/<level in decimal>/<min>-<max>.ltx``.  Names that end in ``.tmp`` are unfinished
files and never part of a listing; what a crash left of them is removed a day later.  User metadata
is not kept; the logical time of an object is its file's modification time.

Compare-and-swap holds a lock on ``.walship-lock.tmp`` in the root while it compares and renames.
That works among the processes of one host; over a network file system only as far as its locks do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from walship.replica.clock import Clock
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable

from .base import Body, ObjectInfo, Version

F_FULLFSYNC: Final[int | None] = getattr(fcntl, "F_FULLFSYNC", None)

__all__ = ["LocalStore", "fsync_directory", "fsync_file", "make_directories", "write_durably"]

_TEMPORARY: Final = ".tmp"
#: Ends like an unfinished file so that it is no object; never removed, or two processes could hold
#: locks on two files of this name.
_LOCK_FILE: Final = f".walship-lock{_TEMPORARY}"
_COPY_BYTES: Final = 1024 * 1024
_IOV_MAX: Final = 512  # the kernel takes 1024 pieces in one call
_LEFTOVER_MS: Final = 24 * 3600 * 1000
_RETRYABLE: Final = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})

_serial = itertools.count()

# Guards compare-and-swap among the threads of this process, whatever their LocalStore: locks of
# lockf() are the process's, and closing any descriptor of the file gives them up.
_swap_mutex = threading.Lock()


def _new_swap_mutex() -> None:
    global _swap_mutex
    _swap_mutex = threading.Lock()  # a thread that held it does not exist in the child


os.register_at_fork(after_in_child=_new_swap_mutex)


def fsync_file(fd: int) -> None:
    """Make the content and length of an open file survive a power cut."""
    if F_FULLFSYNC is not None:  # macOS: plain fsync leaves data in the drive's cache
        try:
            fcntl.fcntl(fd, F_FULLFSYNC)
            return
        except OSError:  # not every file system there knows it
            pass
    os.fsync(fd)


def sync_data(fd: int) -> None:
    """Make the content of an open file survive a power cut, and its length if that changed.

    Cheaper than `fsync_file` where the system can leave times and the like aside.
    """
    if F_FULLFSYNC is None and hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        fsync_file(fd)


def fsync_directory(directory: Path) -> None:
    """Make creations, renames and removals in ``directory`` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        fsync_file(fd)
    finally:
        os.close(fd)


def make_directories(directory: Path, mode: int = 0o700) -> None:
    """Create ``directory`` and its missing parents, each entry durable."""
    missing = []
    current = directory
    while not current.is_dir():
        missing.append(current)
        if current.parent == current:
            break
        current = current.parent
    for made in reversed(missing):
        try:
            made.mkdir(mode)
        except FileExistsError:
            if not made.is_dir():
                raise
        fsync_directory(made.parent)


def write_durably(
    path: Path,
    body: Body | Iterable[bytes | bytearray | memoryview],
    *,
    if_absent: bool = False,
    mtime_ms: int | None = None,
    mode: int = 0o600,
) -> int:
    """Create or replace a file so that it is whole or absent at any moment, also after a crash.

    Missing parent directories are made, durably too.  When this returns the file is on disk.

    Args:
        path: the file; the temporary one lies beside it and ends in ``.tmp``.
        body: bytes, pieces of bytes in file order, or the path of a file to copy.
        if_absent: do not replace an existing file.
        mtime_ms: modification time to give it, milliseconds since the epoch.
        mode: permissions of a new file (less the umask).

    Returns:
        Its length in bytes.

    Raises:
        FileExistsError: ``if_absent`` and ``path`` exists.
        OSError: anything else.  ``path`` is then unchanged, or (only when the directory's fsync
            failed: the attribute ``ambiguous`` is set and true) new but perhaps not durable.
    """
    return _write_file(path, body, if_absent=if_absent, mtime_ms=mtime_ms, mode=mode).st_size


def _write_file(
    path: Path,
    body: Body | Iterable[bytes | bytearray | memoryview],
    *,
    if_absent: bool = False,
    mtime_ms: int | None = None,
    mode: int = 0o600,
    distinct: bool = False,
    swap: contextlib.AbstractContextManager[None] | None = None,
) -> os.stat_result:
    """``write_durably``, with what a store needs besides.

    Args:
        distinct: let digits below the millisecond tell the modification time from that of any
            other file.
        swap: entered around the rename; what it raises leaves ``path`` unchanged.

    Returns:
        Status of the new file itself, also if another has taken its place meanwhile.
    """
    make_directories(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_serial)}{_TEMPORARY}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            _write_body(fd, body)
            if distinct or mtime_ms is not None:
                _set_mtime(fd, mtime_ms, distinct)
            fsync_file(fd)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        if if_absent:
            os.link(temporary, path)  # unlike a rename this fails when the name is taken
        else:
            with swap or contextlib.nullcontext():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        fsync_directory(path.parent)
    except OSError as error:
        error.ambiguous = True  # type: ignore[attr-defined]
        raise
    return status


def _set_mtime(fd: int, mtime_ms: int | None, distinct: bool) -> None:
    if mtime_ms is None:
        # What the file system itself gave: on a network that may be the server's time.
        mtime_ms = os.fstat(fd).st_mtime_ns // 1_000_000
    below_ms = secrets.randbelow(1_000_000) if distinct else 0
    os.utime(fd, ns=(mtime_ms * 1_000_000 + below_ms,) * 2)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _write_body(fd: int, body: Body | Iterable[bytes | bytearray | memoryview]) -> None:
    if isinstance(body, Path):
        _copy_file(fd, body)
        return
    if isinstance(body, (bytes, bytearray, memoryview)):
        body = (body,)
    pieces = iter(body)
    while batch := [memoryview(piece).cast("B") for piece in itertools.islice(pieces, _IOV_MAX)]:
        while batch:
            written = os.writev(fd, batch)
            while batch and written >= len(batch[0]):
                written -= len(batch[0])
                del batch[0]
            if batch:
                batch[0] = batch[0][written:]


def _copy_file(fd: int, source: Path) -> None:
    buffer = memoryview(bytearray(_COPY_BYTES))
    with source.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            rest = buffer[:n]
            while rest:
                rest = rest[os.write(fd, rest) :]


def _etag(status: os.stat_result) -> str:
    """Tag of a file that is replaced and never changed.

    The file's number is another one than its predecessor's; should a later file get it again, the
    digits of its time below the millisecond are others.  The time of the last status change is
    left out: it moves when a create-only write removes its temporary name.
    """
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, status.st_mtime_ns // 1_000_000, _etag(status))


class LocalStore:
    """A directory as an object store.  Thread-safe; several processes may use it at once.

    Args:
        root: the directory; made when the first object is written.
        clock: tells how old unfinished files of earlier processes are.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = Path(os.path.abspath(root))  # resolve() would follow links
        self._clock = clock
        self._lock = threading.Lock()
        self._swept: set[Path] = set()  # guarded by _lock

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    @property
    def logical_times(self) -> bool:
        return True

    def level_prefix(self, level: int) -> str:
        return f"ltx/{level}/"

    def put(
        self,
        key: str,
        body: Body,
        *,
        timestamp_ms: int | None = None,
        metadata: Mapping[str, str] | None = None,
        if_absent: bool = False,
        if_match: str | None = None,
    ) -> ObjectInfo:
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        path = self._path(key)
        swap = None
        try:
            if if_match is not None:
                self._compare(path, if_match)  # before anything is written
                swap = self._swapping(path, if_match)
            self._sweep(path.parent)
            status = _write_file(
                path,
                body,
                if_absent=if_absent,
                mtime_ms=timestamp_ms,
                # The times of segments are read by others, to the last digit.
                distinct=timestamp_ms is None or if_match is not None,
                swap=swap,
            )
            return _info(key, status)
        except FileExistsError as error:
            if if_absent and _exists(path):
                raise PreconditionFailed(f"{path} exists already", code="EEXIST") from error
            raise self._error("write", key, error) from error
        except OSError as error:
            if if_absent and error.errno in _NO_HARD_LINKS and os.access(path.parent, os.W_OK):
                raise StoreError(
                    f"cannot create {path} exclusively: this file system has no hard links "
                    "(use another one for the replica)",
                    code=errno.errorcode.get(error.errno or 0),
                ) from error
            raise self._error("write", key, error) from error

    def copy(self, source: str, target: str) -> ObjectInfo:
        original, path = self._path(source), self._path(target)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_serial)}{_TEMPORARY}")
        try:
            status = original.stat()
            make_directories(path.parent)
            try:
                os.link(original, temporary)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                modified_ms = status.st_mtime_ns // 1_000_000
                return _info(target, _write_file(path, original, mtime_ms=modified_ms))
            temporary.replace(path)
            temporary.unlink(missing_ok=True)  # a rename of a file onto itself leaves both names
            fsync_directory(path.parent)
            return _info(target, status)
        except FileNotFoundError as error:
            raise self._error("read", source, error) from error
        except OSError as error:
            raise self._error("write", target, error) from error

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                end = size if length is None else min(size, start + length)
                pieces = []
                while start < end:
                    piece = os.pread(file.fileno(), end - start, start)
                    if not piece:
                        break
                    pieces.append(piece)
                    start += len(piece)
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except OSError as error:
            raise self._error("read", key, error) from error

    def read(self, key: str, *, unless_etag: str | None = None) -> Version | None:
        path = self._path(key)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                etag = _etag(status)
                if etag == unless_etag:
                    return None
                body = file.read()
        except OSError as error:
            raise self._error("read", key, error) from error
        return Version(body, etag, status.st_mtime_ns // 1_000_000, self._file_system_ms())

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        try:
            status = path.stat()
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise self._error("read", key, error) from error
        return _info(key, status)

    def list(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectInfo]:
        folder, slash, name = prefix.rpartition("/")
        if folder:
            self._path(folder)
        try:
            yield from self._walk(folder + slash, name, start_after)
        except OSError as error:
            raise self._error("list", prefix, error) from error

    def delete(self, keys: Sequence[str]) -> None:
        failure: StoreError | None = None
        folders: dict[Path, str] = {}
        for key in keys:
            path = self._path(key)
            try:
                path.unlink()
                folders.setdefault(path.parent, key)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if path.is_dir():  # no object has this name
                    continue
                if failure is None:
                    failure = self._error("delete", key, error)
                    failure.__cause__ = error
        for folder, key in folders.items():
            try:
                fsync_directory(folder)
            except OSError as error:
                if failure is None:
                    failure = self._error("delete", key, error)
                    failure.__cause__ = error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise StoreError(f"not a key: {key!r} (no empty part, no '.', no '..')")
        if key.endswith(_TEMPORARY):
            raise StoreError(f"not a key: {key!r} ('{_TEMPORARY}' is for unfinished files)")
        return self._root.joinpath(*parts)

    @staticmethod
    def _compare(path: Path, etag: str) -> None:
        """Raise PreconditionFailed unless the file's tag is ``etag``."""
        try:
            found = _etag(path.stat())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PreconditionFailed(
                f"{path} is gone: it was there before", code="ENOENT"
            ) from error
        if found != etag:
            raise PreconditionFailed(f"{path} was replaced by another writer", code="ESTALE")

    @contextlib.contextmanager
    def _swapping(self, path: Path, etag: str) -> Iterator[None]:
        """Nobody else compares and swaps in this directory; the file's tag is ``etag``."""
        with _swap_mutex:
            fd = os.open(self._root / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX)  # given back with the descriptor
                self._compare(path, etag)
                yield
            finally:
                os.close(fd)

    def _file_system_ms(self) -> int:
        """Now, by the clock that modification times come from: on a network the server's."""
        probe = self._root / f".walship-now.{os.getpid()}-{next(_serial)}{_TEMPORARY}"
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                return os.fstat(fd).st_mtime_ns // 1_000_000
            finally:
                os.close(fd)
                probe.unlink()
        except OSError:  # read-only or full: on a disk of this machine its clock is the same
            return self._clock.now_ms()

    def _walk(self, folder: str, name: str, start_after: str | None) -> Iterator[ObjectInfo]:
        """Objects directly and deeper below ``folder`` ("" or ending in "/"), in key order."""
        try:
            with os.scandir(self._root / folder) as entries:
                # A directory sorts as its name with the slash that its keys go on with.
                found = sorted(
                    (
                        (entry.name + "/" * entry.is_dir(), entry)
                        for entry in entries
                        if entry.name.startswith(name) and not entry.name.endswith(_TEMPORARY)
                    ),
                    key=lambda item: os.fsencode(item[0]),
                )
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if self._root.is_dir():
                return
            raise  # a replica will never be there
        after = None if start_after is None else os.fsencode(start_after)
        for entry_name, entry in found:
            key = folder + entry_name
            encoded = os.fsencode(key)
            if key.endswith("/"):
                if after is None or after < encoded or after.startswith(encoded):
                    yield from self._walk(key, "", start_after)
            elif after is None or encoded > after:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed meanwhile
                    continue
                yield _info(key, status)

    def _sweep(self, folder: Path) -> None:
        """Once per directory: remove unfinished files that a crash left behind."""
        with self._lock:
            if folder in self._swept:
                return
            self._swept.add(folder)
        old_ns = (self._clock.now_ms() - _LEFTOVER_MS) * 1_000_000
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name == _LOCK_FILE or not entry.name.endswith(_TEMPORARY):
                        continue
                    if entry.stat().st_ctime_ns < old_ns:
                        os.unlink(entry.path)
        except OSError:  # tidying only: the write itself says what is wrong
            return

    def _error(self, action: str, key: str, error: OSError) -> StoreError:
        number = error.errno or 0
        code = errno.errorcode.get(number)
        path = self._root / key
        if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) and action == "read":
            return ObjectNotFound(f"no such file: {path}", code=code)
        ambiguous = bool(getattr(error, "ambiguous", False))
        advice = ""
        if number in (errno.ENOSPC, errno.EDQUOT):
            advice = ": the disk of the replica is full"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = ": check the owner and permissions of the replica's directory"
        text = f"cannot {action} {path}: {error.strerror or error}{advice}"
        if number in _RETRYABLE:
            return StoreUnavailable(text, code=code, ambiguous=ambiguous)
        return StoreError(text, code=code, ambiguous=ambiguous)
