"""Applies a chain of segments to an empty file, newest segment first, so that each page is written
once.

It sits under `replica.restore`, which chooses the segments and owns the file.  Bytes are fetched by
a pool of threads, a few MiB at a time and ahead of need; everything else (decoding, checking,
writing) happens in the calling thread, in the order of the segments, because the state that decides
which page wins then needs no lock and the interpreter's lock makes a second decoder useless.

What is fetched: small segments whole; large ones whole too, unless most of their bytes belong to
pages that newer segments replace.  Of those the page index is read first and then only the ranges
of the winning pages.  Segments that are fetched whole are verified to their file checksum; of the
others each page is checked for its number and length only.

Nothing here syncs, renames or cleans up.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, TypeVar

import fastcrc
import lz4.block
import lz4.frame

from walship.replica.errors import ChecksumError, FormatError
from walship.replica.format.ltx import (
    HEADER_FLAG_NO_CHECKSUM,
    HEADER_SIZE,
    TRAILER_SIZE,
    Header,
    PageIndex,
    index_size_from_tail,
    page_frame,
    parse_index,
)
from walship.replica.format.types import format_txid, lock_pgno
from walship.replica.store.base import ObjectStore, SegmentInfo

__all__ = ["Applied", "Fetcher", "apply_segments"]

_T = TypeVar("_T")

#: One request of a large segment.  Several are in flight, so this times `parallelism` is most of
#: the memory a restore needs, twice where an answer is put together; larger ones were not faster.
RANGE_BYTES: Final = 5 << 20
#: Up to this size a segment is fetched whole, without a look at its index.
SMALL_BYTES: Final = 4 << 20
#: Small segments fetched ahead of need, in bytes.
AHEAD_BYTES: Final = 24 << 20
#: Winning pages closer together than this are fetched by one request.
_RANGE_GAP_BYTES: Final = 64 << 10
#: Pages handed to the kernel at once (its limit is 1024): half a MiB of them stays in the cache.
_BATCH_PAGES: Final = 128
_ONES: Final = b"\x01" * _BATCH_PAGES
#: A larger page index is not read: parsed it takes five times its size, and of a segment that large
#: fetching all costs at most twice what fetching the half that is needed would.
INDEX_BYTES_MAX: Final = 16 << 20
#: First guess at the size of an index: about ten bytes a page.
_INDEX_GUESS_MIN: Final = 64 << 10
_INDEX_GUESS_SHARE: Final = 128

_CHECKSUM_FLAG: Final = 1 << 63
_FRAME_HEADER: Final = struct.Struct(">IHI")
# Size of the page index, post-apply checksum, file checksum.
_INDEX_TAIL: Final = struct.Struct(">QQQ")
_INDEX_TAIL_SIZE: Final = _INDEX_TAIL.size
_FLAG_BLOCK: Final = 1
_PAGES_END: Final = bytes(6)
# An LZ4 frame of one page: magic, descriptor, block sizes, end mark, checksum; usually 23 bytes,
# but an encoder may cut a page into several blocks.
_FRAME_OVERHEAD: Final = 1024
_FRAME_HAS_SIZE: Final = 0x08
# A page takes at least a frame header, a byte and three bytes in the index.
_PAGE_BYTES_MIN: Final = _FRAME_HEADER.size + 1 + 3
# Behind the last page: its end mark, an index that is at least its own end, index size, trailer.
_SIZE_MIN: Final = HEADER_SIZE + len(_PAGES_END) + 1 + 8 + TRAILER_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What a chain of segments came to.

    Attributes:
        page_size: of the database, in bytes.
        commit: size of the database in pages.
        pages_decoded: pages decompressed; those of segments fetched whole count all.
        pages_written: pages written, each once.
    """

    page_size: int
    commit: int
    pages_decoded: int
    pages_written: int


