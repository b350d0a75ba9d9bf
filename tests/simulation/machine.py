"""Machines and processes of the simulation: files, locks, pipes, clocks, and SQLite on top of them.

Everything is the real thing (database files, SQLite, the shims, the engine) but for what an
operating system keeps per process: record locks, pipes, open descriptors and the process's end.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import apsw

from walship.replica.files import Files, StrPath
from walship.replica.host import Host
from walship.replica.sqlite import SqlitePort, kept_descriptors
from walship.replica.store.base import ObjectStore
from walship.replica.store.settings import StoreSettings
from walship.vfs.files import MainFile, WalFile
from walship.vfs.registry import Registry
from walship.vfs.replicating import ReplicatingVFS

from . import runtime as rt
from .bucket import START_MS, Bucket, Client
from .runtime import Killed, Owner, Runtime

__all__ = ["Machine", "Process"]

_PIPE_BYTES = 65536


class Machine:
    """A host with a disk.  Also a clone of one: the same files elsewhere.

    Attributes:
        directory: its disk.
        processes: those that live.
    """

    def __init__(
        self, runtime: Runtime, name: str, directory: Path, rng: random.Random, drift: float
    ) -> None:
        self.runtime = runtime
        self.name = name
        self.directory = directory
        self.processes: list[Process] = []
        self.rate = 1.0 + drift * (2 * rng.random() - 1)
        self.skew_s = rng.choice((0.0, 0.0, 3600.0, -86400.0))
        self.boot = f"boot-{name}"
        self.disk = name
        self.modified: dict[int, int] = {}  # inode: virtual time of its last change, ns
        self.locks: dict[tuple[int, int], dict[Process, bool]] = {}  # (inode, byte): shared?
        self.pipes: dict[str, _Pipe] = {}
        self.descriptors: list[int] = []
        self.started: list[Process] = []
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        """Of the database."""
        return self.directory / "app.db"

    @property
    def state(self) -> Path:
        """The state directory."""
        return self.directory / ".app.db-walship"

    def now_ms(self) -> int:
        """Its wall clock."""
        return START_MS + round((self.runtime.now * self.rate + self.skew_s) * 1000)

    def touch(self, inode: int) -> None:
        """A file was changed."""
        self.modified[inode] = self.now_ms() * 1_000_000

    def start(self, bucket: Bucket, rng: random.Random) -> Process:
        """A new process."""
        process = Process(self, len(self.started) + 1, bucket, rng)
        self.started.append(process)
        self.processes.append(process)
        return process

    def copy_to(self, target: Path) -> None:
        """What its disk holds, as a snapshot of the volume would."""

        def copy(source: str, destination: str) -> None:
            # Closing the database would drop the locks that SQLite has on it in this very process.
            fd = os.open(source, os.O_RDONLY)
            self.descriptors.append(fd)
            Path(destination).write_bytes(os.pread(fd, os.fstat(fd).st_size, 0))

        shutil.copytree(
            self.directory,
            target,
            ignore=shutil.ignore_patterns("*-shm", "*.tmp"),
            copy_function=copy,
        )

    def close_descriptors(self) -> None:
        """When the run is over."""
        for fd in self.descriptors:
            os.close(fd)
        for process in self.started:
            process.close_descriptors()

    def wipe(self) -> None:
        """The disk is gone; so are the processes, which the caller has killed."""
        assert not self.processes
        shutil.rmtree(self.directory)
        self.directory.mkdir()


class _Pipe:
    """A named pipe."""

    def __init__(self) -> None:
        self.data = b""
        self.reader: Process | None = None
        self.waiters: list[rt.Task] = []


class Process(Owner):
    """A process: engines, connections and the threads that use them, on one machine.

    Attributes:
        kill_in: operations on files until it is killed; None for never.
        kill_in_commit: it is killed when a commit is in the WAL and not published.
        blocked_ns: virtual time for which it was stopped.
    """

    def __init__(self, machine: Machine, number: int, bucket: Bucket, rng: random.Random) -> None:
        super().__init__(f"{machine.name}.{number}")
        self.machine = machine
        self.boot, self.disk = machine.boot, machine.disk
        self.runtime = machine.runtime
        self.rate = machine.rate
        self.bucket = bucket
        self.rng = rng
        self.kill_in: int | None = None
        self.kill_in_commit = False
        self.host = _Host(self)
        self.registry = _Registry(self.host)
        self.vfs_name = f"sim-{id(self):x}"
        self.vfs = _VFS(self)
        self.connections: list[apsw.Connection] = []
        self.ports: list[SqlitePort] = []
        self.descriptors: set[int] = set()

    def spawn(self, action: Callable[[], object], name: str, after_s: float = 0.0) -> rt.Task:
        """Start a thread."""
        return self.runtime.spawn(action, name, self, after_s=after_s)

    def point(self) -> None:
        """An operation that changes something is done, or about to be: it may be the last."""
        if self.dead:
            raise Killed
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill()
        self.runtime.preempt()

    def kill(self) -> None:
        """SIGKILL."""
        self.runtime.note("killed", self.name)
        self.runtime.kill(self)

    def ended(self) -> None:
        """What the kernel does at the end of a process."""
        machine = self.machine
        if self in machine.processes:
            machine.processes.remove(self)
        for holders in machine.locks.values():
            holders.pop(self, None)
        for pipe in machine.pipes.values():
            if pipe.reader is self:
                pipe.reader, pipe.data = None, b""
        for connection in self.connections:
            _close(connection)
        for port in self.ports:
            for connection in list(port._owned):
                _close(connection)
        self.vfs.unregister()

    def close_descriptors(self) -> None:
        """When the run is over: what the kernel would have closed.

        Not before, because the simulated processes are one to the kernel: closing a descriptor of
        the database would drop the locks of all of them.
        """
        for port in self.ports:
            for name in ("_watch", "_index"):
                fd = getattr(port, name)
                if fd >= 0:
                    setattr(port, name, -1)
                    kept_descriptors.close(fd)
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors.clear()

    def exit(self) -> None:
        """End in good order: nothing of it runs any more."""
        self.runtime.note("exits", self.name)
        self.runtime.kill(self)


def _close(connection: apsw.Connection) -> None:
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    except apsw.ConnectionClosedError:
        return
    connection.close(True)


class _Clock:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def now_ms(self) -> int:
        return self._machine.now_ms()

    def monotonic(self) -> float:
        return 1000.0 + self._machine.runtime.now * self._machine.rate

    def sleep(self, seconds: float) -> None:
        self._machine.runtime.sleep(seconds)


class _Host(Host):
    """A process's view of its machine."""

    def __init__(self, process: Process) -> None:
        self.clock = _Clock(process.machine)
        self.files = SimFiles(process)
        self.slots = None
        self._process = process

    def open_store(self, settings: StoreSettings) -> ObjectStore:
        return Client(self._process.bucket, self._process)

    def process(self) -> str:
        machine, number = self._process.machine, self._process.name.rpartition(".")[2]
        return f"{machine.boot}/ns/{number}/1"

    def is_gone(self, process: str) -> bool:
        machine = self._process.machine
        return process.startswith(f"{machine.boot}/") and all(
            process != other.host.process() for other in machine.processes
        )

    def owner(self, path: str) -> str:
        return f"{self._process.name} ({path})"

    def rng(self) -> random.Random:
        return random.Random(self._process.rng.random())


