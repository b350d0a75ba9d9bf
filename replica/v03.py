"""Reads replicas in the layout of Litestream 0.3: snapshots and WAL segments in generations.

Layout, below the replica's root::

    generations/<16 hex>/snapshots/<index>.snapshot.lz4     LZ4 frame of the database file
    generations/<16 hex>/wal/<index>_<offset>.wal.lz4       LZ4 frame of WAL bytes at that offset

``index`` counts WAL files (8 hex digits), ``offset`` is in bytes (8 to 16 hex digits).  A snapshot
is the database before the WAL of its own index.  There are no checksums but those inside the WAL
and the LZ4 frames.  This module reads only; nothing writes that layout any more.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import apsw
import lz4.frame

from walship.replica.apply import Applied, Fetcher
from walship.replica.errors import FormatError
from walship.replica.format.types import is_page_size
from walship.replica.format.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE
from walship.replica.store.base import ObjectInfo, ObjectStore

__all__ = ["V03Object", "V03Plan", "apply_v03", "list_v03", "plan_v03"]

_PREFIX: Final = "generations/"
_SNAPSHOT_RE: Final = re.compile(
    r"generations/([0-9a-f]{16})/snapshots/([0-9a-f]{8})\.snapshot\.lz4"
)
_WAL_RE: Final = re.compile(
    r"generations/([0-9a-f]{16})/wal/([0-9a-f]{8})_([0-9a-f]{8,16})\.wal\.lz4"
)
_RANGE_BYTES: Final = 4 << 20
_WRITE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class V03Object:
    """One object of the layout.

    Attributes:
        info: as listed.
        index: number of the WAL file.
        offset: byte offset in that WAL; 0 for snapshots.
    """

    info: ObjectInfo
    index: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class V03Plan:
    """A snapshot and the WAL segments behind it, in the order of use.

    Attributes:
        generation: 16 hex digits.
        snapshot: the database to begin with.
        wal: by index, then offset.
        newest_ms: time of the newest object of the whole layout that fits the target.
    """

    generation: str
    snapshot: V03Object
    wal: tuple[V03Object, ...]
    newest_ms: int


def list_v03(store: ObjectStore) -> list[ObjectInfo]:
    """Everything below ``generations/``."""
    return list(store.list(_PREFIX))


def plan_v03(objects: Iterable[ObjectInfo], *, before_ms: int | None = None) -> V03Plan | None:
    """Choose the newest snapshot and what follows it.

    Args:
        objects: as `list_v03` gives them; other names are passed over.
        before_ms: only objects stored at or before this, in ms since the epoch.

    Returns:
        None without a snapshot that fits.
    """
    fitting = [info for info in objects if before_ms is None or info.modified_ms <= before_ms]
    best: tuple[str, V03Object] | None = None
    newest_ms = 0
    for info in fitting:
        match = _SNAPSHOT_RE.fullmatch(info.key)
        if match is None and _WAL_RE.fullmatch(info.key) is None:
            continue
        newest_ms = max(newest_ms, info.modified_ms)
        if match is None:
            continue
        candidate = match[1], V03Object(info, int(match[2], 16))
        if best is None or _age(candidate) > _age(best):
            best = candidate
    if best is None:
        return None
    generation, snapshot = best
    wal = []
    for info in fitting:
        match = _WAL_RE.fullmatch(info.key)
        if match is not None and match[1] == generation and int(match[2], 16) >= snapshot.index:
            wal.append(V03Object(info, int(match[2], 16), int(match[3], 16)))
    wal.sort(key=lambda each: (each.index, each.offset))
    return V03Plan(generation, snapshot, tuple(wal), newest_ms)


def _age(candidate: tuple[str, V03Object]) -> tuple[int, int]:
    return candidate[1].info.modified_ms, candidate[1].index


def apply_v03(fetcher: Fetcher, chosen: V03Plan, path: Path, fd: int) -> Applied:
    """Write the database that a snapshot and its WAL segments describe.

    Args:
        path: an empty file; ``<path>-wal`` and ``<path>-shm`` are used on the way.
        fd: open on it.

    Raises:
        FormatError: an object is missing or damaged; the message names it.
        StoreError: from the store.
        OSError: the file could not be written.
    """
    everything = (chosen.snapshot, *chosen.wal)
    fetcher.bytes_expected += sum(each.info.size_bytes for each in everything)
    _write_at(fd, _decompressed(fetcher, chosen.snapshot), 0)
    page_size = _page_size(fd, chosen.snapshot)
    expected_index = chosen.snapshot.index
    for index, group in groupby(chosen.wal, key=lambda each: each.index):
        if index != expected_index:
            raise FormatError(
                f"the replica is damaged: generation {chosen.generation} has no WAL with index"
                f" {expected_index:08x}, but a later one"
            )
        expected_index += 1
        wal_size = _write_wal(fetcher, group, Path(f"{path}-wal"))
        _checkpoint(path, wal_size, page_size, f"{chosen.generation}, WAL {index:08x}")
    commit = os.fstat(fd).st_size // page_size
    return Applied(page_size=page_size, commit=commit, pages_decoded=commit, pages_written=commit)


def _write_wal(fetcher: Fetcher, group: Iterable[V03Object], path: Path) -> int:
    """Write the segments of one WAL; its size."""
    offset = 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for each in group:
            if each.offset != offset:
                raise FormatError(
                    f"the replica is damaged: before {each.info.key} the WAL is missing from byte"
                    f" {offset} on"
                )
            offset += _write_at(fd, _decompressed(fetcher, each), offset)
    finally:
        os.close(fd)
    return offset


def _checkpoint(path: Path, wal_size: int, page_size: int, name: str) -> None:
    """Have SQLite move a WAL into the database."""
    n_expected = max(0, wal_size - WAL_HEADER_SIZE) // (page_size + FRAME_HEADER_SIZE)
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE, vfs="unix")
        try:
            connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()
            n_frames, n_moved = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        finally:
            connection.close(True)  # the last one out removes -wal and -shm
    except apsw.FullError as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    except apsw.IOError as error:
        raise OSError(errno.EIO, str(error)) from error
    except apsw.Error as error:
        raise FormatError(f"generation {name} cannot be applied: {error}") from error
    # SQLite quietly ignores everything behind the first frame that is not valid.
    if n_frames != n_expected or n_moved != n_frames:
        raise FormatError(
            f"generation {name} is damaged: only {max(n_moved, 0)} of its {n_expected} frames are"
            " valid"
        )


def _page_size(fd: int, snapshot: V03Object) -> int:
    head = os.pread(fd, 18, 0)
    value = int.from_bytes(head[16:18], "big")
    page_size = 65536 if value == 1 else value
    if head[:16] != b"SQLite format 3\0" or not is_page_size(page_size):
        raise FormatError(f"{snapshot.info.key} does not hold an SQLite database")
    return page_size


def _decompressed(fetcher: Fetcher, source: V03Object) -> Iterator[bytes]:
    """The content of an object, in pieces."""
    info = source.info
    decompressor = lz4.frame.LZ4FrameDecompressor()
    for at in range(0, info.size_bytes, _RANGE_BYTES):
        length = min(_RANGE_BYTES, info.size_bytes - at)
        data = fetcher.take(fetcher.start(info.key, at, length), info.key, length)
        try:
            while True:
                piece = decompressor.decompress(data, max_length=_WRITE_BYTES)
                if piece:
                    yield piece
                if decompressor.eof or decompressor.needs_input:
                    break
                data = b""
        except (RuntimeError, EOFError) as error:
            raise FormatError(f"{info.key} is damaged: it cannot be decompressed") from error
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError(f"{info.key} is damaged: its compressed data does not end where it ends")


def _write_at(fd: int, pieces: Iterator[bytes], offset: int) -> int:
    """Write pieces one behind the other from ``offset``; the number of bytes."""
    start = offset
    write: Callable[[int, bytes, int], int] = os.pwrite
    for piece in pieces:
        rest = piece
        while rest:
            done = write(fd, rest, offset)
            offset += done
            rest = rest[done:]
    return offset - start
