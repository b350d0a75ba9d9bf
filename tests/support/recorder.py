"""Records every file operation of a process that replicates a database, in one total order.

`record` runs this file as a child process, which commits a `History` as a script says, and returns
what it did: operations on files (`support.disk`), puts into an object store in memory, and marks
that say what was acknowledged when.

Recorded are the calls of module ``os``, through which all files of the engine, of a directory
replica and of a restore go, and SQLite's own writes where they leave its VFS.  What SQLite's C code
does by itself (an empty -wal made by a connection that only looks) is noticed by looking at the
names before each operation.  The record is complete if it leads to the files that are there at the
end: `record` checks that.

Not recorded: the wal-index (-shm), which no power cut leaves, and memory that is mapped.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw

import walship
from support.disk import (
    Allocate,
    Disk,
    Identities,
    Image,
    MakeDirectory,
    Operation,
    Rename,
    SetName,
    Status,
    Sync,
    SyncDirectory,
    Touch,
    Truncate,
    Write,
)
from support.history import History
from support.memory import MemoryStore, Object
from walship.replica import capture, host, spool, uploader
from walship.replica.files import Files
from walship.replica.frames import WalReader
from walship.replica.sender import Sender
from walship.replica.spool import Spool
from walship.replica.sqlite import Published, SpoolError, SqlitePort
from walship.replica.store import local
from walship.vfs import files, replicating
from walship.vfs.registry import canonical, registry

__all__ = ["Landed", "Mark", "PutBegun", "Recording", "Script", "record", "simulate"]

DATABASE: Final = "app.db"
REPLICA: Final = "replica"
#: Where the store in memory says it is.
URL: Final = "s3://bucket/app"
_LIMIT_S: Final = 120.0
_append = Spool._append
#: First pause after a failed upload, seconds.
_BACKOFF_S: Final = 0.02
#: A VFS that records and does nothing else: for connections of "other programs".
_OTHER: Final = "recorded"


@dataclass(frozen=True, slots=True)
class Mark:
    """Somebody was told something: "committed", "synced" or "checkpointed" up to transaction n."""

    word: str
    n: int


@dataclass(frozen=True, slots=True)
class PutBegun:
    """An upload has begun: from here on the object may be there.  None: a removal."""

    key: str
    made: Object | None


@dataclass(frozen=True, slots=True)
class Landed:
    """The upload (or removal) has arrived."""

    key: str
    made: Object | None


Event = Operation | Mark | PutBegun | Landed


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a child does.

    Attributes:
        steps: words, see `_Child`.
        synchronous: SQLite's setting, FULL or NORMAL.
        directory: replicate to a directory on the same disk rather than to the store in memory.
        elsewhere: keep the state in a directory of its own rather than beside the database.
        seed: of the history.
        settings: keywords of ``walship.connect``.
        sealed_inline_bytes, journal_growth_bytes, journal_rewrite_bytes: limits of the spool, small
            so that a short history passes through everything.
        mutant: what to break on purpose, a name in `MUTANTS`.
    """

    steps: str
    synchronous: str = "FULL"
    directory: bool = False
    elsewhere: bool = False
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    sealed_inline_bytes: int = 2_000
    journal_growth_bytes: int = 16_384
    journal_rewrite_bytes: int = 4_000
    mutant: str | None = None

    def keywords(self, root: Path) -> dict[str, Any]:
        """Of ``walship.connect``, for the database below ``root``."""
        replica = str(root / REPLICA) if self.directory else URL
        given = {"replica": {"url": replica, "sync-interval": "1h"}, **self.settings}
        if self.elsewhere:
            given["meta_path"] = str(root / "elsewhere" / "state")
        return given

    def history(self) -> History:
        """The transactions that it commits."""
        return History(self.seed, cells=24, sizes=(10, 300, 2_000), changes=(1, 1, 2, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a child did.

    Attributes:
        script: what it was told.
        root: where it was; the URL of a directory replica says so, so that it must be there again.
        start: the files it found.
        objects: what was in the store then.
        n: transactions that may not be lost then.
        most: how many there may be.
        synced: those of them that were in the replica.
        events: everything since.
    """

    script: Script
    root: Path
    start: Image
    objects: dict[str, Object]
    n: int
    most: int
    synced: int
    events: list[Event]


def record(
    script: Script,
    root: Path,
    start: Image | None = None,
    objects: dict[str, Object] | None = None,
    n: int = 0,
    synced: int = 0,
    most: int = 0,
) -> Recording:
    """Run a child below ``root``, an empty directory, and return what it did; leaves it empty.

    Raises:
        AssertionError: it failed, or did something that was not recorded.
    """
    start = start or Image()
    identities = start.write_to(root / "disk")
    job = root / "job"
    job.write_bytes(pickle.dumps((script, dict(objects or {}), identities)))
    child = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(job)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_LIMIT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, child.stderr.decode()
    events: list[Event] = pickle.loads((root / "record").read_bytes())
    _check_complete(start, events, Image.of(root / "disk"))
    for path in list(root.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Recording(
        script=script,
        root=root / "disk",
        start=start,
        objects=dict(objects or {}),
        n=n,
        most=most,
        synced=synced,
        events=events,
    )


def _check_complete(start: Image, events: Sequence[Event], found: Image) -> None:
    disk = Disk(start)
    for event in events:
        if isinstance(event, Operation):
            disk.apply(event)
    expected = disk.now()
    assert sorted(found.directories) == sorted(expected.directories)
    assert sorted(found.files) == sorted(expected.files)
    for path, stored in expected.files.items():
        assert found.files[path].content == stored.content, f"{path} was changed unseen"


def simulate(identities: Identities) -> Callable[[], None]:
    """Let the engine see the files as they are to look; returns what ends that."""
    stat, fstat = Files.stat, Files.fstat

    def end() -> None:
        Files.stat, Files.fstat = stat, fstat  # type: ignore[method-assign]

    Files.stat = lambda self, path: identities.translate(stat(self, path))  # type: ignore[method-assign]
    Files.fstat = lambda self, fd: identities.translate(fstat(self, fd))  # type: ignore[method-assign]
    return end


# -- the child ------------------------------------------------------------------------------------


class _Recorder:
    """Takes down what happens below a directory.  Thread-safe.

    An operation and its note are one step: nothing comes between them.
    """

    def __init__(self, root: Path, identities: Identities) -> None:
        self.events: list[Event] = []
        self._root = os.path.realpath(root)
        self._identities = identities
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._inodes: dict[str, int] = {}  # as the kernel numbers them, to notice other files
        self._directories = {""}
        self._open: dict[int, int | str] = {}  # by descriptor: a file, or a directory's path
        self._next = 0
        self._stat, self._fstat = os.stat, os.fstat
        for folder, _, names in os.walk(self._root):
            if folder != self._root:
                self._directories.add(os.path.relpath(folder, self._root))
            for name in names:
                path = os.path.relpath(os.path.join(folder, name), self._root)
                self._names[path] = -1
        for path in sorted(self._names):
            self._names[path] = self._new_number()
            self._inodes[path] = self._stat(self._full(path)).st_ino

    def mark(self, word: str, n: int) -> None:
        with self._lock:
            self.events.append(Mark(word, n))

    def put(self, key: str, made: Object | None) -> None:
        with self._lock:
            self.events.append(PutBegun(key, made))

    def landed(self, key: str, made: Object | None) -> None:
        with self._lock:
            self.events.append(Landed(key, made))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[list[Event]]:
        """All events; nothing more can happen meanwhile."""
        with self._lock:
            self._notice()
            yield self.events

    # -- names --------------------------------------------------------------------------------

    def _new_number(self) -> int:
        self._next += 1
        return self._next - 1

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _path(self, path: Any) -> str | None:
        """Relative to the root; None for what is elsewhere or not recorded: pipes are nothing after
        a power cut."""
        if isinstance(path, int):
            return None
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(self._root + os.sep) or full.endswith(("-shm", ".fifo")):
            return "" if full == self._root else None
        return full[len(self._root) + 1 :]

    def _status(self, path: str) -> Status:
        return Status.of(self._identities.translate(self._stat(self._full(path))))

    def _notice(self) -> None:
        """What SQLite's own code made or removed without a word."""
        for path in (DATABASE, f"{DATABASE}-wal"):
            try:
                inode = self._stat(self._full(path)).st_ino
            except FileNotFoundError:
                inode = None
            if path in self._names and inode != self._inodes[path]:
                self._removed(path)
            if inode is not None and path not in self._names:
                self._appeared(path, self._new_number())

    def _appeared(self, path: str, number: int) -> None:
        self._names[path] = number
        self._inodes[path] = self._stat(self._full(path)).st_ino
        self.events.append(SetName(path, number, self._status(path)))

    def _removed(self, path: str) -> None:
        del self._names[path]
        self.events.append(SetName(path, None))

    # -- module os ----------------------------------------------------------------------------

    def install(self) -> None:
        """From here on everything is recorded."""
        self._install_os()
        self._install_sqlite()

    def _install_os(self) -> None:
        def patch(name: str, wrapped: Callable[..., Any]) -> None:
            original = getattr(os, name)

            def patched(*args: Any, **keywords: Any) -> Any:
                with self._lock:
                    return wrapped(original, *args, **keywords)

            setattr(os, name, patched)

        patch("open", self._os_open)
        patch("close", self._os_close)
        patch("write", lambda call, fd, data: self._os_write(fd, None, [data], call(fd, data)))
        patch("writev", lambda call, fd, parts: self._os_write(fd, None, parts, call(fd, parts)))
        patch(
            "pwrite",
            lambda call, fd, data, offset: self._os_write(
                fd, offset, [data], call(fd, data, offset)
            ),
        )
        patch(
            "pwritev",
            lambda call, fd, parts, offset: self._os_write(
                fd, offset, parts, call(fd, parts, offset)
            ),
        )
        patch("fsync", lambda call, fd: self._os_sync(call, fd, True))
        patch("fdatasync", lambda call, fd: self._os_sync(call, fd, False))
        patch("ftruncate", self._os_truncate)
        patch("posix_fallocate", self._os_allocate)
        patch("rename", self._os_rename)
        patch("replace", self._os_rename)
        patch("link", self._os_link)
        patch("unlink", self._os_unlink)
        patch("remove", self._os_unlink)
        patch("mkdir", self._os_mkdir)
        patch("utime", self._os_utime)

    def _os_open(
        self, call: Callable[..., int], path: Any, flags: int, *args: Any, **kw: Any
    ) -> int:
        self._notice()
        fd = call(path, flags, *args)
        name = self._path(path)
        if name is None:
            return fd
        if name in self._directories:
            self._open[fd] = name
            return fd
        if name not in self._names:
            self._appeared(name, self._new_number())
        self._open[fd] = self._names[name]
        if flags & os.O_TRUNC:
            self.events.append(Truncate(self._names[name], 0, self._status(name)))
        return fd

    def _os_close(self, call: Callable[..., None], fd: int) -> None:
        self._open.pop(fd, None)
        call(fd)

    def _file(self, fd: int) -> tuple[int, Status] | None:
        number = self._open.get(fd)
        if not isinstance(number, int):
            return None
        self._notice()
        return number, Status.of(self._identities.translate(self._fstat(fd)))

    def _os_write(self, fd: int, offset: int | None, parts: Sequence[Any], written: int) -> int:
        found = self._file(fd)
        if found is not None:
            data = b"".join(bytes(part) for part in parts)[:written]
            if offset is None:
                offset = os.lseek(fd, 0, os.SEEK_CUR) - written
            self.events.append(Write(found[0], offset, data, found[1]))
        return written

    def _os_sync(self, call: Callable[..., None], fd: int, whole: bool) -> None:
        call(fd)
        what = self._open.get(fd)
        if isinstance(what, str):
            self._notice()
            self.events.append(SyncDirectory(what))
        elif (found := self._file(fd)) is not None:
            self.events.append(Sync(found[0], whole, found[1]))

    def _os_truncate(self, call: Callable[..., None], fd: int, size: int) -> None:
        call(fd, size)
        if (found := self._file(fd)) is not None:
            self.events.append(Truncate(found[0], size, found[1]))

    def _os_allocate(self, call: Callable[..., None], fd: int, offset: int, length: int) -> None:
        call(fd, offset, length)
        if (found := self._file(fd)) is not None:
            self.events.append(Allocate(found[0], offset + length, found[1]))

    def _os_rename(self, call: Callable[..., None], source: Any, target: Any) -> None:
        self._notice()
        call(source, target)
        old, new = self._path(source), self._path(target)
        if old is None and new is None:
            return
        assert old is not None
        assert new is not None
        self._names[new] = self._names.pop(old)
        self._inodes[new] = self._inodes.pop(old)
        self.events.append(Rename(old, new, self._status(new)))

    def _os_link(
        self, call: Callable[..., None], source: Any, target: Any, **keywords: Any
    ) -> None:
        self._notice()
        call(source, target)
        old, new = self._path(source), self._path(target)
        if old is not None and new is not None:
            self._appeared(new, self._names[old])

    def _os_unlink(self, call: Callable[..., None], path: Any, **keywords: Any) -> None:
        assert keywords.get("dir_fd") is None
        self._notice()
        call(path)
        name = self._path(path)
        if name is not None:
            self._removed(name)

    def _os_mkdir(self, call: Callable[..., None], path: Any, *args: Any, **keywords: Any) -> None:
        call(path, *args, **keywords)
        name = self._path(path)
        if name:
            self._directories.add(name)
            self.events.append(MakeDirectory(name))

    def _os_utime(self, call: Callable[..., None], path: Any, *args: Any, **keywords: Any) -> None:
        call(path, *args, **keywords)
        if isinstance(path, int) and (found := self._file(path)) is not None:
            self.events.append(Touch(found[0], found[1]))

    # -- SQLite -------------------------------------------------------------------------------

    def _install_sqlite(self) -> None:
        recorder = self

        class Recorded(apsw.VFSFile):  # type: ignore[misc]
            """A file that is recorded and nothing else."""

            def __init__(self, base: str, name: Any, flags: list[int]) -> None:
                super().__init__(base, name, flags)
                recorder.opened(self, name)

            def xWrite(self, data: bytes, offset: int) -> None:
                recorder.sqlite_write(apsw.VFSFile.xWrite, self, data, offset)

            def xTruncate(self, size: int) -> None:
                recorder.sqlite_truncate(apsw.VFSFile.xTruncate, self, size)

            def xSync(self, flags: int) -> None:
                recorder.sqlite_sync(apsw.VFSFile.xSync, self, flags)

        class Other(apsw.VFS):  # type: ignore[misc]
            """The operating system's VFS, recorded."""

            def __init__(self) -> None:
                super().__init__(_OTHER, "unix")

            def xOpen(self, name: Any, flags: list[int]) -> Any:
                kind = apsw.VFSFile if name is None else Recorded
                return kind("unix", name, flags)

            def xDelete(self, name: str, sync_directory: bool) -> None:
                super().xDelete(name, sync_directory)
                recorder.deleted(name, sync_directory)

        self.other = Other()
        kinds = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL
        vfs = replicating.ReplicatingVFS
        open_, delete = vfs.xOpen, vfs.xDelete

        def x_open(self: Any, name: Any, flags: list[int]) -> Any:
            if name is not None and flags[0] & kinds:
                kind = apsw.VFSFile if name is None else Recorded
                return kind("unix", name, flags)
            file = open_(self, name, flags)
            recorder.opened(file, name)
            return file

        def x_delete(self: Any, name: str, sync_directory: bool) -> None:
            delete(self, name, sync_directory)
            recorder.deleted(name, sync_directory)

        vfs.xOpen, vfs.xDelete = x_open, x_delete  # type: ignore[method-assign]
        for name, wrapped in (
            ("_write", self.sqlite_write),
            ("_truncate", self.sqlite_truncate),
            ("_sync", self.sqlite_sync),
        ):
            setattr(files, name, _bound(wrapped, getattr(files, name)))
        files.MainFile.xTruncate = _bound(  # type: ignore[attr-defined]
            self.sqlite_truncate, apsw.VFSFile.xTruncate
        )

    def opened(self, file: Any, name: Any) -> None:
        """SQLite has opened a file."""
        if name is None:
            return
        with self._lock:
            self._notice()
            path = self._path(name if isinstance(name, str) else name.filename())
            if not path:
                return
            if path not in self._names:
                self._appeared(path, self._new_number())
            file.recorded = (self._names[path], path)
            # SQLite syncs the directory with the first sync of such a file.
            file.syncs_directory = path.endswith(("-wal", "-journal"))

    def deleted(self, name: str, sync_directory: bool) -> None:
        """SQLite has deleted a file."""
        with self._lock:
            self._notice()
            path = self._path(name)
            if path in self._names and not os.path.lexists(name):
                self._removed(path)
            if sync_directory:
                self.events.append(SyncDirectory(""))

    def sqlite_write(self, call: Callable[..., None], file: Any, data: bytes, offset: int) -> None:
        with self._lock:
            self._notice()
            call(file, data, offset)
            number, path = file.recorded
            self.events.append(Write(number, offset, bytes(data), self._status(path)))

    def sqlite_truncate(self, call: Callable[..., None], file: Any, size: int) -> None:
        with self._lock:
            self._notice()
            call(file, size)
            number, path = file.recorded
            self.events.append(Truncate(number, size, self._status(path)))

    def sqlite_sync(self, call: Callable[..., None], file: Any, flags: int) -> None:
        with self._lock:
            self._notice()
            call(file, flags)
            number, path = file.recorded
            self.events.append(Sync(number, False, self._status(path)))
            if file.syncs_directory:
                file.syncs_directory = False
                self.events.append(SyncDirectory(os.path.dirname(path)))


def _bound(wrapped: Callable[..., None], call: Callable[..., None]) -> Callable[..., None]:
    def patched(file: Any, *args: Any) -> None:
        wrapped(call, file, *args)

    return patched


class _Child:
    """The program of the child process.

    Its steps, each a word, some with an argument behind a colon:

    ======================  ===================================================================
    commit:N                N transactions of the history (1 without it)
    durable                 one that waits for the replica
    sync                    wait for the replica
    attempt                 the same, for a moment
    checkpoint:MODE         by this connection
    other:MODE              by a program without the VFS
    foreign                 a transaction of the history by such a program
    hold, release           a reader keeps its mark, gives it up
    watch, leave            a program without the VFS has it open, and keeps the WAL when this one
                            closes
    spill                   a transaction that writes to the WAL early, is synced around, and ends
                            in a rollback
    ghosts                  a transaction that is rolled back leaves many frames in the WAL
    tight                   from now on transactions write to the WAL early
    vacuum                  VACUUM
    touch                   a commit that is no part of the history, and changes no size
    away, back              the store fails (each engine tries once), works
    full, room              the disk takes no more records, takes them again
    lose:N                  the answers to the next N puts get lost
    slow                    from now on every other put takes its time, so that later ones overtake
    reopen                  close and connect
    open                    connect
    close                   close
    ======================  ===================================================================
    """

    def __init__(self, script: Script, recorder: _Recorder, store: MemoryStore, disk: Path) -> None:
        self.script = script
        self.recorder = recorder
        self.store = store
        self.root = disk
        self.path = disk / DATABASE
        self.history = script.history()
        self.reader: Any = None
        self.cache_size = -2000
        self.n = 0

    def run(self) -> None:
        self.connection = self.connect()
        self.n = self.history.length(self.connection)
        self.recorder.mark("committed", self.n)
        for step in self.script.steps.split():
            word, _, argument = step.partition(":")
            getattr(self, word)(*([argument] if argument else []))

    def connect(self, **more: Any) -> Any:
        settings = {"min_checkpoint_page_count": 1_000_000, **self.script.keywords(self.root)}
        connection = walship.connect(self.path, **{**settings, **more})
        connection.execute(f"PRAGMA synchronous = {self.script.synchronous}")
        connection.execute(f"PRAGMA cache_size = {self.cache_size}")
        return connection

    def commit(self, times: str = "1") -> None:
        for _ in range(int(times)):
            self.history.apply(self.connection, self.n)
            self.n += 1
            self.recorder.mark("committed", self.n)

    def durable(self) -> None:
        waiting = self.connect(durability="replica")
        self.history.apply(waiting, self.n)
        self.n += 1
        self.recorder.mark("committed", self.n)
        self.recorder.mark("synced", self.n)
        waiting.close(True)

    def sync(self) -> None:
        walship.replication(self.path).sync(30)
        self.recorder.mark("synced", self.n)

    def attempt(self) -> None:
        with contextlib.suppress(walship.NotYetReplicated):
            walship.replication(self.path).sync(0.1)
            self.recorder.mark("synced", self.n)

    def checkpoint(self, mode: str) -> None:
        self._checkpoint(self.connection, mode)

    def _outside(self) -> Any:
        other = apsw.Connection(str(self.path), vfs=_OTHER)
        other.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        other.execute(f"PRAGMA synchronous = {self.script.synchronous}")
        other.set_busy_timeout(5000)
        return other

    def other(self, mode: str) -> None:
        other = self._outside()
        self._checkpoint(other, mode)
        other.close(True)

    def foreign(self) -> None:
        other = self._outside()
        self.history.apply(other, self.n)
        self.n += 1
        self.recorder.mark("committed", self.n)
        other.close(True)

    def _checkpoint(self, connection: Any, mode: str) -> None:
        busy, in_wal, done = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if not busy and in_wal == done:
            self.recorder.mark("checkpointed", self.n)

    def hold(self) -> None:
        self.reader = self.connect()
        self.reader.execute("BEGIN")
        self.reader.execute("SELECT count(*) FROM cells").fetchall()

    def watch(self) -> None:
        self.reader = self._outside()
        self.reader.execute("SELECT count(*) FROM cells").fetchall()

    def leave(self) -> None:
        self.connection.close(True)

    def release(self) -> None:
        self.reader.close(True)

    def spill(self) -> None:
        self.sync()  # a full copy, if one is due, could not be made during a transaction
        self.connection.execute("PRAGMA cache_size = 2")
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.execute("UPDATE cells SET pad = randomblob(1500)")
        self.connection.execute("UPDATE cells SET pad = randomblob(1600)")
        self.sync()
        self.connection.execute("ROLLBACK")
        self.connection.execute(f"PRAGMA cache_size = {self.cache_size}")

    def ghosts(self) -> None:
        self.connection.execute("PRAGMA cache_size = 10")
        self.connection.execute("BEGIN IMMEDIATE")
        for row in range(30):
            self.connection.execute("INSERT INTO ballast VALUES (?, randomblob(3000))", (row,))
        self.connection.execute("ROLLBACK")
        self.connection.execute(f"PRAGMA cache_size = {self.cache_size}")

    def tight(self) -> None:
        self.cache_size = 2
        self.connection.execute("PRAGMA cache_size = 2")

    def vacuum(self) -> None:
        self.connection.execute("VACUUM")

    def touch(self) -> None:
        self.connection.execute("REPLACE INTO ballast VALUES (1000, randomblob(100))")

    def away(self) -> None:
        self.store.away = True
        uploader.BACKOFF_FIRST_S = _LIMIT_S  # type: ignore[misc]

    def back(self) -> None:
        self.store.away = False
        uploader.BACKOFF_FIRST_S = _BACKOFF_S  # type: ignore[misc]
        found = registry.engine(canonical(self.path))
        assert found is not None
        found.uploader.retry_now()

    def full(self) -> None:
        def failing(*_: Any, **__: Any) -> None:
            raise SpoolError("no space left on the disk")

        Spool._append = failing  # type: ignore[method-assign]

    def room(self) -> None:
        Spool._append = _append  # type: ignore[method-assign]

    def lose(self, times: str) -> None:
        self.store.lost = int(times)

    def slow(self) -> None:
        self.store.latency = lambda key: 0.02 if key[-5] in "02468ace" else 0.0

    def reopen(self) -> None:
        self.close()
        self.open()

    def open(self) -> None:
        self.connection = self.connect()

    def close(self) -> None:
        self.connection.close(True)
        self.recorder.mark("checkpointed", self.n)


def _keep_wal_unsynced() -> None:
    WalReader.sync = lambda self: None  # type: ignore[method-assign]


def _keep_journal_unsynced() -> None:
    append = Spool._append

    def unsynced(self: Any, kind: Any, meta: Any, payload: Any, durable: bool) -> None:
        append(self, kind, meta, payload, False)

    Spool._append = unsynced  # type: ignore[method-assign]


def _keep_directories_unsynced() -> None:
    Files.sync_directory = lambda self, path: None  # type: ignore[method-assign]
    local.fsync_directory = lambda directory: None


def _acknowledge_early() -> None:
    create = Sender._create
    waiting: list[tuple[Any, ...]] = []

    def late(self: Any, sealed: Any, body: Any) -> float:
        if waiting:
            create(self, *waiting.pop())
        waiting.append((sealed, body.read_bytes() if isinstance(body, Path) else body))
        return float("-inf")

    Sender._create = late  # type: ignore[method-assign]


def _ship_unpublished() -> None:
    published, collect = SqlitePort.published, capture.collect
    size = 0

    def beyond(self: Any) -> Published | None:
        found = published(self)
        wal = WalReader(self.path + "-wal", Files())
        header = wal.header()
        if found is None or not found.mx_frame or header is None:
            return found
        last = found.mx_frame
        while (frame := wal.frame(last + 1, header.page_size)) and frame.salts == header.salts:
            last += 1
        wal.close()
        return Published(last, found.n_backfill)

    def with_size(*args: Any) -> Any:
        nonlocal size
        batch = collect(*args)
        batch.commit = size = batch.commit or size
        batch.keys = [key for key in batch.keys if key >> 32 <= size]
        return batch

    SqlitePort.published = beyond  # type: ignore[method-assign]
    capture.collect = with_size


#: What can be broken on purpose.
MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "the WAL is not synced before sealing": _keep_wal_unsynced,
    "the journal is not synced": _keep_journal_unsynced,
    "directories are not synced": _keep_directories_unsynced,
    "acknowledged before the put": _acknowledge_early,
    "shipped past mxFrame": _ship_unpublished,
}


def _main(job: Path) -> None:
    script, objects, identities = pickle.loads(job.read_bytes())
    uploader.BACKOFF_FIRST_S = _BACKOFF_S  # type: ignore[misc]
    spool.INLINE_BYTES = script.sealed_inline_bytes
    spool._GROWTH_BYTES = script.journal_growth_bytes
    spool._REWRITE_BYTES = script.journal_rewrite_bytes
    disk = job.parent / "disk"
    recorder = _Recorder(disk, identities)
    simulate(identities)
    store = MemoryStore(objects)
    store.before, store.after = recorder.put, recorder.landed
    if not script.directory:
        host.open_store = lambda *_: store
    recorder.install()
    if script.mutant is not None:
        MUTANTS[script.mutant]()
    child = _Child(script, recorder, store, disk)  # whose connection must not be closed by Python
    child.run()
    with recorder.frozen() as events:
        (job.parent / "record").write_bytes(pickle.dumps(events))
        os._exit(0)


if __name__ == "__main__":
    # What is pickled belongs to the module, not to this program.
    from support import recorder as module

    module._main(Path(sys.argv[1]))
