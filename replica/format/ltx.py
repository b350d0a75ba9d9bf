"""LTX files: header, page frames, page index, trailer; a streaming encoder and decoder.

Basis: superfly/ltx v0.5.2, as Litestream 0.5 writes and reads it.  Fixed-width integers are
big-endian::

    header (100) | page frame * N | 6 zero bytes | index entry * N | 00 | index size (u64) | trailer

    header                                            page frame
      0  "LTX1"               40  pre-apply checksum     0  page number, u32, >= 1
      4  flags                48  WAL offset             4  flags, u16
      8  page size            56  WAL size               6  with flag 1: payload length, u32, then
     12  commit (pages)       64  WAL salt-1, salt-2        the page as one LZ4 block;
     16  min TXID             72  node id                   without: the page as one LZ4 frame
     24  max TXID             80  20 reserved bytes
     32  timestamp, ms                                trailer
                                                         0  post-apply checksum
    index entry: page number, offset and length of       8  file checksum
    its frame, as unsigned LEB128 varints

The index size counts the entries and the zero byte.  Page numbers ascend.  A file with min TXID 1
is a snapshot and holds every page 1 .. commit, except the lock page, which no file ever holds.

The file checksum is the CRC-64 of the file with each payload replaced by its decompressed page,
up to the file checksum itself.  Flag 2 in the header says that pre- and post-apply checksums are
not kept and therefore 0.  Only such files are written; files that keep them can be read.

The decoder is stricter than the reference: it also insists on ascending page numbers up to commit,
complete snapshots, pages of exactly the page size, an index that equals the frames, and nothing
behind the trailer.  Any input gives pages or a ``FormatError``; memory is bounded by the sizes the
format allows, never by a field of the file.  Pages come out *before* the checksum behind them is
verified: whoever applies them must not let the result be seen until the iteration has ended.

Bytes go out and come in through callables; nothing here opens a file.  Whether files continue each
other is the business of ``merge`` and of the planners.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

import lz4.block
import lz4.frame

from walship.replica.errors import ChecksumError, FormatError

from .checksum import CHECKSUM_FLAG, BytesLike, RollingChecksum, crc64
from .types import TXID_MAX, WalSalts, is_page_size, lock_pgno

__all__ = [
    "HEADER_FLAG_NO_CHECKSUM",
    "HEADER_SIZE",
    "NO_SALTS",
    "TRAILER_SIZE",
    "Decoder",
    "EncodedSegment",
    "Encoder",
    "Frame",
    "Header",
    "PageEncoding",
    "PageIndex",
    "Source",
    "decode",
    "decode_frames",
    "index_size_from_tail",
    "iter_frames",
    "page_frame",
    "parse_index",
]

HEADER_SIZE: Final = 100
TRAILER_SIZE: Final = 16
HEADER_FLAG_NO_CHECKSUM: Final = 0x2

_MAGIC: Final = b"LTX1"
_HEADER: Final = struct.Struct(">4s3I2QqQ2q2IQ20x")
_PAGE_HEADER: Final = struct.Struct(">IH")
_BLOCK_HEADER: Final = struct.Struct(">IHI")
_TRAILER: Final = struct.Struct(">2Q")
_U64: Final = struct.Struct(">Q")

_PAGE_FLAG_BLOCK: Final = 0x0001
_END_OF_PAGES: Final = bytes(_PAGE_HEADER.size)
# Index size and trailer: what lies between the index and the end of the file.
_TAIL_SIZE: Final = _U64.size + TRAILER_SIZE

# The salts of a file that does not come from a WAL.
NO_SALTS: Final = WalSalts(0, 0)

_U32_MAX: Final = 2**32 - 1
_U64_MAX: Final = 2**64 - 1
_I64_MAX: Final = 2**63 - 1

# Output is handed on in batches of about this size, and of no more buffers than one writev() takes
# (IOV_MAX is 1024 on Linux and macOS).
_BATCH_BYTES: Final = 512 * 1024
_BATCH_BUFFERS: Final = 1020
# Frames whose index entries are encoded together.
_INDEX_BATCH: Final = 512
_CHUNK_BYTES: Final = 256 * 1024

# No u64 has that many groups.  Looked for before parsing, because the parser's loop would build an
# ever longer integer from such bytes, in quadratic time.
_TOO_LONG_VARINT: Final = re.compile(rb"[\x80-\xff]{10}")

_LZ4_FRAME_MAGIC: Final = b"\x04\x22\x4d\x18"
_LZ4_FRAME_VERSION_MASK: Final = 0xC0
_LZ4_FRAME_VERSION_1: Final = 0x40
_LZ4_FRAME_CONTENT_SIZE: Final = 0x08
_LZ4_FRAME_CONTENT_CHECKSUM: Final = 0x04
_LZ4_FRAME_MIN_SIZE: Final = 15

_compress_block = lz4.block.compress
_decompress_block = lz4.block.decompress
_LZ4_ERRORS: Final = (lz4.block.LZ4BlockError, RuntimeError, ValueError)

# One page as it comes out of a file: page number, its LZ4 block if it is stored as one, the page.
Frame: TypeAlias = tuple[int, BytesLike | None, bytes]
# Where a file comes from: all of it, or ``read(n)`` which gives up to n bytes and b"" at the end.
Source: TypeAlias = BytesLike | Callable[[int], BytesLike]


class PageEncoding(Enum):
    """How pages are stored.

    BLOCK is what Litestream 0.5.16 and newer write; older versions read FRAME only.
    """

    BLOCK = "block"
    FRAME = "frame"


# --- Header -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first 100 bytes of an LTX file.

    Attributes:
        page_size: bytes, a power of two from 512 to 65536.
        commit: database size in pages after the file is applied.
        min_txid: first TXID, >= 1; 1 makes the file a snapshot.
        max_txid: last TXID, >= min_txid.
        timestamp_ms: milliseconds since the Unix epoch (UTC), signed.
        wal_offset: byte offset in the source WAL where the range began; 0 for "no WAL".
        wal_size: bytes of that range.
        salts: salts of that WAL.
        node_id: free for use; Litestream writes 0.
        flags: bit 1 (value 2) means that no database checksums are kept.
        pre_apply_checksum: database checksum before the file; 0 with flag 2 and in snapshots.
    """

    page_size: int
    commit: int
    min_txid: int
    max_txid: int
    timestamp_ms: int
    wal_offset: int = 0
    wal_size: int = 0
    salts: WalSalts = NO_SALTS
    node_id: int = 0
    flags: int = HEADER_FLAG_NO_CHECKSUM
    pre_apply_checksum: int = 0

    @property
    def is_snapshot(self) -> bool:
        """Whether the file must hold the complete database."""
        return self.min_txid == 1

    @property
    def tracks_checksums(self) -> bool:
        """Whether database checksums are kept (never by Litestream, never by us)."""
        return not self.flags & HEADER_FLAG_NO_CHECKSUM

    def validate(self) -> None:
        """Check every field against the format.

        Raises:
            FormatError: names the first field that is wrong.
        """
        if self.flags & ~HEADER_FLAG_NO_CHECKSUM:
            raise FormatError(f"LTX header has unknown flags: 0x{self.flags:08x}")
        if not is_page_size(self.page_size):
            raise FormatError(f"LTX header has an impossible page size: {self.page_size}")
        if not 0 <= self.commit <= _U32_MAX:
            raise FormatError(f"LTX header has an impossible commit size: {self.commit} pages")
        if self.commit == 0 and not self.tracks_checksums:
            raise FormatError("LTX header has commit 0: a database has at least one page")
        if not 1 <= self.min_txid <= self.max_txid <= TXID_MAX:
            raise FormatError(
                f"LTX header has an impossible TXID range: {self.min_txid} to {self.max_txid}"
            )
        if not -_I64_MAX - 1 <= self.timestamp_ms <= _I64_MAX:
            raise FormatError(f"LTX header has an impossible timestamp: {self.timestamp_ms} ms")
        if not 0 <= self.wal_offset <= _I64_MAX:
            raise FormatError(f"LTX header has an impossible WAL offset: {self.wal_offset}")
        if not 0 <= self.wal_size <= _I64_MAX:
            raise FormatError(f"LTX header has an impossible WAL size: {self.wal_size}")
        if not (0 <= self.salts[0] <= _U32_MAX and 0 <= self.salts[1] <= _U32_MAX):
            raise FormatError(f"LTX header has impossible WAL salts: {tuple(self.salts)}")
        if self.wal_offset == 0 and (self.wal_size or any(self.salts)):
            raise FormatError("LTX header has a WAL size or salts but no WAL offset")
        if not 0 <= self.node_id <= _U64_MAX:
            raise FormatError(f"LTX header has an impossible node id: {self.node_id}")
        if not self.tracks_checksums or self.is_snapshot:
            if self.pre_apply_checksum != 0:
                raise FormatError("LTX header has a pre-apply checksum where none is allowed")
        elif not CHECKSUM_FLAG <= self.pre_apply_checksum <= _U64_MAX:
            raise FormatError("LTX header lacks a valid pre-apply checksum")

    def pack(self) -> bytes:
        """The 100 bytes of this header.

        Raises:
            FormatError: as ``validate``.
        """
        self.validate()
        return _HEADER.pack(
            _MAGIC,
            self.flags,
            self.page_size,
            self.commit,
            self.min_txid,
            self.max_txid,
            self.timestamp_ms,
            self.pre_apply_checksum,
            self.wal_offset,
            self.wal_size,
            *self.salts,
            self.node_id,
        )

    @classmethod
    def unpack(cls, data: BytesLike) -> Header:
        """Read and validate a header; bytes after the first 100 are ignored.

        Raises:
            FormatError: if this is not the header of an LTX file.
        """
        if len(data) < HEADER_SIZE:
            raise FormatError(
                f"LTX file is cut off: {len(data)} bytes, but the header alone has {HEADER_SIZE}"
            )
        fields = _HEADER.unpack_from(data)
        if fields[0] != _MAGIC:
            raise FormatError(f"not an LTX file: it begins with {bytes(fields[0])!r}, not 'LTX1'")
        header = cls(
            flags=fields[1],
            page_size=fields[2],
            commit=fields[3],
            min_txid=fields[4],
            max_txid=fields[5],
            timestamp_ms=fields[6],
            pre_apply_checksum=fields[7],
            wal_offset=fields[8],
            wal_size=fields[9],
            salts=WalSalts(fields[10], fields[11]),
            node_id=fields[12],
        )
        header.validate()
        return header