class Fetcher:
    """Ranged reads of a store by a pool of threads.  Use from one thread, as a context manager.

    Leaving the context with an exception does not wait for requests that are under way.

    Attributes:
        bytes_fetched: bytes of all results taken so far.
    """

    def __init__(
        self,
        store: ObjectStore,
        parallelism: int,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self.bytes_fetched = 0
        self.parallelism = parallelism
        #: What is going to be fetched altogether, as far as known: for the progress bar only.
        self.bytes_expected = 0
        self._store = store
        self._progress = progress
        self._pool = ThreadPoolExecutor(parallelism, thread_name_prefix="walship-restore")

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def start(self, key: str, start: int, length: int) -> Future[bytes]:
        """Begin to read a range."""
        return self._pool.submit(self._store.get, key, start, length)

    def take(self, future: Future[bytes], key: str, length: int) -> bytes:
        """Wait for a range.

        Raises:
            FormatError: it is shorter than the listing promised.
            StoreError: from the store.
        """
        data = future.result()
        self.bytes_fetched += len(data)
        if self._progress is not None:
            self._progress(self.bytes_fetched, self.bytes_expected)
        if len(data) != length:
            raise FormatError(f"{key} is shorter than the listing says: it was cut off or replaced")
        return data

    def each(self, function: Callable[[str], _T], keys: Sequence[str]) -> Iterator[_T]:
        """``function`` of every key, by all threads, in the order of the keys."""
        return self._pool.map(function, keys)


def apply_segments(
    fetcher: Fetcher,
    segments: Sequence[SegmentInfo],
    fd: int,
    *,
    verify_full: bool = False,
    on_written: Callable[[int], object] | None = None,
) -> Applied:
    """Write the database that a chain of segments describes.

    Args:
        segments: oldest first, without gaps, beginning at TXID 1.
        fd: an empty file; the database begins at its offset 0.  Pages that no segment may hold (the
            lock page) are left as a hole of zeros.
        verify_full: fetch and verify every segment whole.
        on_written: called with the number of bytes written so far, now and then.

    Raises:
        FormatError: a segment is damaged, is not what its name says, or does not fit the others.
            The message begins with the segment's key.
        StoreError: from the store.
        OSError: the file could not be written.
    """
    fetcher.bytes_expected += sum(segment.size_bytes for segment in segments)
    return _Apply(fetcher, segments, fd, verify_full, on_written).run()


class _Apply:
    """One run: the pages written so far, and the queue of segments that are being fetched."""

    def __init__(
        self,
        fetcher: Fetcher,
        segments: Sequence[SegmentInfo],
        fd: int,
        verify_full: bool,
        on_written: Callable[[int], object] | None,
    ) -> None:
        self._fetcher = fetcher
        self._segments = segments
        self._fd = fd
        self._verify_full = verify_full
        self._on_written = on_written
        self._pages: _Pages | None = None

    def run(self) -> Applied:
        upcoming = iter(reversed(self._segments))
        ahead: deque[tuple[SegmentInfo, Future[bytes] | None]] = deque()
        ahead_bytes = 0
        while True:
            while ahead_bytes < AHEAD_BYTES and len(ahead) < 4 * self._fetcher.parallelism:
                segment = next(upcoming, None)
                if segment is None:
                    break
                future = None
                if segment.size_bytes < _SIZE_MIN:
                    raise FormatError(
                        f"{segment.key} is damaged: {segment.size_bytes} bytes are too few for a"
                        " segment"
                    )
                if segment.size_bytes <= SMALL_BYTES:
                    future = self._fetcher.start(segment.key, 0, segment.size_bytes)
                    ahead_bytes += segment.size_bytes
                ahead.append((segment, future))
            if not ahead:
                break
            segment, future = ahead.popleft()
            try:
                if future is None:
                    self._large(segment)
                else:
                    ahead_bytes -= segment.size_bytes
                    data = self._fetcher.take(future, segment.key, segment.size_bytes)
                    self._scanner(segment).feed(data)
            except FormatError as error:
                if str(error).startswith(segment.key):
                    raise
                raise type(error)(f"{segment.key} is damaged: {error}") from error
        if self._pages is None:
            raise FormatError("no segment to apply")
        self._pages.require_complete()
        return self._pages.applied()

    def _scanner(self, segment: SegmentInfo) -> _Scanner:
        return _Scanner(segment, self._accept)

    def _accept(self, segment: SegmentInfo, header: Header) -> _Pages:
        """Check a header against the segment's name and the newer segments."""
        if (header.min_txid, header.max_txid) != (segment.min_txid, segment.max_txid):
            raise FormatError(
                f"its header is for TXIDs {format_txid(header.min_txid)} to"
                f" {format_txid(header.max_txid)}, not for those of its name"
            )
        if self._pages is None:
            # The file checksum comes last, so a damaged size must not be believed until then.
            pages_max = sum(each.size_bytes for each in self._segments) // _PAGE_BYTES_MIN + 1
            if header.commit > pages_max:
                raise FormatError(
                    f"its header claims {header.commit} pages, the replica can hold {pages_max}"
                )
            self._pages = _Pages(self._fd, header.page_size, header.commit, self._on_written)
        elif self._pages.page_size != header.page_size:
            raise FormatError(
                f"its page size is {header.page_size}, that of newer segments"
                f" {self._pages.page_size}"
            )
        return self._pages

    def _large(self, segment: SegmentInfo) -> None:
        pages = self._pages
        # A page that is stale here was written from a newer segment, so this bounds the stale bytes
        # without a look at the index.
        stale_max = 0 if pages is None else pages.n_written * _frame_size_max(pages.page_size)
        if self._verify_full or pages is None or 2 * stale_max <= segment.size_bytes:
            self._whole(segment)
            return
        n_before = self._fetcher.bytes_fetched
        winners = self._read_winners(segment, pages)
        self._fetcher.bytes_expected += self._fetcher.bytes_fetched - n_before
        if winners is None or 2 * winners.n_bytes >= segment.size_bytes:
            self._whole(segment)
        else:
            self._ranges(segment, pages, winners)

    def _whole(self, segment: SegmentInfo) -> None:
        scanner = self._scanner(segment)
        size = segment.size_bytes
        requests = ((at, min(RANGE_BYTES, size - at)) for at in range(0, size, RANGE_BYTES))
        for data in self._in_order(segment.key, requests):
            scanner.feed(data)

    def _in_order(self, key: str, requests: Iterator[tuple[int, int]]) -> Iterator[bytes]:
        """Fetch ``(offset, length)`` after ``(offset, length)``, a few at once."""
        fetcher = self._fetcher
        under_way: deque[tuple[Future[bytes], int]] = deque()
        for start, length in requests:
            under_way.append((fetcher.start(key, start, length), length))
            if len(under_way) > fetcher.parallelism:
                yield fetcher.take(*_with_key(key, under_way.popleft()))
        while under_way:
            yield fetcher.take(*_with_key(key, under_way.popleft()))

    def _read_winners(self, segment: SegmentInfo, pages: _Pages) -> _Winners | None:
        """Read header and index of a segment and find the pages that no newer segment holds.

        None if the index is too large for that.
        """
        key, size = segment.key, segment.size_bytes
        fetcher = self._fetcher
        guess = min(size, max(_INDEX_GUESS_MIN, size // _INDEX_GUESS_SHARE))
        head_future = fetcher.start(key, 0, HEADER_SIZE)
        tail_future = fetcher.start(key, size - guess, guess)
        header = Header.unpack(fetcher.take(head_future, key, HEADER_SIZE))
        tail = fetcher.take(tail_future, key, guess)
        self._accept(segment, header)
        needed = index_size_from_tail(tail)
        if needed > size - HEADER_SIZE:
            raise FormatError("its page index is longer than the file")
        if needed > INDEX_BYTES_MAX:
            return None
        if needed > guess:
            more = needed - guess
            start = size - needed
            tail = fetcher.take(fetcher.start(key, start, more), key, more) + tail
        index = parse_index(tail, file_size=size)
        written, commit = pages.written, pages.commit
        frames = PageIndex(array("I"), array("Q"), array("I"))
        n_bytes = 0
        for pgno, offset, length in zip(*index, strict=True):
            if pgno <= commit and not written[pgno]:
                frames.pgnos.append(pgno)
                frames.offsets.append(offset)
                frames.lengths.append(length)
                n_bytes += length
        return _Winners(frames, n_bytes)

    def _ranges(self, segment: SegmentInfo, pages: _Pages, winners: _Winners) -> None:
        self._fetcher.bytes_expected -= segment.size_bytes
        self._fetcher.bytes_expected += sum(each.length for each in _groups(winners.frames))
        lock = lock_pgno(pages.page_size)
        groups = _groups(winners.frames)
        requests = ((each.offset, each.length) for each in _groups(winners.frames))
        for group, data in zip(groups, self._in_order(segment.key, requests), strict=True):
            view = memoryview(data)
            for pgno, offset, length in zip(
                *(column[group.first : group.end] for column in winners.frames), strict=True
            ):
                if pgno == lock:
                    raise FormatError("it holds the lock page")
                start = offset - group.offset
                page = page_frame(view[start : start + length], pages.page_size, pgno)
                pages.add(pgno, page)
            pages.n_decoded += group.end - group.first
        pages.flush()


class _Group(NamedTuple):
    """Winning frames that are fetched by one request: which of them, and the range of bytes."""

    first: int
    end: int
    offset: int
    length: int


class _Winners(NamedTuple):
    """The pages of a segment that are to be written, in ascending order, and their bytes in it."""

    frames: PageIndex
    n_bytes: int


def _with_key(key: str, request: tuple[Future[bytes], int]) -> tuple[Future[bytes], str, int]:
    return request[0], key, request[1]


def _groups(frames: PageIndex) -> Iterator[_Group]:
    """The requests that fetch some frames, in the order of the file."""
    first, begin, end = 0, -1, 0
    for at, (offset, length) in enumerate(zip(frames.offsets, frames.lengths, strict=True)):
        if begin < 0:
            begin = offset
        elif offset - end > _RANGE_GAP_BYTES or offset + length - begin > RANGE_BYTES:
            yield _Group(first, at, begin, end - begin)
            first, begin = at, offset
        end = offset + length
    if begin >= 0:
        yield _Group(first, len(frames.pgnos), begin, end - begin)


def _frame_size_max(page_size: int) -> int:
    """No page frame is longer than this, in either encoding."""
    return _FRAME_HEADER.size + page_size + page_size // 255 + _FRAME_OVERHEAD


class _Pages:
    """The output file, and which of its pages are written.

    Attributes:
        page_size, commit: of the database.
        written: one byte for each page number, not zero when the page is written.
        n_written: how many are.
        n_decoded: pages decompressed, for the result.
    """

    def __init__(
        self, fd: int, page_size: int, commit: int, on_written: Callable[[int], object] | None
    ) -> None:
        os.ftruncate(fd, commit * page_size)
        self.page_size = page_size
        self.commit = commit
        self.written = bytearray(commit + 1)
        self.written[0] = 1  # there is no page 0
        self.n_written = 0
        self.n_decoded = 0
        self._fd = fd
        self._on_written = on_written
        self._pieces: list[bytes] = []
        self._next = 0

    def add(self, pgno: int, page: bytes) -> None:
        """Write a page, sooner or later: at the latest in `flush`."""
        if pgno != self._next or len(self._pieces) == _BATCH_PAGES:
            self.flush()
        self._pieces.append(page)
        self._next = pgno + 1

    def flush(self) -> None:
        """Write what `add` has kept."""
        if self._pieces:
            self.write_run(self._next - len(self._pieces), self._pieces)
            self._pieces.clear()
        self._next = 0

    def write_run(self, first: int, pieces: Sequence[bytes]) -> None:
        """Write consecutive pages, at most `_BATCH_PAGES`."""
        n_pages = len(pieces)
        offset = (first - 1) * self.page_size
        length = n_pages * self.page_size
        done = os.pwritev(self._fd, pieces, offset)
        if done != length:
            _write_rest(self._fd, memoryview(b"".join(pieces))[done:], offset + done)
        self.written[first : first + n_pages] = _ONES[:n_pages]
        self.n_written += n_pages
        if self._on_written is not None:
            self._on_written(self.n_written * self.page_size)

    def require_complete(self) -> None:
        """Raise `FormatError` unless every page but the lock page is written."""
        lock = lock_pgno(self.page_size)
        if lock <= self.commit:
            self.written[lock] = 1
        missing = self.written.find(0)
        if missing >= 0:
            raise FormatError(
                f"the replica is damaged: page {missing} of {self.commit} is in no segment"
            )

    def applied(self) -> Applied:
        return Applied(
            page_size=self.page_size,
            commit=self.commit,
            pages_decoded=self.n_decoded,
            pages_written=self.n_written,
        )


def _write_rest(fd: int, rest: memoryview, offset: int) -> None:
    # A short write is rare (a signal, a disk that is almost full); the next call says why.
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest = rest[done:]
        offset += done


class _Scanner:
    """Decodes one segment that arrives in pieces, verifies all of it and writes the winners.

    `feed` must be given the file from its first byte to its last, in order.  The page index is
    covered by the file checksum and otherwise not looked at: the frames themselves are read.
    """

    def __init__(
        self, segment: SegmentInfo, accept: Callable[[SegmentInfo, Header], _Pages]
    ) -> None:
        self._segment = segment
        self._accept = accept
        self._left = segment.size_bytes
        self._carry = b""  # a frame whose end is in the next piece
        self._need = HEADER_SIZE  # bytes that hold any header or frame
        self._header: Header | None = None
        self._pages: _Pages
        self._crc = 0
        self._last_pgno = 0
        self._n_pages = 0
        self._in_index = False
        self._n_index_bytes = 0
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Take the next piece; the last one, known by the segment's size, completes the checks.

        Raises:
            FormatError: the file is damaged.
        """
        self._left -= len(data)
        pos = 0
        if self._carry:
            # Join no more of the piece than what has begun can need: copying it costs time.
            joined = self._carry + data[: self._need]
            if len(data) <= self._need:
                data = joined
            else:
                pos = self._take(joined, 0, False) - len(self._carry)
        pos = self._take(data, pos, self._left == 0)
        self._carry = data[pos:]
        if self._left == 0:
            self._finish()

    def _take(self, data: bytes, pos: int, final: bool) -> int:
        """Work on ``data`` from ``pos``; return how far that went."""
        if self._header is None:
            if len(data) < HEADER_SIZE and not final:
                return pos
            self._begin(data[:HEADER_SIZE])
            pos = HEADER_SIZE
        if not self._in_index:
            pos = self._scan(data, pos, final)
        if self._in_index:
            rest = self._tail + data[pos:]
            self._n_index_bytes += len(data) - pos
            # The last 24 bytes (size of the index, trailer) are looked at in the end.
            self._crc = fastcrc.crc64.go_iso(rest[:-_INDEX_TAIL_SIZE], self._crc)
            self._tail = rest[-_INDEX_TAIL_SIZE:]
            pos = len(data)
        return pos

    def _begin(self, data: bytes) -> None:
        header = Header.unpack(data)
        self._pages = self._accept(self._segment, header)
        self._header = header
        self._need = _frame_size_max(header.page_size)
        self._crc = fastcrc.crc64.go_iso(data)

    def _scan(self, data: bytes, pos: int, final: bool) -> int:
        """Decode the page frames of ``data`` from ``pos`` on; return where that ended.

        This is the loop that a restore spends its time in: everything is a local variable, and
        what belongs to `_Pages.add` stands here in place of a call.
        """
        assert self._header is not None
        pages = self._pages
        page_size = pages.page_size
        commit = pages.commit
        written = pages.written
        own_commit = self._header.commit
        lock = lock_pgno(page_size)
        block_max = page_size + page_size // 255 + 16
        last_pgno, n_pages, checksum = self._last_pgno, self._n_pages, self._crc
        unpack_frame = _FRAME_HEADER.unpack_from
        decompress = lz4.block.decompress
        crc64 = fastcrc.crc64.go_iso
        view = memoryview(data)
        end = len(data)
        # Short of the end of the file a frame is only begun if it is certain to be here as a whole.
        stop_before = end - _FRAME_HEADER.size if final else end - self._need
        pieces: list[bytes] = []
        next_pgno = 0
        try:
            while pos <= stop_before:
                pgno, flags, length = unpack_frame(data, pos)
                if flags == _FLAG_BLOCK:
                    body = pos + 10
                    stop = body + length
                    if stop > end or length > block_max:
                        raise FormatError(f"the frame of page {pgno} is cut off or too long")
                    page = decompress(view[body:stop], uncompressed_size=page_size)
                elif flags == 0 and pgno:
                    body = pos + 6
                    if data[body + 4] & _FRAME_HAS_SIZE:
                        # lz4 would allocate whatever the frame announces.
                        announced = int.from_bytes(data[body + 6 : body + 14], "little")
                        if announced != page_size:
                            raise FormatError(f"page {pgno} has {announced} bytes")
                    page, length = lz4.frame.decompress(
                        view[body : body + page_size + _FRAME_OVERHEAD], return_bytes_read=True
                    )
                    stop = body + length
                elif data[pos : pos + 6] == _PAGES_END:
                    checksum = crc64(_PAGES_END, checksum)
                    pos += 6
                    self._in_index = True
                    break
                else:
                    raise FormatError(f"page {pgno} has unknown flags 0x{flags:04x}")
                if len(page) != page_size:
                    raise FormatError(f"page {pgno} has {len(page)} bytes instead of {page_size}")
                if not last_pgno < pgno <= own_commit or pgno == lock:
                    raise FormatError(
                        f"page {pgno} cannot follow page {last_pgno} in a database of"
                        f" {own_commit} pages"
                    )
                checksum = crc64(page, crc64(view[pos:body], checksum))
                last_pgno = pgno
                n_pages += 1
                pos = stop
                if pgno <= commit and not written[pgno]:
                    if pgno != next_pgno or len(pieces) == _BATCH_PAGES:
                        if pieces:
                            pages.write_run(next_pgno - len(pieces), pieces)
                            pieces.clear()
                        next_pgno = pgno
                    pieces.append(page)
                    next_pgno += 1
            else:
                if final:
                    raise FormatError("it ends inside its pages")
        except (lz4.block.LZ4BlockError, RuntimeError, ValueError, IndexError) as error:
            raise FormatError(f"page {pgno} cannot be decompressed") from error
        if pieces:
            pages.write_run(next_pgno - len(pieces), pieces)
        pages.n_decoded += n_pages - self._n_pages
        self._last_pgno, self._n_pages, self._crc = last_pgno, n_pages, checksum
        return pos

    def _finish(self) -> None:
        header = self._header
        if header is None or len(self._tail) != _INDEX_TAIL_SIZE:
            raise FormatError("it ends before its trailer")
        index_size, post_apply, checksum = _INDEX_TAIL.unpack(self._tail)
        if checksum != fastcrc.crc64.go_iso(self._tail[:-8], self._crc) | _CHECKSUM_FLAG:
            raise ChecksumError("its file checksum does not match")
        if index_size + _INDEX_TAIL_SIZE != self._n_index_bytes:
            raise FormatError("the size of its page index is wrong")
        if post_apply and header.flags & HEADER_FLAG_NO_CHECKSUM:
            raise FormatError("it has a database checksum although its header denies that")
        if header.min_txid == 1:
            # Ascending and not above commit was seen, so the number says whether all are there.
            n_expected = header.commit - (lock_pgno(header.page_size) <= header.commit)
            if self._n_pages != n_expected:
                raise FormatError(
                    f"it should hold the whole database, but has {self._n_pages} of"
                    f" {n_expected} pages"
                )
