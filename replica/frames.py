"""Reading WAL frames: our own descriptor, the newest frame of each page, and the pages' content.

Sits below `replica.capture`, which decides which frames count and proves that none was missed.
Memory is bounded: a few bytes per page of a batch, and a megabyte of content at a time.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from .errors import FormatError
from .files import Files
from .format.types import WalSalts
from .format.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    FrameHeader,
    WalHeader,
    frame_offset,
    iter_frame_pgnos,
    parse_frame_header,
)

__all__ = ["Batch", "WalReader", "collect", "page_runs", "pages"]

_SALTS: Final = struct.Struct(">2I")

#: How much of the WAL is read at once while frame headers are scanned.
_SCAN_BYTES: Final = 1024 * 1024
#: A batch up to this size is read once and kept; of a larger one only the pages that count are
#: read again, which are few where the same pages change over and over.
_KEEP_BYTES: Final = 256 * 1024
#: From so many frames on it is worth counting by page.
_DENSE_FRAMES: Final = 16_384
#: Longest run of consecutive pages that is read in one go.
_RUN_BYTES: Final = 512 * 1024


class WalReader:
    """Our own descriptor on the ``-wal`` file, reopened when the file is another one."""

    def __init__(self, path: str, files: Files) -> None:
        self.path = path
        self.files = files
        self.fd = -1
        self._identity: tuple[int, int] | None = None
        self._is_named = False  # for certain: the directory was synced since the file appeared

    def refresh(self) -> bool:
        """Follow the path to the file that is there now; False without a file."""
        try:
            status = self.files.stat(self.path)
        except FileNotFoundError:
            self.close()
            return False
        if self._identity != (status.st_dev, status.st_ino):
            self.close()
            try:
                self.fd = self.files.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            status = self.files.fstat(self.fd)
            self._identity = (status.st_dev, status.st_ino)
            self._is_named = False
        return True

    def header(self) -> WalHeader | None:
        """The header as it is now; None without a file, or if there is none that is whole."""
        if not self.refresh():
            return None
        data = self.files.pread(self.fd, WAL_HEADER_SIZE, 0)
        if len(data) < WAL_HEADER_SIZE:
            return None
        try:
            return WalHeader.parse(data)
        except FormatError:
            return None

    def salts(self) -> WalSalts | None:
        """The salts in the header as it is now, unverified; None without a whole header."""
        if not self.refresh():
            return None
        data = self.files.pread(self.fd, WAL_HEADER_SIZE, 0)
        return WalSalts(*_SALTS.unpack_from(data, 16)) if len(data) == WAL_HEADER_SIZE else None

    def frame(self, frame_no: int, page_size: int) -> FrameHeader | None:
        """Header of one frame; None if the file is shorter."""
        data = self.files.pread(self.fd, FRAME_HEADER_SIZE, frame_offset(frame_no, page_size))
        return parse_frame_header(data) if len(data) == FRAME_HEADER_SIZE else None

    def sync(self) -> None:
        """Make the WAL and everything in it survive a power cut; releases the GIL."""
        if self.fd < 0:
            return
        self.files.sync(self.fd)
        if not self._is_named:
            self.files.sync_directory(os.path.dirname(self.path))
            self._is_named = True

    def close(self) -> None:
        if self.fd >= 0:
            self.files.close(self.fd)
        self.fd = -1
        self._identity = None


@dataclass(slots=True)
class Batch:
    """The last version of every page among frames ``first .. last`` of one WAL generation.

    Attributes:
        keys: ``page number << 32 | frame``, ascending; frame 0 means "from the main file".  A list,
            except for a full copy, where it may be long.
        commit: size of the database in pages afterwards.
        kept: the frames' bytes from ``first`` on, if the batch was small enough to keep.
    """

    first: int
    last: int
    keys: Iterable[int]
    commit: int
    checksum: tuple[int, int]
    kept: bytes | None


class DenseKeys:
    """Keys of a batch as one frame number for each page of the database; iterable repeatedly."""

    def __init__(self, commit: int) -> None:
        self._frames = array("I", bytes(4 * (commit + 1)))

    def put(self, newest: Mapping[int, int]) -> None:
        """Newer frames of some pages; those above the database's end do not count."""
        frames = self._frames
        n_pages = len(frames)
        for pgno, frame_no in newest.items():
            if pgno < n_pages:
                frames[pgno] = frame_no

    def __iter__(self) -> Iterator[int]:
        for pgno, frame_no in enumerate(self._frames):
            if frame_no:
                yield pgno << 32 | frame_no


