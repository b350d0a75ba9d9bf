"""The layout of SQLite's write-ahead log: header, frames, checksums, commit boundaries.

Basis: https://www.sqlite.org/fileformat2.html#the_write_ahead_log.  All integers are big-endian::

    WAL header, 32 bytes            frame header, 24 bytes, followed by one page
     0  magic 0x377f0682 / ..83      0  page number
     4  version 3007000              4  database size in pages if this is a commit, else 0
     8  page size                    8  salt-1, salt-2: those of the WAL header
    12  checkpoint sequence         16  checksum-1, checksum-2: running, through this frame
    16  salt-1, salt-2
    24  checksum-1, checksum-2 of the 24 bytes above

The last bit of the magic says in which byte order the checksum reads its words.  Checksum input of
a frame: its first 8 bytes and the page, continuing from the frame before (the header's for the
first).  Frames count from 1.

Bytes come in through a callable; nothing here opens a file.  A frame that is valid here is not
necessarily a commit: only what SQLite has published in the wal-index is, and knowing that is the
caller's business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from walship.replica.errors import ChecksumError, FormatError

from .checksum import BytesLike, wal_checksum
from .types import WalSalts, is_page_size

__all__ = [
    "FRAME_HEADER_SIZE",
    "WAL_HEADER_SIZE",
    "CommitPoint",
    "FrameHeader",
    "VerifiedFrame",
    "WalHeader",
    "frame_offset",
    "iter_frame_pgnos",
    "last_commit",
    "n_frames_in",
    "parse_frame_header",
    "verified_frames",
    "wal_size",
]

WAL_HEADER_SIZE: Final = 32
FRAME_HEADER_SIZE: Final = 24

_MAGIC_LITTLE_ENDIAN: Final = 0x377F0682
_MAGIC_BIG_ENDIAN: Final = 0x377F0683
_VERSION: Final = 3007000

_HEADER: Final = struct.Struct(">8I")
_HEADER_PREFIX: Final = struct.Struct(">6I")
_FRAME_HEADER: Final = struct.Struct(">6I")
_CHECKSUMS: Final = struct.Struct(">2I")

# How much of a WAL is read at once while its frames are verified.
_BATCH_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class WalHeader:
    """The first 32 bytes of a WAL.

    Attributes:
        page_size: bytes, 512 .. 65536.
        checkpoint_seq: counts the restarts of this WAL.
        salts: pair that every frame of this generation repeats.
        checksum: sums after the first 24 bytes; the first frame continues from them.
        big_endian: byte order of the words that the checksums sum up.
    """

    page_size: int
    checkpoint_seq: int
    salts: WalSalts
    checksum: tuple[int, int]
    big_endian: bool

    @classmethod
    def parse(cls, data: BytesLike) -> WalHeader:
        """Read and verify a header; bytes after the first 32 are ignored.

        Raises:
            ChecksumError: if the checksum does not match (a torn or damaged header).
            FormatError: if this is not the header of a WAL in the current format.
        """
        if len(data) < WAL_HEADER_SIZE:
            raise FormatError(f"WAL header is {len(data)} bytes long, {WAL_HEADER_SIZE} expected")
        magic, version, page_size, seq, salt1, salt2, sum1, sum2 = _HEADER.unpack_from(data)
        if magic not in (_MAGIC_LITTLE_ENDIAN, _MAGIC_BIG_ENDIAN):
            raise FormatError(f"not a WAL: its magic number is 0x{magic:08x}")
        if version != _VERSION:
            raise FormatError(f"WAL format version {version} is not supported, only {_VERSION} is")
        if not is_page_size(page_size):
            raise FormatError(f"WAL header gives an impossible page size: {page_size}")
        big_endian = magic == _MAGIC_BIG_ENDIAN
        covered = memoryview(data)[: _HEADER_PREFIX.size]
        if wal_checksum(covered, 0, 0, big_endian) != (sum1, sum2):
            raise ChecksumError("WAL header does not match its checksum")
        return cls(page_size, seq, WalSalts(salt1, salt2), (sum1, sum2), big_endian)

    @classmethod
    def make(
        cls, page_size: int, salts: WalSalts, *, checkpoint_seq: int = 0, big_endian: bool = False
    ) -> WalHeader:
        """A new header with the right checksum."""
        draft = cls(page_size, checkpoint_seq, salts, (0, 0), big_endian)
        sums = wal_checksum(draft.pack()[: _HEADER_PREFIX.size], 0, 0, big_endian)
        return cls(page_size, checkpoint_seq, salts, sums, big_endian)

    def pack(self) -> bytes:
        """The 32 bytes of this header, with ``checksum`` as it stands."""
        magic = _MAGIC_BIG_ENDIAN if self.big_endian else _MAGIC_LITTLE_ENDIAN
        return _HEADER.pack(
            magic, _VERSION, self.page_size, self.checkpoint_seq, *self.salts, *self.checksum
        )


class FrameHeader(NamedTuple):
    """The 24 bytes before each page.  ``commit`` is 0 unless the frame ends a transaction."""

    pgno: int
    commit: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int

    @property
    def salts(self) -> WalSalts:
        return WalSalts(self.salt1, self.salt2)

    @property
    def checksum(self) -> tuple[int, int]:
        return self.checksum1, self.checksum2


class VerifiedFrame(NamedTuple):
    """A frame whose salts and running checksum match.

    ``page`` is a view of the batch it was read with; copy it to keep it long.
    """

    frame_no: int
    pgno: int
    commit: int
    page: memoryview
    checksum: tuple[int, int]


class CommitPoint(NamedTuple):
    """The end of a transaction: its last frame, the database size in pages, the checksum there."""

    frame_no: int
    commit: int
    checksum: tuple[int, int]


def frame_offset(frame_no: int, page_size: int) -> int:
    """Byte offset of the header of frame ``frame_no`` (from 1)."""
    return WAL_HEADER_SIZE + (frame_no - 1) * (FRAME_HEADER_SIZE + page_size)


def wal_size(n_frames: int, page_size: int) -> int:
    """Bytes of a WAL from its start through frame ``n_frames`` (0 is the header alone)."""
    return WAL_HEADER_SIZE + n_frames * (FRAME_HEADER_SIZE + page_size)


def n_frames_in(size_bytes: int, page_size: int) -> int:
    """Number of whole frames in a WAL file of ``size_bytes``; they need not be valid."""
    return max(0, size_bytes - WAL_HEADER_SIZE) // (FRAME_HEADER_SIZE + page_size)


def parse_frame_header(data: BytesLike) -> FrameHeader:
    """Split the first 24 bytes of ``data`` into fields; nothing is verified.

    Raises:
        FormatError: if there are fewer than 24 bytes.
    """
    if len(data) < FRAME_HEADER_SIZE:
        raise FormatError(
            f"WAL frame header is {len(data)} bytes long, {FRAME_HEADER_SIZE} expected"
        )
    return FrameHeader._make(_FRAME_HEADER.unpack_from(data))


@lru_cache(maxsize=16)
def _pgno_struct(page_size: int) -> struct.Struct:
    return struct.Struct(f">I{FRAME_HEADER_SIZE - 4 + page_size}x")


def iter_frame_pgnos(data: BytesLike, page_size: int) -> Iterator[tuple[int]]:
    """The page numbers of consecutive whole frames, each as a tuple of one.

    Nothing is verified.  Runs at the speed of ``struct``: about 0.05 us per frame.

    Raises:
        FormatError: if ``data`` is not a whole number of frames.
    """
    if len(data) % (FRAME_HEADER_SIZE + page_size):
        raise FormatError(
            f"{len(data)} bytes are not a whole number of WAL frames of {page_size} byte pages"
        )
    return _pgno_struct(page_size).iter_unpack(data)


def verified_frames(
    read: Callable[[int, int], BytesLike],
    header: WalHeader,
    *,
    first_frame: int = 1,
    checksum: tuple[int, int] | None = None,
    last_frame: int | None = None,
) -> Iterator[VerifiedFrame]:
    """The valid frames from ``first_frame`` on, in order, until the first one that is not.

    Ends without an error at foreign salts (frames of an older generation), page number 0, a
    checksum that does not match, a short read, or after ``last_frame``.  About 1 MiB is read at a
    time and held.

    Args:
        read: ``read(offset, length)`` gives the bytes of the WAL there, fewer at its end.
        header: the WAL's header.
        first_frame: where to start, from 1.
        checksum: running checksum of the frame before ``first_frame``; may be left out for 1.
        last_frame: where to end, inclusive; None for as far as the frames are valid.
    """
    if checksum is None:
        if first_frame != 1:
            raise ValueError(f"frame {first_frame} needs the checksum of the frame before it")
        checksum = header.checksum
    page_size = header.page_size
    big_endian = header.big_endian
    salt1, salt2 = header.salts
    stride = FRAME_HEADER_SIZE + page_size
    batch_frames = max(1, _BATCH_BYTES // stride)
    frame_no = first_frame
    while last_frame is None or frame_no <= last_frame:
        wanted = batch_frames
        if last_frame is not None:
            wanted = min(wanted, last_frame - frame_no + 1)
        data = memoryview(read(frame_offset(frame_no, page_size), wanted * stride))
        n_whole = len(data) // stride
        for start in range(0, n_whole * stride, stride):
            pgno, commit, frame_salt1, frame_salt2, sum1, sum2 = _FRAME_HEADER.unpack_from(
                data, start
            )
            if frame_salt1 != salt1 or frame_salt2 != salt2 or pgno == 0:
                return
            page = data[start + FRAME_HEADER_SIZE : start + stride]
            c1, c2 = wal_checksum(data[start : start + 8], *checksum, big_endian)
            checksum = wal_checksum(page, c1, c2, big_endian)
            if checksum != (sum1, sum2):
                return
            yield VerifiedFrame(frame_no, pgno, commit, page, checksum)
            frame_no += 1
        if n_whole < wanted:
            return


def last_commit(
    read: Callable[[int, int], BytesLike],
    header: WalHeader,
    *,
    first_frame: int = 1,
    checksum: tuple[int, int] | None = None,
    last_frame: int | None = None,
) -> CommitPoint | None:
    """The last commit frame among the ``verified_frames`` with the same arguments, if any.

    This is what SQLite's own recovery would take as the end of the log.
    """
    found: CommitPoint | None = None
    for frame in verified_frames(
        read, header, first_frame=first_frame, checksum=checksum, last_frame=last_frame
    ):
        if frame.commit:
            found = CommitPoint(frame.frame_no, frame.commit, frame.checksum)
    return found