# --- Pages --------------------------------------------------------------------------------------


def _max_block_size(page_size: int) -> int:
    """Most bytes an LZ4 block of one page can have."""
    return page_size + page_size // 255 + 16


def _max_frame_size(page_size: int) -> int:
    """Most bytes of one page frame that are looked at.

    An LZ4 frame of one page is hardly longer than the page; the allowance is for frames that are
    cut into several blocks.
    """
    return _BLOCK_HEADER.size + page_size + page_size // 255 + 1024


def _out_of_range(pgno: int, last_pgno: int, commit: int) -> FormatError:
    """The error for a page number that is not in ``last_pgno + 1 .. commit``."""
    if pgno < 1:
        return FormatError(f"there is no page number {pgno}")
    if pgno > commit:
        return FormatError(f"page {pgno} lies above the commit size of {commit} pages")
    return FormatError(f"page {pgno} comes after page {last_pgno}")


def _compress_lz4_frame(page: BytesLike) -> bytes:
    # The options of Litestream 0.5.0 .. 0.5.15, whose reader needs the content checksum.
    frame: bytes = lz4.frame.compress(
        page,
        block_size=lz4.frame.BLOCKSIZE_MAX64KB,
        block_linked=False,
        content_checksum=True,
        store_size=False,
    )
    return frame


