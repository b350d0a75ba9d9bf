"""Files as the engine uses them: a thin port over the operating system.

Everything the engine keeps on disk or shares between processes goes through one `Files` object, so
that a test can put a disk there that loses what was not synced, or a host that stops anywhere.
The methods do what their namesakes in ``os`` do and raise ``OSError``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from .store.local import fsync_directory, fsync_file, make_directories, sync_data

__all__ = ["OS_FILES", "Files", "write_all"]

#: Buffers handed to the kernel in one call, at most; Linux and macOS take 1024.
_IOV_MAX: Final = 512
#: Bytes read from a pipe at once.
_PIPE_BYTES: Final = 65536

StrPath = str | os.PathLike[str]


class Files:
    """The operating system's files, as one process sees them.  Thread-safe.

    Attributes:
        locked_directories: state directories whose record locks this process may hold (`election`).
    """

    def __init__(self) -> None:
        self.locked_directories: set[str] = set()

    def open(self, path: StrPath, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def reader(self, path: StrPath) -> BinaryIO:
        """A file to read from its beginning."""
        return open(path, "rb")

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, parts: Sequence[Any], offset: int | None = None) -> int:
        """Write every buffer, in order, at ``offset`` or at the file's position; bytes written."""
        return write_all(fd, parts, offset)

    def sync(self, fd: int) -> None:
        """Make the content of an open file survive a power cut; releases the GIL."""
        sync_data(fd)

    def sync_all(self, fd: int) -> None:
        """As `sync`, and the file's times too."""
        fsync_file(fd)

    def sync_directory(self, path: StrPath) -> None:
        """Make names made, changed or removed in a directory survive a power cut."""
        fsync_directory(Path(path))

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Make room for ``length`` bytes at ``offset``, so that writing them changes no size."""
        try:
            os.posix_fallocate(fd, offset, length)
        except AttributeError:  # macOS
            os.ftruncate(fd, offset + length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(fd, offset + length)

    def stat(self, path: StrPath) -> os.stat_result:
        return os.stat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def rename(self, source: StrPath, target: StrPath) -> None:
        os.rename(source, target)

    def unlink(self, path: StrPath) -> None:
        os.unlink(path)

    def names(self, directory: StrPath) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(directory))

    def make_directory(self, path: StrPath) -> None:
        """Make a directory and its missing parents, for the owner only; an existing one is fine.

        What was made survives a power cut.
        """
        make_directories(Path(path))

    def lock(self, fd: int, byte: int, *, shared: bool = False) -> bool:
        """Take a record lock on one byte of an open file, or change its kind; never waits.

        Such locks belong to the process: they go with it, whatever ends it, and when it closes any
        descriptor on the file.  Threads of one process do not exclude each other.

        Returns:
            False if another process holds it in a way that excludes this one.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(fd, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def unlock(self, fd: int, byte: int) -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, byte)

    def make_fifo(self, path: StrPath) -> int:
        """A descriptor on a named pipe (made if missing), for reading and writing, non-blocking."""
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def receive(self, fd: int, timeout_s: float | None) -> bytes:
        """What is in a pipe; waits for the first byte, so long at most (None: without end)."""
        poll = select.poll()  # select() knows no descriptors above 1023
        poll.register(fd, select.POLLIN)
        poll.poll(None if timeout_s is None else timeout_s * 1000)
        try:
            return os.read(fd, _PIPE_BYTES)
        except BlockingIOError:
            return b""


#: The files of this process.
OS_FILES: Final = Files()


def write_all(fd: int, parts: Sequence[Any], offset: int | None = None) -> int:
    """Write every buffer, in order, at ``offset`` or at the file's position; bytes written."""
    written = 0
    batch: list[memoryview] = [memoryview(part).cast("B") for part in parts if len(part)]
    while batch:
        head = batch[:_IOV_MAX]
        if offset is None:
            n = os.writev(fd, head)
        else:
            n = os.pwritev(fd, head, offset + written)
        written += n
        while batch and n >= len(batch[0]):
            n -= len(batch[0])
            del batch[0]
        if n:
            batch[0] = batch[0][n:]
    return written
