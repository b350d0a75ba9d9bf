"""What only a directory store can do wrong: unfinished files, odd names, full disks, crashes."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.clock import FakeClock
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from walship.replica.store import local
from walship.replica.store.local import LocalStore, write_durably


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store in a directory that does not exist yet."""
    return LocalStore(tmp_path / "deep" / "root", FakeClock())


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_layout(store: LocalStore, tmp_path: Path) -> None:
    """Levels are decimal directories below ltx/, files and directories are private."""
    assert store.level_prefix(9) == "ltx/9/"
    store.put(store.level_prefix(0) + "a.ltx", b"x", timestamp_ms=1_736_000_000_123)
    file = tmp_path / "deep/root/ltx/0/a.ltx"
    assert file.stat().st_mtime_ns == 1_736_000_000_123 * 1_000_000
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(file.parent.stat().st_mode) & 0o077 == 0
    assert store.url == f"file://{tmp_path}/deep/root"


@pytest.mark.parametrize(
    "key",
    ["../x", "a/../../x", "/etc/x", "a//b", "", "a/", ".", "./a", "a/./b", "a\0b", "x.tmp"],
)
def test_keys_that_are_none(store: LocalStore, tmp_path: Path, key: str) -> None:
    """A key that would leave the directory, or could not be listed, is refused everywhere."""
    for call in (
        lambda: store.put(key, b""),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete([key]),
    ):
        with pytest.raises(StoreError, match="not a key"):
            call()
    assert files(tmp_path) == []


def test_a_prefix_outside_is_refused(store: LocalStore) -> None:
    """A listing cannot leave the directory either."""
    with pytest.raises(StoreError, match="not a key"):
        list(store.list("../"))


def test_unfinished_files_are_not_listed(store: LocalStore, tmp_path: Path) -> None:
    """Litestream's and our own temporary files are no objects."""
    store.put("ltx/0/a.ltx", b"x")
    (tmp_path / "deep/root/ltx/0/b.ltx.tmp").write_bytes(b"half")
    assert [info.key for info in store.list("")] == ["ltx/0/a.ltx"]


def test_key_order_across_folders(store: LocalStore) -> None:
    """Key order is that of the whole key, also where folder names begin alike."""
    keys = ["0000-/y", "0000/a", "0000/b", "00000", "0000a/x"]
    for key in reversed(keys):
        store.put(key, b"")
    assert [info.key for info in store.list("")] == sorted(keys)
    assert [info.key for info in store.list("", "0000/a")] == sorted(keys)[2:]


def test_a_directory_is_no_object(store: LocalStore) -> None:
    """The name of a directory is not found, cannot be replaced, and deleting it does nothing."""
    store.put("a/b", b"x")
    for call in (lambda: store.get("a"), lambda: store.head("a"), lambda: store.get("a/b/c")):
        with pytest.raises(ObjectNotFound):
            call()
    with pytest.raises(StoreError):
        store.put("a", b"")
    store.delete(["a", "a/b/c"])
    assert store.get("a/b") == b"x"


def test_leftovers_of_a_crash_are_removed_a_day_later(tmp_path: Path) -> None:
    """A temporary file is removed by a later process once it is a day old, not before."""
    folder = tmp_path / "ltx" / "0"
    folder.mkdir(parents=True)
    (folder / "x.ltx.1-0.tmp").write_bytes(b"half")
    now_ms = int((folder / "x.ltx.1-0.tmp").stat().st_ctime * 1000)
    LocalStore(tmp_path, FakeClock(now_ms + 23 * 3600_000)).put("ltx/0/a", b"")
    assert files(folder) == ["a", "x.ltx.1-0.tmp"]
    LocalStore(tmp_path, FakeClock(now_ms + 25 * 3600_000)).put("ltx/0/b", b"")
    assert files(folder) == ["a", "b"]


def test_order_of_durable_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is on disk before its name, and the name before the call returns; so are parents."""
    steps: list[str] = []

    def name_of(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path))

    real_fsync, real_replace, real_mkdir = local.fsync_file, Path.replace, Path.mkdir

    def fsync(fd: int) -> None:
        name = name_of(fd)
        steps.append(f"fsync {'TMP' if name.endswith('.tmp') else name or '/'}")
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    def mkdir(self: Path, mode: int = 0o777) -> None:
        steps.append(f"mkdir {str(self).removeprefix(str(tmp_path))}")
        real_mkdir(self, mode)

    monkeypatch.setattr(local, "fsync_file", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    write_durably(tmp_path / "a" / "b" / "file", b"x")
    assert steps == [
        "mkdir /a",
        "fsync /",
        "mkdir /a/b",
        "fsync /a",
        "fsync TMP",
        "rename",
        "fsync /a/b",
    ]


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    """When content cannot be made durable the old file stays and no temporary one remains."""
    target = tmp_path / "file"
    if not if_absent:
        target.write_bytes(b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "on purpose")

    monkeypatch.setattr(local, "fsync_file", fail)
    with pytest.raises(OSError, match="on purpose") as caught:
        write_durably(target, b"new", if_absent=if_absent)
    assert not getattr(caught.value, "ambiguous", False)
    assert files(tmp_path) == ([] if if_absent else ["file"])
    if not if_absent:
        assert target.read_bytes() == b"old"


def test_a_failed_directory_fsync_is_ambiguous(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When only the directory could not be made durable, the object may be there: said so."""
    store.put("a", b"1")

    def fail(directory: Path) -> None:
        raise OSError(errno.EIO, "on purpose")

    monkeypatch.setattr(local, "fsync_directory", fail)
    with pytest.raises(StoreUnavailable) as caught:
        store.put("a", b"2")
    assert caught.value.ambiguous
    with pytest.raises(StoreUnavailable):
        store.delete(["a"])


