"""The output of a restore: complete or not at all, and never at the cost of what was there."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.replicas import (
    GOLDEN,
    golden_copy,
    local_store,
    make_page,
    manifest,
    sha256,
    write_pages,
    write_segment,
)
from walship.replica.clock import SystemClock
from walship.replica.errors import (
    FormatError,
    IntegrityError,
    NoBackupError,
    ObjectNotFound,
    OutputExistsError,
    ReplicaError,
    RestoreError,
    StoreUnavailable,
)
from walship.replica.restore import RestoreResult, restore
from walship.replica.store.base import ObjectInfo
from walship.replica.store.local import LocalStore

CLOCK = SystemClock()
SIDECARS = ("-wal", "-shm", "-journal")


class BrokenStore(LocalStore):
    """Lists, but every read fails as without a network."""

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        raise StoreUnavailable(f"cannot read {key}: no route to host")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database in use: its newest commit is in the WAL only."""
    path = tmp_path / "live" / "app.db"
    path.parent.mkdir()
    # Both files are copied while a connection is open: its close would empty the WAL.
    source = tmp_path / "source.db"
    with closing(sqlite3.connect(source)) as connection:
        connection.execute("pragma journal_mode=wal")
        connection.execute("create table t(x)")
        connection.execute("insert into t values (42)")
        connection.commit()
        for suffix in ("", "-wal"):
            Path(f"{path}{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
    Path(f"{path}-shm").write_bytes(b"shm")
    Path(f"{path}-journal").write_bytes(b"")
    return path


def snapshot_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_ino)
        for path in directory.iterdir()
        if path.is_file()
    }


def corrupt_replica(directory: Path) -> LocalStore:
    return local_store(GOLDEN / "x-corrupt" / "01-bitflip-page-data" / "replica")


def empty_replica(directory: Path) -> LocalStore:
    return local_store(directory / "nothing-here")


def unreachable_replica(directory: Path) -> LocalStore:
    return BrokenStore(GOLDEN / "b-512" / "replica", CLOCK)


def unsound_replica(directory: Path) -> LocalStore:
    """Valid segments of a database that is not one."""
    write_pages(directory / "unsound", 0, 1, 1, 4, range(1, 5))
    return local_store(directory / "unsound")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (corrupt_replica, FormatError),
        (empty_replica, NoBackupError),
        (unreachable_replica, StoreUnavailable),
        (unsound_replica, IntegrityError),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_the_existing_database_alone(
    make: object, error: type[ReplicaError], overwrite: bool, database: Path, tmp_path: Path
) -> None:
    """Whatever fails: database, -wal, -shm and -journal are the same files with the same bytes."""
    assert callable(make)
    store = make(tmp_path)
    before = snapshot_of(database.parent)
    with pytest.raises(error if overwrite else OutputExistsError) as caught:
        restore(store, database, clock=CLOCK, overwrite=overwrite, integrity_check="quick")
    assert "\n" not in str(caught.value)
    assert snapshot_of(database.parent) == before


def test_overwrite_replaces_database_and_sidecars(database: Path) -> None:
    """After a replacement neither WAL nor journal of the old database is left to be replayed."""
    os.chmod(database, 0o640)
    facts = manifest("b-512")["latest"]
    restore(local_store(GOLDEN / "b-512" / "replica"), database, clock=CLOCK, overwrite=True)
    assert [path.name for path in database.parent.iterdir()] == ["app.db"]
    assert sha256(database) == facts["sha256"]
    assert database.stat().st_mode & 0o777 == 0o640


