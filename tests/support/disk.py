"""A disk that loses power: what a directory may look like then, given the file operations so far.

`Disk` applies recorded operations one by one and keeps apart what is certain (content that was
synced, names in a directory that was synced) from what only the kernel knows.  `Disk.cut` makes an
`Image` of it: all that is certain, and of the rest whatever a power cut may leave:

* the content of a file in sectors of 512 bytes, each as it was before or after any write since the
  last sync; its length likewise, independent of the content;
* a truncation as a whole or not at all;
* each new, removed or changed name, one operation as a whole, but independent of all others and of
  the file's content;
* times of modification, which only a sync of the file's attributes makes certain.

Nothing is assumed of a file system beyond that: no order between files, none between names.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

__all__ = [
    "Allocate",
    "Disk",
    "Identities",
    "Image",
    "Left",
    "MakeDirectory",
    "Operation",
    "Rename",
    "SetName",
    "Status",
    "Stored",
    "Sync",
    "SyncDirectory",
    "Touch",
    "Truncate",
    "Write",
]

SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Status:
    """What tells one file from another, and one state of it from the next."""

    dev: int
    ino: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Status:
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that changes a disk, or makes a change certain.

    Files are numbers, given in the order in which they come up; paths are relative to the root.
    ``status`` is that of the file afterwards.
    """


@dataclass(frozen=True, slots=True)
class Write(Operation):
    file: int
    offset: int
    data: bytes
    status: Status


@dataclass(frozen=True, slots=True)
class Truncate(Operation):
    file: int
    size: int
    status: Status


@dataclass(frozen=True, slots=True)
class Allocate(Operation):
    """The file is at least so long from here on; zeros where nothing was written."""

    file: int
    size: int
    status: Status


@dataclass(frozen=True, slots=True)
class Touch(Operation):
    """Times were set."""

    file: int
    status: Status


@dataclass(frozen=True, slots=True)
class Sync(Operation):
    """Content and length are certain; all attributes too if ``whole``, or if the length changed."""

    file: int
    whole: bool
    status: Status


@dataclass(frozen=True, slots=True)
class SetName(Operation):
    """A name now means this file; None: it is removed."""

    path: str
    file: int | None
    status: Status | None = None


@dataclass(frozen=True, slots=True)
class Rename(Operation):
    source: str
    target: str
    status: Status


@dataclass(frozen=True, slots=True)
class MakeDirectory(Operation):
    path: str


@dataclass(frozen=True, slots=True)
class SyncDirectory(Operation):
    path: str


class Left(Enum):
    """What is left of that which was not synced."""

    NOTHING = "nothing"
    EVERYTHING = "everything"
    NAMES = "the names, no content"
    CONTENT = "the content, no names"
    TORN = "everything, but the last write is torn"
    SOME = "a random part"


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in an image."""

    content: bytes
    status: Status


@dataclass(frozen=True, slots=True)
class Image:
    """The files and directories below a root."""

    files: dict[str, Stored] = field(default_factory=dict)
    directories: tuple[str, ...] = ()

    def digest(self) -> bytes:
        """Equal for equal images."""
        digest = hashlib.blake2b(repr(self.directories).encode())
        for path, stored in sorted(self.files.items()):
            digest.update(f"\0{path}\0{len(stored.content)}\0{stored.status}\0".encode())
            digest.update(stored.content)
        return digest.digest()

    def write_to(self, root: Path) -> Identities:
        """Make the files; whoever asks for their status should ask the result too."""
        identities = Identities()
        root.mkdir(parents=True, exist_ok=True)
        for path in self.directories:
            (root / path).mkdir(mode=0o700)
        for path, stored in self.files.items():
            (root / path).write_bytes(stored.content)
            os.utime(root / path, ns=(stored.status.mtime_ns,) * 2)
            identities.add(os.stat(root / path), stored.status)
        return identities

    @classmethod
    def of(cls, root: Path, identities: Identities | None = None) -> Image:
        """What is below a directory; wal-indexes are left out."""
        files: dict[str, Stored] = {}
        directories: list[str] = []
        for folder, _, names in os.walk(root):
            if folder != str(root):
                directories.append(os.path.relpath(folder, root))
            for name in names:
                if name.endswith("-shm"):
                    continue
                path = os.path.join(folder, name)
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):
                    continue  # a pipe of a process that had no time to remove it
                if identities is not None:
                    status = identities.translate(status)
                content = Path(path).read_bytes()
                files[os.path.relpath(path, root)] = Stored(content, Status.of(status))
        return cls(files, tuple(sorted(directories)))


class Identities:
    """Lets files that were made anew look like those whose place they take.

    Number, device and times of a file are what proves that nobody wrote to it; numbers and times of
    change cannot be set.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[int, Status]] = {}

    def add(self, real: os.stat_result, wanted: Status) -> None:
        """A file with this status is to look like that."""
        self._known[real.st_dev, real.st_ino] = (real.st_ctime_ns, wanted)

    def translate(self, real: os.stat_result) -> os.stat_result:
        """The status of a file as it is to be seen: what is changed shows its real times."""
        found = self._known.get((real.st_dev, real.st_ino))
        if found is None:
            return real
        ctime_ns, wanted = found
        fields: list[Any] = list(real)[:10]
        fields[1], fields[2] = wanted.ino, wanted.dev
        unchanged = real.st_ctime_ns == ctime_ns
        times = {
            "st_mtime_ns": real.st_mtime_ns,
            "st_ctime_ns": wanted.ctime_ns if unchanged else real.st_ctime_ns,
        }
        return os.stat_result(fields, times)