def _decompress_lz4_block(block: BytesLike, page_size: int, pgno: int) -> bytes:
    try:
        page: bytes = _decompress_block(block, uncompressed_size=page_size)
    except _LZ4_ERRORS as exc:
        raise FormatError(f"page {pgno} cannot be decompressed: damaged data") from exc
    if len(page) != page_size:
        raise FormatError(f"page {pgno} has {len(page)} bytes, the page size is {page_size}")
    return page


def _decompress_lz4_frame(data: memoryview, page_size: int, pgno: int) -> tuple[bytes, int]:
    """The page in the LZ4 frame at the start of ``data``, and the length of that frame."""
    if len(data) < _LZ4_FRAME_MIN_SIZE or bytes(data[:4]) != _LZ4_FRAME_MAGIC:
        raise FormatError(f"page {pgno} does not begin with an LZ4 frame")
    flags = data[4]
    # Readers of this encoding expect exactly end mark and content checksum behind the data.
    if (
        flags & _LZ4_FRAME_VERSION_MASK != _LZ4_FRAME_VERSION_1
        or not flags & _LZ4_FRAME_CONTENT_CHECKSUM
    ):
        raise FormatError(f"page {pgno} is in an LZ4 frame of an unsupported kind")
    # The decompressor would allocate whatever size the frame announces.
    if flags & _LZ4_FRAME_CONTENT_SIZE:
        announced = int.from_bytes(data[6:14], "little")
        if announced != page_size:
            raise FormatError(f"page {pgno} has {announced} bytes, the page size is {page_size}")
    try:
        page, n_read = lz4.frame.decompress(data, return_bytes_read=True)
    except _LZ4_ERRORS as exc:
        raise FormatError(f"page {pgno} cannot be decompressed: damaged data") from exc
    if len(page) != page_size:
        raise FormatError(f"page {pgno} has {len(page)} bytes, the page size is {page_size}")
    return page, n_read