class _Registry(Registry):
    """Without what concerns the real process: exit and fork handlers, the guard."""

    host: _Host

    def _guard(self, path: str) -> None:
        pass


class SimFiles(Files):
    """Real files, with locks and pipes of the simulated kernel."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._machine = process.machine
        self._pipes: dict[int, _Pipe] = {}
        self._next_pipe = 1_000_000

    def _look(self) -> None:
        if self._process.dead:
            raise Killed
        self._process.runtime.preempt()

    def open(self, path: StrPath, flags: int, mode: int = 0o600) -> int:
        if str(path).endswith(".fifo"):
            return self._open_pipe(str(path))
        self._process.point()
        fd = super().open(path, flags, mode)
        self._process.descriptors.add(fd)
        if flags & (os.O_CREAT | os.O_TRUNC):
            self._touch(fd)
        return fd

    def close(self, fd: int) -> None:
        if fd in self._pipes:
            pipe = self._pipes.pop(fd)
            if pipe.reader is self._process:
                pipe.reader = None
            return
        if self._process.dead:
            return
        # POSIX: whichever descriptor of a file is closed, the process loses its locks on it.
        inode = os.fstat(fd).st_ino
        for (locked, _), holders in self._machine.locks.items():
            if locked == inode:
                holders.pop(self._process, None)
        self._process.descriptors.discard(fd)
        super().close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._look()
        return super().pread(fd, length, offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._look()
        return super().preadv(fd, buffers, offset)

    def write(self, fd: int, parts: Sequence[Any], offset: int | None = None) -> int:
        if fd in self._pipes:
            return self._write_pipe(self._pipes[fd], b"".join(parts))
        self._process.point()
        data = b"".join(parts)
        if self._process.kill_in == 0 and len(data) > 1 and offset is not None:
            super().write(fd, [data[: len(data) // 2]], offset)  # it comes in the middle
            self._process.point()
        n = super().write(fd, [data], offset)
        self._touch(fd)
        self._process.point()
        return n

    def sync(self, fd: int) -> None:
        self._process.point()

    def sync_directory(self, path: StrPath) -> None:
        self._process.point()

    def truncate(self, fd: int, size: int) -> None:
        self._process.point()
        super().truncate(fd, size)
        self._touch(fd)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self._process.point()
        os.ftruncate(fd, offset + length)
        self._touch(fd)

    def stat(self, path: StrPath) -> os.stat_result:
        return self._stamped(super().stat(path))

    def fstat(self, fd: int) -> os.stat_result:
        return self._stamped(super().fstat(fd))

    def rename(self, source: StrPath, target: StrPath) -> None:
        self._process.point()
        super().rename(source, target)
        self._process.point()

    def unlink(self, path: StrPath) -> None:
        self._process.point()
        if str(path).endswith(".fifo"):
            if self._machine.pipes.pop(str(path), None) is None:
                raise FileNotFoundError(errno.ENOENT, "no pipe", str(path))
            return
        super().unlink(path)

    def names(self, directory: StrPath) -> list[str]:
        pipes = [
            os.path.basename(path)
            for path in self._machine.pipes
            if os.path.dirname(path) == str(directory)
        ]
        return sorted(super().names(directory) + pipes)

    def make_directory(self, path: StrPath) -> None:
        self._process.point()
        super().make_directory(path)

    def lock(self, fd: int, byte: int, *, shared: bool = False) -> bool:
        self._process.point()
        holders = self._machine.locks.setdefault((os.fstat(fd).st_ino, byte), {})
        for process, is_shared in holders.items():
            if process is not self._process and not (shared and is_shared):
                return False
        holders[self._process] = shared
        return True

    def unlock(self, fd: int, byte: int) -> None:
        if self._process.dead:
            raise Killed
        self._machine.locks.get((os.fstat(fd).st_ino, byte), {}).pop(self._process, None)
        self._process.point()

    # -- pipes --------------------------------------------------------------------------------

    def make_fifo(self, path: StrPath) -> int:
        self._process.point()
        pipe = self._machine.pipes.setdefault(str(path), _Pipe())
        pipe.reader = self._process
        return self._add_pipe(pipe)

    def _open_pipe(self, path: str) -> int:
        self._process.point()
        pipe = self._machine.pipes.get(path)
        if pipe is None:
            raise FileNotFoundError(errno.ENOENT, "no pipe", path)
        if pipe.reader is None:
            raise OSError(errno.ENXIO, "nobody reads the pipe", path)
        return self._add_pipe(pipe)

    def _add_pipe(self, pipe: _Pipe) -> int:
        self._next_pipe += 1
        self._pipes[self._next_pipe] = pipe
        return self._next_pipe

    def _write_pipe(self, pipe: _Pipe, data: bytes) -> int:
        self._process.point()
        if pipe.reader is None:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the pipe")
        if len(pipe.data) + len(data) > _PIPE_BYTES:
            raise BlockingIOError(errno.EAGAIN, "the pipe is full")
        pipe.data += data
        waiters, pipe.waiters = pipe.waiters, []
        for task in waiters:
            self._process.runtime.wake(task)
        return len(data)

    def receive(self, fd: int, timeout_s: float | None) -> bytes:
        pipe, runtime = self._pipes[fd], self._process.runtime
        assert runtime.current is not None
        if not pipe.data:
            pipe.waiters.append(runtime.current)
            runtime.block("pipe", timeout_s)
        data, pipe.data = pipe.data, b""
        return data

    # -- times --------------------------------------------------------------------------------

    def _touch(self, fd: int) -> None:
        self._machine.touch(os.fstat(fd).st_ino)

    def _stamped(self, status: os.stat_result) -> os.stat_result:
        """With virtual times: a file that is new to the simulation was changed just now."""
        if self._process.dead:
            raise Killed
        if status.st_ino not in self._machine.modified:
            self._machine.touch(status.st_ino)
        return _Stamped(status, self._machine.modified[status.st_ino])  # type: ignore[return-value]


class _Stamped:
    """What ``os.stat`` returns, with other times."""

    def __init__(self, status: os.stat_result, modified_ns: int) -> None:
        self.st_dev, self.st_ino = status.st_dev, status.st_ino
        self.st_size, self.st_mode = status.st_size, status.st_mode
        self.st_mtime_ns = self.st_ctime_ns = modified_ns


# -- SQLite's files --------------------------------------------------------------------------------


class _Gone(apsw.IOError):
    """To SQLite: the process is dead and does nothing any more."""


class _VFS(ReplicatingVFS):
    """The replicating VFS of one simulated process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        super().__init__(process.vfs_name, "unix", process.registry)
        self.main_file = partial(_SimMainFile, process)  # type: ignore[assignment]
        self.wal_file = partial(_SimWalFile, process)  # type: ignore[assignment]

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        if self.process.dead:
            raise _Gone
        return super().xOpen(name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:
        self.process.point()
        super().xDelete(name, sync_directory)
        self.process.point()


class _SimMainFile(MainFile):
    def __init__(self, process: Process, *arguments: Any) -> None:
        self.process = process
        super().__init__(*arguments)
        self._inode = os.stat(self.path).st_ino

    def xFileControl(self, op: int, ptr: int) -> bool:
        if self.process.dead:
            return apsw.VFSFile.xFileControl(self, op, ptr)
        if op == apsw.SQLITE_FCNTL_COMMIT_PHASETWO:
            self.process.point()
        return super().xFileControl(op, ptr)

    def xLock(self, level: int) -> None:
        if self.process.dead:
            raise _Gone
        super().xLock(level)

    def xUnlock(self, level: int) -> None:
        if self.process.dead:
            apsw.VFSFile.xUnlock(self, level)
        else:
            super().xUnlock(level)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.process.point()
        super().xWrite(data, offset)
        self.process.machine.touch(self._inode)
        self.process.point()

    def xTruncate(self, size: int) -> None:
        self.process.point()
        super().xTruncate(size)
        self.process.machine.touch(self._inode)

    def xSync(self, flags: int) -> None:
        self.process.point()
        super().xSync(flags)

    def xClose(self) -> None:
        if self.process.dead:
            apsw.VFSFile.xClose(self)
        else:
            super().xClose()


class _SimWalFile(WalFile):
    def __init__(self, process: Process, *arguments: Any) -> None:
        self.process = process
        self._is_last = False  # the frame being written is its transaction's
        super().__init__(*arguments)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.process.point()
        super().xWrite(data, offset)
        if len(data) == 24:
            self._is_last = bytes(data[4:8]) != bytes(4)
        elif self._is_last and self.process.kill_in_commit:
            self.process.kill()
        self.process.point()

    def xTruncate(self, size: int) -> None:
        self.process.point()
        super().xTruncate(size)
        self.process.point()

    def xSync(self, flags: int) -> None:
        self.process.point()
        super().xSync(flags)