@dataclass(slots=True)
class _File:
    durable: bytes
    durable_status: Status
    content: bytearray
    status: Status
    #: Writes, truncations and allocations since the last sync.
    pending: list[Write | Truncate | Allocate] = field(default_factory=list)


#: What a name means: a file, or (True) a directory; None: nothing.
_Meaning = int | bool | None


@dataclass(slots=True)
class _Directory:
    durable: dict[str, _Meaning] = field(default_factory=dict)
    now: dict[str, _Meaning] = field(default_factory=dict)
    #: Each of them as a whole or not at all.
    pending: list[dict[str, _Meaning]] = field(default_factory=list)

    def change(self, names: dict[str, _Meaning]) -> None:
        self.now.update(names)
        self.pending.append(names)

    def settle(self) -> None:
        self.durable = dict(self.now)
        self.pending = []


class Disk:
    """A directory tree under recorded operations; all of ``start`` is certain.

    The files of ``start`` are numbered in the order of their paths.
    """

    def __init__(self, start: Image) -> None:
        self._files: dict[int, _File] = {}
        self._directories = {"": _Directory()}
        self._last_write: Write | None = None
        for path in start.directories:
            self.apply(MakeDirectory(path))
        for number, (path, stored) in enumerate(sorted(start.files.items())):
            self.apply(SetName(path, number, stored.status))
            file = self._files[number]
            file.content = bytearray(stored.content)
            file.durable = stored.content
        for directory in self._directories.values():
            directory.settle()

    def apply(self, operation: Operation) -> None:
        """One more operation has happened."""
        self._last_write = None
        match operation:
            case Write() | Truncate() | Allocate():
                file = self._files[operation.file]
                _change(file.content, operation)
                file.pending.append(operation)
                file.status = operation.status
                if isinstance(operation, Write):
                    self._last_write = operation
            case Sync(number, whole, status):
                file = self._files[number]
                if whole or len(file.durable) != len(file.content):
                    file.durable_status = status
                file.status = status
                file.durable = bytes(file.content)
                file.pending = []
            case Touch(number, status):
                self._files[number].status = status
            case SetName(path, number, status):
                if number is not None:
                    assert status is not None
                    if number not in self._files:
                        self._files[number] = _File(b"", status, bytearray(), status)
                    self._files[number].status = status
                directory, name = self._directory_of(path)
                directory.change({name: number})
            case Rename(source, target, status):
                old, name = self._directory_of(source)
                new, new_name = self._directory_of(target)
                moved = old.now[name]
                if old is new:
                    old.change({new_name: moved, name: None})
                else:
                    new.change({new_name: moved})
                    old.change({name: None})
                assert isinstance(moved, int)
                self._files[moved].status = status
            case MakeDirectory(path):
                directory, name = self._directory_of(path)
                directory.change({name: True})
                self._directories[path] = _Directory()
            case SyncDirectory(path):
                self._directories[path].settle()
            case _:
                raise TypeError(f"not an operation: {operation}")

    def _directory_of(self, path: str) -> tuple[_Directory, str]:
        folder, name = os.path.split(path)
        return self._directories[folder], name

    def now(self) -> Image:
        """Everything as it looks without a power cut."""
        return self._image({path: d.now for path, d in self._directories.items()}, self._seen)

    def cut(self, left: Left, rng: random.Random) -> Image:
        """What a power cut at this moment may leave.

        Args:
            rng: chooses where there is a choice.
        """
        keep = rng.choice((0.1, 0.5, 0.9))
        names = {
            path: _names_left(directory, left, rng, keep)
            for path, directory in self._directories.items()
        }
        contents = {
            number: Stored(self._content_left(file, left, rng, keep), _status_left(file, left, rng))
            for number, file in self._files.items()
        }
        return self._image(names, contents.__getitem__)

    def _seen(self, number: int) -> Stored:
        file = self._files[number]
        return Stored(bytes(file.content), file.status)

    def _content_left(self, file: _File, left: Left, rng: random.Random, keep: float) -> bytes:
        if not file.pending or left in (Left.NOTHING, Left.NAMES):
            return file.durable
        if left is Left.SOME:
            return _sectors_left(file.durable, file.pending, rng, keep)
        if left is Left.TORN and file.pending[-1] is self._last_write:
            return _torn(file.durable, file.pending, rng)
        return bytes(file.content)

    def _image(self, names: dict[str, dict[str, _Meaning]], stored: Any) -> Image:
        files: dict[str, Stored] = {}
        directories: list[str] = []
        for path, meaning in _reachable(names):
            if meaning is True:
                directories.append(path)
            else:
                files[path] = stored(meaning)
        return Image(files, tuple(sorted(directories)))