def collect(wal: WalReader, after: int, last: int, page_size: int) -> Batch:
    """Scan the frames behind ``after`` through ``last``: the newest frame of each page."""
    first = after + 1
    step = FRAME_HEADER_SIZE + page_size
    total = (last - after) * step
    keep = total <= _KEEP_BYTES
    chunk_frames = (total if keep else max(step, _SCAN_BYTES)) // step
    # One buffer for all chunks: fresh ones would cost more in page faults than the reading does.
    buffer = bytearray(0 if keep else min(chunk_frames * step, total))
    kept: bytes | None = None
    last_frame = wal.frame(last, page_size)
    if last_frame is None:
        raise FormatError("the WAL is shorter than its index says")
    # A large batch that covers much of the database: 4 bytes for each page of it are far less than
    # a number object for each frame.
    dense = last - after >= _DENSE_FRAMES and last_frame.commit <= 4 * (last - after)
    table = DenseKeys(last_frame.commit if dense else 0)
    keys = array("Q")
    end = FrameHeader(0, 0, 0, 0, 0, 0)
    frame_no = first
    while frame_no <= last:
        count = min(chunk_frames, last - frame_no + 1)
        data: bytes | memoryview
        if keep:
            kept = data = wal.files.pread(wal.fd, count * step, frame_offset(frame_no, page_size))
            n_read = len(data)
        else:
            data = memoryview(buffer)[: count * step]
            n_read = wal.files.preadv(wal.fd, [data], frame_offset(frame_no, page_size))
        if n_read != count * step:
            raise FormatError("the WAL is shorter than its index says")
        newest = {pgno: n for n, (pgno,) in enumerate(iter_frame_pgnos(data, page_size), frame_no)}
        if dense:
            table.put(newest)
        else:
            keys.extend([pgno << 32 | n for pgno, n in newest.items()])
        frame_no += count
        end = parse_frame_header(data[(count - 1) * step : (count - 1) * step + FRAME_HEADER_SIZE])
    commit = end.commit
    if dense:
        return Batch(first, last, table, commit, end.checksum, None)
    ordered = sorted(keys)
    if len(keys) and not keep:
        ordered = [
            key
            for key, behind in zip(ordered, [*ordered[1:], 1 << 64], strict=True)
            if key >> 32 != behind >> 32
        ]
    if ordered and ordered[-1] >> 32 > commit > 0:
        ordered = [key for key in ordered if key >> 32 <= commit]
    return Batch(first, last, ordered, commit, end.checksum, kept)


def pages(
    wal: WalReader, batch: Batch, page_size: int, read_main: Callable[[int, int], bytes]
) -> Iterator[tuple[int, memoryview]]:
    """Pages of a batch with their content, ascending."""
    step = FRAME_HEADER_SIZE + page_size
    if batch.kept is not None:
        view = memoryview(batch.kept)
        first = batch.first
        for key in batch.keys:
            frame_no = key & 0xFFFFFFFF
            if frame_no:
                start = (frame_no - first) * step + FRAME_HEADER_SIZE
                yield key >> 32, view[start : start + page_size]
            else:
                page = read_main(((key >> 32) - 1) * page_size, page_size)
                yield key >> 32, memoryview(page)
        return
    for pgno, run in page_runs(wal, batch, page_size, read_main):
        yield from enumerate(run, pgno)


def page_runs(
    wal: WalReader, batch: Batch, page_size: int, read_main: Callable[[int, int], bytes]
) -> Iterator[tuple[int, list[memoryview]]]:
    """Runs of consecutive pages, ascending: the first page number, and the pages' content.

    Each run is read in one go, half a MiB at most, and the GIL is left to others meanwhile.
    """
    step = FRAME_HEADER_SIZE + page_size
    for first_key, count in _runs(batch.keys, max(1, _RUN_BYTES // step)):
        pgno, frame_no = first_key >> 32, first_key & 0xFFFFFFFF
        if frame_no:
            size, gap = step, FRAME_HEADER_SIZE
            data = wal.files.pread(wal.fd, count * step, frame_offset(frame_no, page_size))
        else:
            size, gap = page_size, 0
            data = read_main((pgno - 1) * page_size, count * page_size)
        if len(data) != count * size:
            raise FormatError("the WAL became shorter while it was read")
        view = memoryview(data)
        yield pgno, [view[start : start + page_size] for start in range(gap, len(data), size)]


def _runs(keys: Iterable[int], longest: int) -> Iterator[tuple[int, int]]:
    """``(first key, count)`` of runs that are consecutive both as pages and where they lie."""
    start, count = -1, 0
    for key in keys:
        if count and count < longest:
            expected = start + (count << 32) + (count if start & 0xFFFFFFFF else 0)
            if key == expected:
                count += 1
                continue
        if count:
            yield start, count
        start, count = key, 1
    if count:
        yield start, count