@pytest.mark.parametrize(
    ("number", "retryable", "says"),
    [
        (errno.ENOSPC, True, "full"),
        (errno.EDQUOT, True, "full"),
        (errno.EIO, True, "cannot write"),
        (errno.EACCES, False, "permissions"),
        (errno.EROFS, False, "permissions"),
        (errno.ENAMETOOLONG, False, "cannot write"),
    ],
)
def test_errors(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, retryable: bool, says: str
) -> None:
    """Errors of the file system become store errors: a full disk is worth another try."""

    def fail(fd: int, body: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local, "_write_body", fail)
    with pytest.raises(StoreError, match=says) as caught:
        store.put("a", b"x")
    assert caught.value.retryable is retryable
    assert caught.value.code == errno.errorcode[number]
    assert not caught.value.ambiguous


def test_a_full_device() -> None:
    """A real full device is reported as such."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space") as caught:
            local._write_body(fd, b"x")
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


def test_no_hard_links(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be created exclusively, the error says what is missing."""
    store.put("a", b"x")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match="hard links"):
        store.put("b", b"x", if_absent=True)
    assert [info.key for info in store.list("")] == ["a"]


def test_a_file_where_a_directory_should_be(store: LocalStore, tmp_path: Path) -> None:
    """A file in the place of a directory is an error, not somebody else's object."""
    (tmp_path / "deep").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        store.put("a", b"x", if_absent=True)
    assert not isinstance(caught.value, PreconditionFailed)
    with pytest.raises(StoreError, match="Not a directory"):
        list(store.list(""))


def test_deleting_goes_on_after_an_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file that cannot be removed is named, and does not keep the others."""
    for key in ("a", "b", "c"):
        store.put(key, b"")
    real: Callable[..., None] = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "b":
            raise OSError(errno.EACCES, "Permission denied")
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(StoreError, match=r"cannot delete .*/b"):
        store.delete(["a", "b", "c"])
    assert [info.key for info in store.list("")] == ["b"]


def test_each_write_has_its_own_tag(store: LocalStore) -> None:
    """Tags differ although content, key and, as far as milliseconds go, time are the same; a tag
    stays as long as its object does."""
    tags = []
    for n in range(200):
        if n % 2:
            store.delete(["a"])
        info = store.put("a", b"same", if_absent=bool(n % 2))
        tags.append(info.etag)
        assert store.head("a").etag == info.etag
        assert [listed.etag for listed in store.list("")] == [info.etag]
        assert store.read("a", unless_etag=info.etag) is None
    assert len(set(tags)) == len(tags)


def test_tags_when_file_numbers_come_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that gets an old file's number and time is another version all the same."""
    real_fstat, real_utime = os.fstat, os.utime
    given = 0

    def utime(fd: int, *, ns: tuple[int, int]) -> None:
        nonlocal given
        given = ns[1]
        real_utime(fd, ns=ns)

    def fstat(fd: int) -> os.stat_result:
        status = list(real_fstat(fd))
        status[stat.ST_INO] = 7
        return os.stat_result(status, {"st_mtime_ns": given or 1_736_000_000_000_000_000})

    monkeypatch.setattr(os, "utime", utime)
    monkeypatch.setattr(os, "fstat", fstat)
    tags = set()
    for _ in range(20):
        given = 0
        tags.add(store.put("a", b"same").etag)
    assert len(tags) == 20