def _reachable(names: dict[str, dict[str, _Meaning]]) -> Iterator[tuple[str, _Meaning]]:
    """Paths and what they mean, of all that can be reached from the root."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for name, meaning in names[folder].items():
            if meaning is None:
                continue
            path = os.path.join(folder, name)
            yield path, meaning
            if meaning is True:
                waiting.append(path)


def _change(content: bytearray, operation: Write | Truncate | Allocate) -> None:
    """Do to the content of a file what the operation does."""
    match operation:
        case Write(_, offset, data, _):
            if offset > len(content):
                content.extend(bytes(offset - len(content)))
            content[offset : offset + len(data)] = data
        case Truncate(_, size, _):
            del content[size:]
            content.extend(bytes(size - len(content)))
        case Allocate(_, size, _):
            content.extend(bytes(max(0, size - len(content))))


def _names_left(
    directory: _Directory, left: Left, rng: random.Random, keep: float
) -> dict[str, _Meaning]:
    if left in (Left.NOTHING, Left.CONTENT):
        return directory.durable
    if left is not Left.SOME:
        return directory.now
    names = dict(directory.durable)
    for change in directory.pending:
        if rng.random() < keep:
            names.update(change)
    return names


def _status_left(file: _File, left: Left, rng: random.Random) -> Status:
    if left in (Left.NOTHING, Left.NAMES) or (left is Left.SOME and rng.random() < 0.5):
        return file.durable_status
    return file.status


def _torn(durable: bytes, pending: list[Write | Truncate | Allocate], rng: random.Random) -> bytes:
    """All of it, but of the last write only the sectors before or behind some point."""
    content = bytearray(durable)
    for operation in pending[:-1]:
        _change(content, operation)
    last = pending[-1]
    assert isinstance(last, Write)
    end = last.offset + len(last.data)
    first = last.offset // SECTOR + 1
    point = rng.randint(first, max(first, (end - 1) // SECTOR)) * SECTOR - last.offset
    point = min(point, len(last.data))
    if rng.random() < 0.5:
        _change(content, Write(last.file, last.offset, last.data[:point], last.status))
    else:
        _change(content, Write(last.file, last.offset + point, last.data[point:], last.status))
    return bytes(content)


def _sectors_left(
    durable: bytes,
    pending: Iterable[Write | Truncate | Allocate],
    rng: random.Random,
    keep: float,
) -> bytes:
    """Each sector before or after any of the writes to it; any of the lengths there were."""
    content = bytearray(durable)
    versions: dict[int, list[bytes]] = {}
    sizes = [len(content)]
    for operation in pending:
        if isinstance(operation, Write):
            end = operation.offset + len(operation.data)
            touched = range(operation.offset // SECTOR, -(-end // SECTOR))
            for sector in touched:
                versions.setdefault(sector, [_sector(content, sector)])
            _change(content, operation)
            for sector in touched:
                versions[sector].append(_sector(content, sector))
        elif rng.random() < keep:
            size_before = len(content)
            _change(content, operation)
            if len(content) < size_before:
                # Behind its end nothing of before comes back.
                sizes = []
                for sector in [s for s in versions if (s + 1) * SECTOR > len(content)]:
                    versions[sector] = [_sector(content, sector)]
        sizes.append(len(content))
    size = sizes[-1] if rng.random() < keep else rng.choice(sizes)
    content.extend(bytes(max(0, max(sizes) + SECTOR - len(content))))
    for sector, choices in versions.items():
        chosen = choices[-1] if rng.random() < keep else rng.choice(choices)
        content[sector * SECTOR : (sector + 1) * SECTOR] = chosen
    return bytes(content[:size])


def _sector(content: bytearray, sector: int) -> bytes:
    return bytes(content[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")