def test_sidecars_go_before_the_name_changes(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No crash can pair the old WAL with the new database: complete, synced, sidecars gone, rename.

    Every step that touches the directory is recorded with what is in it then.
    """
    events: list[tuple[str, tuple[str, ...]]] = []
    real = {name: getattr(os, name) for name in ("rename", "unlink", "fsync")}

    def present() -> tuple[str, ...]:
        return tuple(suffix for suffix in ("", *SIDECARS) if os.path.lexists(f"{database}{suffix}"))

    def watch(name: str) -> None:
        def call(*args: object, **kwargs: object) -> object:
            events.append((name, present()))
            return real[name](*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in real:
        watch(name)
    restore(local_store(GOLDEN / "b-512" / "replica"), database, clock=CLOCK, overwrite=True)
    monkeypatch.undo()
    kinds = [kind for kind, _ in events]
    rename = kinds.index("rename")
    assert events[rename][1] == ("",)
    first_unlink = kinds.index("unlink")
    assert "fsync" in kinds[:first_unlink], "the new file is synced before anything is removed"
    assert "fsync" in kinds[first_unlink:rename], "the removals are durable before the rename"
    assert "fsync" in kinds[rename:], "the rename is made durable"


@pytest.mark.parametrize("suffix", SIDECARS)
def test_lonely_sidecar_is_refused(suffix: str, tmp_path: Path) -> None:
    """A -wal, -shm or -journal beside the output would be taken for a part of it."""
    output = tmp_path / "out.db"
    Path(f"{output}{suffix}").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match=f"out.db{suffix} exists"):
        restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK)
    assert [path.name for path in tmp_path.iterdir()] == [f"out.db{suffix}"]


def test_empty_output_may_be_replaced(tmp_path: Path) -> None:
    """An empty file is no database: containers create such files as mount points."""
    output = tmp_path / "out.db"
    output.touch()
    restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK)
    assert sha256(output) == manifest("b-512")["latest"]["sha256"]


def test_parents_are_created(tmp_path: Path) -> None:
    """Missing directories above the output are made."""
    output = tmp_path / "a" / "b" / "out.db"
    restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK)
    assert output.exists()


def test_output_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    """A directory as output gets one clear line."""
    with pytest.raises(RestoreError, match="is a directory"):
        restore(local_store(GOLDEN / "b-512" / "replica"), tmp_path, clock=CLOCK)


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Two restores of one file, or an application that was faster: nothing is replaced."""
    output = tmp_path / "out.db"

    class Racing(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            output.write_bytes(b"somebody else's")
            return super().get(key, start, length)

    with pytest.raises(OutputExistsError):
        restore(Racing(GOLDEN / "b-512" / "replica", CLOCK), output, clock=CLOCK)
    assert output.read_bytes() == b"somebody else's"
    assert [path.name for path in tmp_path.iterdir()] == ["out.db"]


def test_output_is_never_seen_incomplete(tmp_path: Path) -> None:
    """While data is fetched the output has no name; then it has it with all its bytes."""
    output = tmp_path / "out" / "out.db"
    seen: list[list[str]] = []

    class Watching(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            seen.append([path.name for path in output.parent.iterdir()])
            return super().get(key, start, length)

    restore(Watching(GOLDEN / "b-65536" / "replica", CLOCK), output, clock=CLOCK)
    assert seen
    for names in seen:
        assert len(names) == 1
        assert names[0].startswith("out.db.")
        assert names[0].endswith(".tmp")
    assert [path.name for path in output.parent.iterdir()] == ["out.db"]


def test_interrupt_removes_the_temporary_file(tmp_path: Path) -> None:
    """Ctrl-C leaves nothing behind."""
    output = tmp_path / "out" / "out.db"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK, progress=interrupt)
    assert list(output.parent.iterdir()) == []


def test_leftovers_of_a_killed_restore_are_removed(tmp_path: Path) -> None:
    """A restore that was killed cannot clean up; the next one to the same output does."""
    output = tmp_path / "out" / "out.db"
    code = f"""
import os, signal
from walship.replica.clock import SystemClock
from walship.replica.restore import restore
from walship.replica.store.local import LocalStore
from pathlib import Path
restore(LocalStore(Path({str(GOLDEN / "b-512" / "replica")!r}), SystemClock()), {str(output)!r},
    clock=SystemClock(), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(output.parent.iterdir())) == 1
    other = output.parent / "other.db.12345678.restore.tmp"
    other.write_bytes(b"of another output")
    restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK)
    assert {path.name for path in output.parent.iterdir()} == {"out.db", other.name}


def test_restores_at_once_do_not_remove_each_others_files(tmp_path: Path) -> None:
    """Cleaning up spares the temporary file of a restore that is at work; one of them wins."""
    output = tmp_path / "out.db"
    outcomes: list[object] = []
    barrier = threading.Barrier(4)

    class Meeting(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            if start == 0:
                barrier.wait(30)
            return super().get(key, start, length)

    def run() -> None:
        try:
            outcomes.append(
                restore(Meeting(GOLDEN / "b-512" / "replica", CLOCK), output, clock=CLOCK, txid=1)
            )
        except ReplicaError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(isinstance(each, RestoreResult) for each in outcomes) == 1
    assert sum(isinstance(each, OutputExistsError) for each in outcomes) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.db"]


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file may grow beyond 8 KiB, as on a disk that is full."""
    limit = 8192
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("name", ["a-4096-levels", "f-v03-generations"])
def test_full_disk_is_one_clear_error(name: str, tmp_path: Path, file_size_limit: int) -> None:
    """Without room the error says so, and the database that was there is untouched."""
    output = tmp_path / "app.db"
    output.write_bytes(b"old")
    with pytest.raises(RestoreError, match="no room for it on the file system") as caught:
        restore(local_store(GOLDEN / name / "replica"), output, clock=CLOCK, overwrite=True)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["app.db"]


def test_error_of_the_last_sync_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails only when data is synced fails the restore."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("walship.replica.restore.fsync_file", fail)
    output = tmp_path / "out.db"
    with pytest.raises(RestoreError, match="cannot write"):
        restore(local_store(GOLDEN / "b-512" / "replica"), output, clock=CLOCK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_integrity_check_comes_before_the_name(mode: str, tmp_path: Path) -> None:
    """A database that SQLite finds damaged never gets its name; what SQLite said is told."""
    root = golden_copy("b-512", tmp_path)
    for level in ("1", "2", "9"):
        for path in (root / "ltx" / level).iterdir():
            path.unlink()
    # The next segment overwrites a page in the middle with rubbish; the segment itself is valid.
    good = restore(local_store(root), tmp_path / "good.db", clock=CLOCK)
    write_segment(root, 0, 6, 6, good.commit, {5: b"\x0d" * 512})
    output = tmp_path / "out" / "out.db"
    with pytest.raises(IntegrityError) as caught:
        restore(
            local_store(root),
            output,
            clock=CLOCK,
            integrity_check="quick" if mode == "quick" else "full",
        )
    assert caught.value.findings
    assert caught.value.findings[0] in str(caught.value)
    assert list(output.parent.iterdir()) == []
    assert restore(local_store(root), output, clock=CLOCK).txid == 6


def test_object_that_retention_removed_meanwhile(tmp_path: Path) -> None:
    """A segment that is gone when it is read leads to a new plan from a new listing."""
    root = tmp_path / "replica"
    pages = range(1, 9)
    first = write_pages(root, 9, 1, 1, 8, pages)
    write_pages(root, 0, 2, 2, 8, [3])

    class Retention(LocalStore):
        removed = False

        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            if not self.removed:
                self.removed = True
                write_pages(root, 9, 1, 2, 8, pages)
                first.unlink()
            return super().get(key, start, length)

    output = tmp_path / "out.db"
    assert restore(Retention(root, CLOCK), output, clock=CLOCK, parallelism=1).txid == 2
    assert output.read_bytes() == b"".join(make_page(pgno, 2, 512) for pgno in pages)


def test_object_that_is_listed_but_never_there(tmp_path: Path) -> None:
    """A listing that keeps naming what cannot be read ends in an error, not in a loop."""
    root = tmp_path / "replica"
    write_pages(root, 0, 1, 1, 3, range(1, 4))

    reads: list[str] = []

    class Ghost(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            reads.append(key)
            raise ObjectNotFound(f"no object {key}")

    with pytest.raises(RestoreError, match="listed but cannot be read"):
        restore(Ghost(root, CLOCK), tmp_path / "out" / "out.db", clock=CLOCK)
    assert list((tmp_path / "out").iterdir()) == []
    assert len(reads) == 1, "the same plan is not tried again"


def test_segment_shorter_than_listed(tmp_path: Path) -> None:
    """A short answer is damage, not an end of file."""
    root = tmp_path / "replica"
    write_pages(root, 0, 1, 1, 3, range(1, 4))

    class Short(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            return super().get(key, start, length)[:-1]

        def head(self, key: str) -> ObjectInfo:
            raise AssertionError("not needed")

    with pytest.raises(FormatError, match="shorter than the listing says"):
        restore(Short(root, CLOCK), tmp_path / "out.db", clock=CLOCK)