def test_a_put_tells_its_own_tag(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag is that of what was put, also when another writer is faster than the answer."""
    real = local.fsync_directory

    def overtaken(directory: Path) -> None:
        monkeypatch.setattr(local, "fsync_directory", real)
        store.put("a", b"theirs")

    store.put("a", b"old")
    monkeypatch.setattr(local, "fsync_directory", overtaken)
    mine = store.put("a", b"mine").etag
    assert store.get("a") == b"theirs"
    with pytest.raises(PreconditionFailed):
        store.put("a", b"again", if_match=mine)


def test_a_swap_that_is_overtaken(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag is compared again when the new content is on disk, and nothing remains of it."""
    tag = store.put("a", b"old").etag
    real = local._write_body

    def overtaken(fd: int, body: bytes) -> None:
        real(fd, body)
        monkeypatch.setattr(local, "_write_body", real)
        store.put("a", b"theirs", if_match=tag)

    monkeypatch.setattr(local, "_write_body", overtaken)
    with pytest.raises(PreconditionFailed, match="another writer"):
        store.put("a", b"mine", if_match=tag)
    assert store.get("a") == b"theirs"
    assert [info.key for info in store.list("")] == ["a"]


def test_a_lost_swap_leaves_no_trace(store: LocalStore, tmp_path: Path) -> None:
    """A compare-and-swap of nothing does not even make the directory."""
    with pytest.raises(PreconditionFailed):
        store.put("a", b"x", if_match="some-tag")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_file_stays(tmp_path: Path) -> None:
    """The file that swaps lock is no object, and is not taken for a leftover later."""
    store = LocalStore(tmp_path, FakeClock())
    store.put("a", b"2", if_match=store.put("a", b"1").etag)
    lock = tmp_path / ".walship-lock.tmp"
    number = lock.stat().st_ino
    assert [info.key for info in store.list("")] == ["a"]
    later = FakeClock(int(lock.stat().st_ctime * 1000) + 25 * 3600_000)
    LocalStore(tmp_path, later).put("b", b"")
    assert lock.stat().st_ino == number


def test_age_by_the_clock_of_the_file_system(store: LocalStore, tmp_path: Path) -> None:
    """The age of a version does not depend on this host's clock, except where nothing may be
    written; and asking leaves nothing behind."""
    store.put("a", b"x")
    version = store.read("a")
    assert version is not None
    assert 0 <= version.now_ms - version.modified_ms < 3600_000  # the fake clock is years behind
    assert files(tmp_path) == ["deep/root/a"]


def test_age_where_nothing_may_be_written(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading needs no right to write: then the host's clock has to do."""
    store.put("a", b"x")
    real = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    version = store.read("a")
    assert version is not None
    assert version.now_ms == FakeClock().now_ms()


_COUNT = """
import pathlib, sys
from walship.replica.clock import SystemClock
from walship.replica.errors import PreconditionFailed
from walship.replica.store.local import LocalStore

store = LocalStore(pathlib.Path(sys.argv[1]), SystemClock())
for _ in range(int(sys.argv[2])):
    while True:
        version = store.read("counter")
        try:
            store.put("counter", b"%d" % (int(version.body) + 1), if_match=version.etag)
        except PreconditionFailed:
            continue
        break
"""


def test_swaps_of_several_processes(tmp_path: Path) -> None:
    """Processes that count with compare-and-swap lose no step."""
    store = LocalStore(tmp_path, FakeClock())
    store.put("counter", b"0")
    command = [sys.executable, "-c", _COUNT, str(tmp_path), "60"]
    running = [subprocess.Popen(command) for _ in range(4)]
    try:
        assert [process.wait(60) for process in running] == [0] * 4
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert store.get("counter") == b"240"


_FORK = """
import os, sys
from walship.replica.store import local

with local._swap_mutex:
    child = os.fork()
    if child == 0:
        os._exit(0 if local._swap_mutex.acquire(timeout=10) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_swap_after_a_fork() -> None:
    """A child of a process that was in the middle of a swap does not wait for it for ever."""
    assert subprocess.run([sys.executable, "-c", _FORK], timeout=60, check=False).returncode == 0


def test_pieces(tmp_path: Path) -> None:
    """write_durably takes any number of pieces, empty ones too."""
    pieces: list[bytes | bytearray | memoryview] = [
        b"",
        *(b"%d," % n for n in range(3000)),
        memoryview(b"end"),
        bytearray(b"!"),
    ]
    size = write_durably(tmp_path / "x", iter(pieces))
    content = (tmp_path / "x").read_bytes()
    assert content == b"".join(pieces)
    assert size == len(content)
    assert write_durably(tmp_path / "y", []) == 0
    assert (tmp_path / "y").read_bytes() == b""


def test_partial_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may write less than it is given: the rest follows."""
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, pieces: real(fd, [pieces[0][:3]]))
    write_durably(tmp_path / "x", [b"0123456789", b"", b"abcdef", b"z"])
    assert (tmp_path / "x").read_bytes() == b"0123456789abcdefz"


def test_create_only_helper(tmp_path: Path) -> None:
    """The helper refuses to replace when asked to, and leaves nothing beside the file."""
    write_durably(tmp_path / "x", b"1", if_absent=True)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "x", b"2", if_absent=True)
    assert files(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"1"