def _decode_frame(
    data: memoryview, page_size: int
) -> tuple[int, memoryview | None, bytes, int, int]:
    """The frame at the start of ``data``: pgno, block, page, header length, frame length."""
    if len(data) < _BLOCK_HEADER.size:
        raise FormatError("page frame is cut off")
    pgno, flags, size = _BLOCK_HEADER.unpack_from(data)
    if pgno == 0:
        raise _out_of_range(pgno, 0, 0)
    if flags == _PAGE_FLAG_BLOCK:
        end = _BLOCK_HEADER.size + size
        if size > _max_block_size(page_size):
            raise FormatError(f"page {pgno} has an impossible length: {size} bytes")
        if end > len(data):
            raise FormatError(f"page {pgno} is cut off")
        block = data[_BLOCK_HEADER.size : end]
        page = _decompress_lz4_block(block, page_size, pgno)
        return pgno, block, page, _BLOCK_HEADER.size, end
    if flags == 0:
        window = data[_PAGE_HEADER.size : _max_frame_size(page_size)]
        page, n_read = _decompress_lz4_frame(window, page_size, pgno)
        return pgno, None, page, _PAGE_HEADER.size, _PAGE_HEADER.size + n_read
    raise FormatError(f"page {pgno} has unknown flags: 0x{flags:04x}")


def page_frame(data: BytesLike, page_size: int, pgno: int) -> bytes:
    """Decode one page frame, as fetched with the help of the page index.

    No checksum is involved, except in frames of the older encoding.

    Args:
        data: exactly the bytes of the frame.
        page_size: from the file's header.
        pgno: the page that is expected.

    Raises:
        FormatError: if ``data`` is not the frame of that page.
    """
    view = memoryview(data)
    found, _, page, _, length = _decode_frame(view, page_size)
    if found != pgno:
        raise FormatError(f"page frame holds page {found}, page {pgno} was expected")
    if length != len(view):
        raise FormatError(f"frame of page {pgno} has {length} bytes, {len(view)} were expected")
    return page


def decode_frames(
    data: BytesLike, page_size: int, previous: int = 0
) -> tuple[list[tuple[int, bytes]], int]:
    """Decode a run of whole page frames, as fetched by a ranged read.

    Args:
        data: one or more frames and nothing else.
        page_size: from the file's header.
        previous: CRC of the file before ``data``, or 0 to combine the results later.

    Returns:
        The pages with their numbers, and the CRC after them.  In the terms of ``crc64_combine``
        a page counts with its frame header (10 bytes; 6 in the older encoding) and its page size.

    Raises:
        FormatError: if the frames are damaged.  Their order is not checked.
    """
    view = memoryview(data)
    available = len(view)
    max_block = _max_block_size(page_size)
    unpack = _BLOCK_HEADER.unpack_from
    pages = []
    crc = previous
    position = 0
    while position < available:
        if available - position < _BLOCK_HEADER.size:
            raise FormatError("page frame is cut off")
        pgno, flags, size = unpack(view, position)
        start = position + _BLOCK_HEADER.size
        end = start + size
        # The usual case is spelled out because a call per page costs 15 percent.
        if flags == _PAGE_FLAG_BLOCK and 0 < size <= max_block and end <= available and pgno:
            page = _decompress_lz4_block(view[start:end], page_size, pgno)
        else:
            pgno, _, page, header_length, length = _decode_frame(view[position:], page_size)
            start = position + header_length
            end = position + length
        crc = crc64(page, crc64(view[position:start], crc))
        pages.append((pgno, page))
        position = end
    return pages, crc


# --- Page index ---------------------------------------------------------------------------------


class PageIndex(NamedTuple):
    """Where the frame of each page lies, as three parallel arrays in ascending page order.

    Attributes:
        pgnos: page numbers (array type "I").
        offsets: byte offset of the frame in the file (array type "Q").
        lengths: bytes of the frame, including its header (array type "I").
    """

    pgnos: array[int]
    offsets: array[int]
    lengths: array[int]

    def find(self, pgno: int) -> tuple[int, int] | None:
        """Offset and length of a page's frame, or None if the file does not hold the page."""
        at = bisect_left(self.pgnos, pgno)
        if at == len(self.pgnos) or self.pgnos[at] != pgno:
            return None
        return self.offsets[at], self.lengths[at]

    @property
    def end_offset(self) -> int:
        """Byte offset behind the last frame."""
        return self.offsets[-1] + self.lengths[-1] if self.offsets else HEADER_SIZE


