"""Objects as files below a directory, and the one helper that makes a file durable.

``write_durably`` is used wherever a file has to be whole under its name or not there at all:
temporary file, write, fsync, rename (or link, to create only), fsync of the directory.

Layout: ``ltx/<level in decimal>/<min>-<max>.ltx``.  Names that end in ``.tmp`` are unfinished
files and never part of a listing; what a crash left of them is removed a day later.  User metadata
is not kept; the logical time of an object is its file's modification time.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from walship.replica.clock import Clock
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable

from .base import Body, ObjectInfo

try:
    from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined,unused-ignore]
except ImportError:
    F_FULLFSYNC = None

__all__ = ["LocalStore", "fsync_directory", "fsync_file", "make_directories", "write_durably"]

_TEMPORARY: Final = ".tmp"
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


def fsync_file(fd: int) -> None:
    """Make the content and length of an open file survive a power cut."""
    if F_FULLFSYNC is not None:  # macOS: plain fsync leaves data in the drive's cache
        try:
            fcntl(fd, F_FULLFSYNC)
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
    make_directories(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_serial)}{_TEMPORARY}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            size_bytes = _write_body(fd, body)
            if mtime_ms is not None:
                os.utime(
                    fd if os.utime in os.supports_fd else temporary, ns=(mtime_ms * 10**6,) * 2
                )
            fsync_file(fd)
        finally:
            os.close(fd)
        if if_absent:
            os.link(temporary, path)  # unlike a rename this fails when the name is taken
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    try:
        fsync_directory(path.parent)
    except OSError as error:
        error.ambiguous = True  # type: ignore[attr-defined]
        raise
    return size_bytes


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _write_body(fd: int, body: Body | Iterable[bytes | bytearray | memoryview]) -> int:
    if isinstance(body, Path):
        return _copy_file(fd, body)
    if isinstance(body, (bytes, bytearray, memoryview)):
        body = (body,)
    size_bytes = 0
    pieces = iter(body)
    while batch := [memoryview(piece).cast("B") for piece in itertools.islice(pieces, _IOV_MAX)]:
        while batch:
            written = os.writev(fd, batch)
            size_bytes += written
            while batch and written >= len(batch[0]):
                written -= len(batch[0])
                del batch[0]
            if batch:
                batch[0] = batch[0][written:]
    return size_bytes


def _copy_file(fd: int, source: Path) -> int:
    size_bytes = 0
    buffer = memoryview(bytearray(_COPY_BYTES))
    with source.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            rest = buffer[:n]
            while rest:
                rest = rest[os.write(fd, rest) :]
            size_bytes += n
    return size_bytes


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
    ) -> ObjectInfo:
        path = self._path(key)
        try:
            self._sweep(path.parent)
            write_durably(path, body, if_absent=if_absent, mtime_ms=timestamp_ms)
            return self._info(key, path.stat())
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

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        try:
            status = path.stat()
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise self._error("read", key, error) from error
        return self._info(key, status)

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
    def _info(key: str, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(key, status.st_size, status.st_mtime_ns // 1_000_000)

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
        except (FileNotFoundError, NotADirectoryError):
            return
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
                yield self._info(key, status)

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
                    if entry.name.endswith(_TEMPORARY) and entry.stat().st_ctime_ns < old_ns:
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