def _append_entries(
    out: bytearray, pgnos: Iterable[int], lengths: Iterable[int], offset: int
) -> int:
    """Append index entries of frames that follow each other from ``offset``; returns their end."""
    append = out.append
    for pgno, length in zip(pgnos, lengths, strict=True):
        while pgno > 127:
            append(pgno & 127 | 128)
            pgno >>= 7
        append(pgno)
        varint = offset
        while varint > 127:
            append(varint & 127 | 128)
            varint >>= 7
        append(varint)
        offset += length
        while length > 127:
            append(length & 127 | 128)
            length >>= 7
        append(length)
    return offset


def index_size_from_tail(tail: BytesLike) -> int:
    """How many bytes at the end of a file ``parse_index`` needs.

    Args:
        tail: the end of the file, at least its last 24 bytes.

    Returns:
        Bytes from the start of the index to the end of the file.  Not verified against anything:
        compare it with the size of the file before fetching.

    Raises:
        FormatError: if the tail is too short or the size impossible.
    """
    if len(tail) < _TAIL_SIZE:
        raise FormatError(f"end of an LTX file has {len(tail)} bytes, {_TAIL_SIZE} are needed")
    (index_size,) = _U64.unpack_from(tail, len(tail) - _TAIL_SIZE)
    if not 1 <= index_size <= _I64_MAX:
        raise FormatError(f"LTX file has an impossible index size: {index_size} bytes")
    return int(index_size) + _TAIL_SIZE


def parse_index(tail: BytesLike, *, file_size: int | None = None) -> PageIndex:
    """Read the page index at the end of a file.

    Args:
        tail: the end of the file, at least ``index_size_from_tail`` bytes; more does not hurt.
        file_size: bytes of the whole file, to check that the frames end where the index begins.

    Raises:
        FormatError: unless page numbers ascend and the frames follow each other without a gap from
            the header on.  The file checksum is not verified.
    """
    view = memoryview(tail)
    size = index_size_from_tail(view)
    if size > len(view):
        raise FormatError(f"page index needs {size} bytes, only {len(view)} are at hand")
    start = len(view) - size
    entries = bytes(view[start : len(view) - _TAIL_SIZE])
    if entries[-1] != 0:
        raise FormatError("page index does not end with a zero byte")
    if _TOO_LONG_VARINT.search(entries):
        raise FormatError("page index is damaged")
    pgnos = array("I")
    offsets = array("Q")
    lengths = array("I")
    add_pgno, add_offset, add_length = pgnos.append, offsets.append, lengths.append
    last_pgno = 0
    expected_offset = HEADER_SIZE
    # A group of zeros behind others ("80 00") would be a second spelling of the same number; the
    # loop leaves on it as on anything else that is wrong.
    is_end = False
    take = iter(entries)
    try:
        for byte in take:
            if byte > 127:
                value = byte & 127
                shift = 7
                while (byte := next(take)) > 127:
                    value |= (byte & 127) << shift
                    shift += 7
                if byte == 0:
                    break
                pgno = value | byte << shift
            else:
                pgno = byte
            if pgno <= last_pgno:
                is_end = pgno == 0
                break
            add_pgno(pgno)
            last_pgno = pgno
            byte = next(take)
            value = byte & 127
            shift = 7
            while byte > 127:
                byte = next(take)
                value |= (byte & 127) << shift
                shift += 7
            if byte == 0:
                break
            if value != expected_offset:
                raise FormatError(
                    f"page index puts page {pgno} at offset {value}, not at {expected_offset}"
                )
            add_offset(value)
            byte = next(take)
            value = byte & 127
            shift = 7
            while byte > 127:
                byte = next(take)
                value |= (byte & 127) << shift
                shift += 7
            if byte == 0:
                break
            if value <= _PAGE_HEADER.size:
                raise FormatError(f"page index gives page {pgno} {value} bytes")
            add_length(value)
            expected_offset += value
    except (StopIteration, OverflowError):
        raise FormatError("page index is damaged") from None
    if not is_end or next(take, None) is not None:
        raise FormatError(f"page index is damaged or out of order after page {last_pgno}")
    if file_size is not None and expected_offset + len(_END_OF_PAGES) != file_size - size:
        raise FormatError("page index does not fit the size of the file")
    return PageIndex(pgnos, offsets, lengths)


# --- Encoder ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """What ``Encoder.finish`` knows about the file it wrote.

    Attributes:
        size_bytes: length of the file.
        checksum: its file checksum, bit 63 set.
        n_pages: pages in it.
    """

    size_bytes: int
    checksum: int
    n_pages: int


class Encoder:
    """Writes one LTX file: pages in ascending order, then ``finish``.  Not thread-safe.

    Nothing is written before the first batch is full or ``finish`` is called; a file for which
    ``finish`` did not return is incomplete.  Pages may be reused by the caller as soon as
    ``add_page`` returns; blocks given to ``add_block`` are kept until they are written.

    Args:
        write: takes a list of buffers, in file order; suits ``file.writelines`` and, as there are
            never more than 1024, ``os.writev`` (mind its short writes).
        header: what the file will begin with; must not track checksums.
        encoding: how ``add_page`` stores pages.

    Raises:
        FormatError: if the header is not one that may be written.
    """

    def __init__(
        self,
        write: Callable[[Sequence[BytesLike]], object],
        header: Header,
        encoding: PageEncoding = PageEncoding.BLOCK,
    ) -> None:
        packed = header.pack()
        if header.tracks_checksums:
            raise FormatError("LTX files that track checksums cannot be written: use flags 2")
        self.header = header
        self.encoding = encoding
        self._write = write
        self._is_snapshot = header.is_snapshot
        self._is_block = encoding is PageEncoding.BLOCK
        self._page_size = header.page_size
        self._commit = header.commit
        self._lock_pgno = lock_pgno(header.page_size)
        self._last_pgno = 0
        self._n_pages = 0
        self._crc = crc64(packed)
        self._pending: list[BytesLike] = [packed]
        self._pending_bytes = len(packed)
        self._offset = len(packed)
        self._index = bytearray()
        self._index_offset = len(packed)
        self._index_pgnos: list[int] = []
        self._index_lengths: list[int] = []
        self._finished = False

    def add_page(self, pgno: int, page: BytesLike) -> None:
        """Compress and append one page.

        Raises:
            FormatError: if the page has the wrong size, its number does not ascend, is above
                commit, is the lock page's, or leaves a hole in a snapshot.
        """
        if self._is_block:
            self.add_block(pgno, _compress_block(page, store_size=False), page)
            return
        self._check(pgno, page)
        self._append(_PAGE_HEADER.pack(pgno, 0), _compress_lz4_frame(page), pgno, page)

    def add_block(self, pgno: int, block: BytesLike, page: BytesLike) -> None:
        """Append one page that is already an LZ4 block, whatever ``encoding`` says.

        Args:
            pgno: page number.
            block: the page as one LZ4 block.  Not verified: it must decompress to ``page``.
            page: the page itself, for the file checksum.

        Raises:
            FormatError: as ``add_page``.
        """
        self._check(pgno, page)
        self._append(_BLOCK_HEADER.pack(pgno, _PAGE_FLAG_BLOCK, len(block)), block, pgno, page)

    def finish(self) -> EncodedSegment:
        """Write what is left: index and trailer.

        Raises:
            FormatError: if a snapshot is incomplete.
        """
        if self._finished:
            raise FormatError("LTX file is already finished")
        if self._is_snapshot:
            self._check_no_hole(self._commit + 1)
        self._finished = True
        self._extend_index()
        self._index.append(0)
        self._index += _U64.pack(len(self._index))
        post_apply = bytes(8)
        crc = crc64(_END_OF_PAGES, self._crc)
        crc = crc64(self._index, crc)
        checksum = crc64(post_apply, crc) | CHECKSUM_FLAG
        last: list[BytesLike] = [_END_OF_PAGES, self._index, post_apply, _U64.pack(checksum)]
        size_bytes = self._offset + sum(map(len, last))
        self._write(self._pending + last)
        self._pending = []
        return EncodedSegment(size_bytes, checksum, self._n_pages)

    def _check(self, pgno: int, page: BytesLike) -> None:
        if len(page) != self._page_size:
            raise FormatError(
                f"page {pgno} has {len(page)} bytes, the page size is {self._page_size}"
            )
        if not self._last_pgno < pgno <= self._commit:
            raise _out_of_range(pgno, self._last_pgno, self._commit)
        if pgno == self._lock_pgno:
            raise FormatError(f"page {pgno} is the lock page, which is never stored")
        if self._is_snapshot:
            self._check_no_hole(pgno)
        if self._finished:
            raise FormatError("LTX file is already finished")

    def _check_no_hole(self, next_pgno: int) -> None:
        expected = self._last_pgno + 1
        if expected == self._lock_pgno:
            expected += 1
        if next_pgno > expected:
            raise FormatError(f"snapshot lacks page {expected}")

    def _append(self, head: bytes, payload: BytesLike, pgno: int, page: BytesLike) -> None:
        self._crc = crc64(page, crc64(head, self._crc))
        length = len(head) + len(payload)
        pending = self._pending
        pending.append(head)
        pending.append(payload)
        self._offset += length
        self._pending_bytes += length
        self._last_pgno = pgno
        self._n_pages += 1
        self._index_pgnos.append(pgno)
        self._index_lengths.append(length)
        if self._pending_bytes >= _BATCH_BYTES or len(pending) >= _BATCH_BUFFERS - 4:
            self._extend_index()
            self._pending = []
            self._pending_bytes = 0
            self._write(pending)

    def _extend_index(self) -> None:
        self._index_offset = _append_entries(
            self._index, self._index_pgnos, self._index_lengths, self._index_offset
        )
        self._index_pgnos.clear()
        self._index_lengths.clear()


# --- Decoder ------------------------------------------------------------------------------------


class Decoder:
    """Reads one LTX file once, from front to back, and verifies all of it.  Not thread-safe.

    ``header`` is there at once.  Iterating gives ``(pgno, page)``, ``frames()`` also the LZ4
    block; either one verifies index, trailer and file checksum when it comes to its end, and
    ``finish`` goes there directly.  From a ``read`` callable at most one chunk and one page are
    held, plus about 9 bytes of index per page.

    Args:
        source: the whole file, or ``read(n)`` which gives at most n bytes and none at the end.
        name: what error messages call the file.
        chunk_bytes: how much to ask ``read`` for.

    Raises:
        FormatError: here and while iterating, if the file is not valid or damaged.
        ChecksumError: if the only thing wrong is a checksum.
    """

    def __init__(
        self, source: Source, *, name: str = "LTX file", chunk_bytes: int = _CHUNK_BYTES
    ) -> None:
        self.name = name
        self._chunk_bytes = chunk_bytes
        self._read: Callable[[int], BytesLike] | None
        if isinstance(source, bytes | bytearray | memoryview):
            self._read = None
            self._data = memoryview(source).cast("B")
        else:
            self._read = source
            self._data = memoryview(b"")
            self._refill(0, HEADER_SIZE)
        try:
            self.header = Header.unpack(self._data)
        except FormatError as exc:
            raise FormatError(f"{name}: {exc}") from None
        self._frames = self._generate()
        self._segment: EncodedSegment | None = None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for pgno, _, page in self._frames:
            yield pgno, page

    def frames(self) -> Iterator[Frame]:
        """The pages that were not taken yet, each with its LZ4 block if it is stored as one."""
        return self._frames

    def finish(self) -> EncodedSegment:
        """Read and verify what is left of the file; can be called again.

        Returns:
            Size, checksum and number of pages of the file.

        Raises:
            FormatError: if the file is not valid or was found invalid before.
        """
        for _ in self._frames:
            pass
        if self._segment is None:
            raise FormatError(f"{self.name}: could not be decoded to its end")
        return self._segment

    def _refill(self, position: int, n_wanted: int) -> None:
        """Drop what lies before ``position`` and read until ``n_wanted`` bytes are at hand."""
        rest = self._data[position:]
        pieces: list[BytesLike] = [rest]
        n_bytes = len(rest)
        while self._read is not None and n_bytes < n_wanted:
            piece = self._read(max(self._chunk_bytes, n_wanted - n_bytes))
            if len(piece) == 0:
                self._read = None
            pieces.append(piece)
            n_bytes += len(piece)
        self._data = memoryview(b"".join(pieces))

    def _generate(self) -> Iterator[Frame]:
        try:
            yield from self._pages()
        except ChecksumError as exc:
            raise ChecksumError(f"{self.name}: {exc}") from exc.__cause__
        except FormatError as exc:
            raise FormatError(f"{self.name}: {exc}") from exc.__cause__

    def _pages(self) -> Iterator[Frame]:
        header = self.header
        page_size = header.page_size
        commit = header.commit
        lock = lock_pgno(page_size)
        rolling = RollingChecksum() if header.tracks_checksums and header.is_snapshot else None
        max_block = _max_block_size(page_size)
        max_frame = _max_frame_size(page_size)
        unpack = _BLOCK_HEADER.unpack_from
        head_size = _BLOCK_HEADER.size
        index = bytearray()
        index_offset = HEADER_SIZE
        pgnos: list[int] = []
        lengths: list[int] = []
        n_pages = 0
        last_pgno = 0
        data = self._data
        available = len(data)
        crc = crc64(data[:HEADER_SIZE])
        position = HEADER_SIZE
        while True:
            if available - position < max_frame and self._read is not None:
                self._refill(position, max_frame)
                data = self._data
                available = len(data)
                position = 0
            if available - position < head_size:
                raise FormatError("file is cut off")
            pgno, flags, size = unpack(data, position)
            if flags == _PAGE_FLAG_BLOCK and size <= max_block:
                start = position + head_size
                end = start + size
                if end > available:
                    raise FormatError(f"file is cut off in page {pgno}")
                block: memoryview | None = data[start:end]
                try:
                    page: bytes = _decompress_block(block, uncompressed_size=page_size)
                except _LZ4_ERRORS as exc:
                    raise FormatError(f"page {pgno} cannot be decompressed: damaged data") from exc
                if len(page) != page_size:
                    raise FormatError(
                        f"page {pgno} has {len(page)} bytes, the page size is {page_size}"
                    )
                length = head_size + size
            elif pgno == 0 and flags == 0:
                break
            else:
                _, block, page, head_length, length = _decode_frame(data[position:], page_size)
                start = position + head_length
            if not last_pgno < pgno <= commit:
                raise _out_of_range(pgno, last_pgno, commit)
            if pgno == lock:
                raise FormatError(f"page {pgno} is the lock page, which is never stored")
            crc = crc64(page, crc64(data[position:start], crc))
            if rolling is not None:
                rolling.toggle(pgno, page)
            position += length
            last_pgno = pgno
            n_pages += 1
            pgnos.append(pgno)
            lengths.append(length)
            if len(pgnos) == _INDEX_BATCH:
                index_offset = _append_entries(index, pgnos, lengths, index_offset)
                pgnos.clear()
                lengths.clear()
            yield pgno, block, page

        if header.is_snapshot:
            n_missing = commit - (1 if lock <= commit else 0) - n_pages
            if n_missing:
                raise FormatError(f"snapshot lacks {n_missing} of {commit} pages")
        index_offset = _append_entries(index, pgnos, lengths, index_offset)
        index.append(0)
        index += _U64.pack(len(index))
        # Everything that may follow, and one byte more to see that there is none.
        n_wanted = len(_END_OF_PAGES) + len(index) + TRAILER_SIZE
        self._refill(position, n_wanted + 1)
        data = self._data
        if len(data) < n_wanted:
            raise FormatError("file is cut off")
        if data[len(_END_OF_PAGES) : n_wanted - TRAILER_SIZE] != index:
            raise FormatError("page index does not match the pages")
        if len(data) > n_wanted:
            raise FormatError("there are bytes behind the trailer")
        post_apply, checksum = _TRAILER.unpack_from(data, n_wanted - TRAILER_SIZE)
        self._check_post_apply(post_apply, rolling)
        if crc64(data[: n_wanted - 8], crc) | CHECKSUM_FLAG != checksum:
            raise ChecksumError("file checksum does not match: the file is damaged")
        size_bytes = index_offset + n_wanted
        self._data = memoryview(b"")
        self._segment = EncodedSegment(size_bytes, checksum, n_pages)

    def _check_post_apply(self, post_apply: int, rolling: RollingChecksum | None) -> None:
        if not self.header.tracks_checksums:
            if post_apply:
                raise FormatError("there is a post-apply checksum where none is allowed")
        elif post_apply < CHECKSUM_FLAG:
            raise FormatError("the post-apply checksum is missing")
        elif rolling is not None and rolling.value != post_apply:
            raise ChecksumError("post-apply checksum does not match")


def decode(data: BytesLike, *, name: str = "LTX file") -> tuple[Header, list[tuple[int, bytes]]]:
    """Decode and verify a whole file.

    Returns:
        Its header and its pages with their numbers, in ascending order.

    Raises:
        FormatError: if the file is not valid or damaged.
    """
    decoder = Decoder(data, name=name)
    return decoder.header, list(decoder)


def iter_frames(source: Source, *, name: str = "LTX file") -> Iterator[Frame]:
    """The pages of a file with their LZ4 blocks; verified when the iteration ends.

    Raises:
        FormatError: if the file is not valid or damaged.
    """
    return Decoder(source, name=name).frames()
