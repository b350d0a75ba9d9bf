"""The page map: a hash of every page of the replica's state at one TXID.

When continuity cannot be proven, the database is compared with it page by page, and only what
differs is shipped (`replica.capture`).  It is one file in the state directory, ``pages``: hashes of
all pages at some TXID, then one record for each segment after it, in TXID order and without a gap::

    base     "WSPB", length of text (u32), length of hashes (u64), sha256 (8 bytes), checksum (u64);
             text (JSON: lineage, replica, txid, page_size, commit); a hash (u64) for each page
    segment  "WSPS", pages in it (u32), txid (u64), commit (u32), sha256 (8 bytes), checksum (u64);
             their page numbers (u32 each), their hashes (u64 each)

All integers are big-endian, hashes are xxh3_64 of the page, 0 stands for "not known".  ``sha256``
is the beginning of the segment's, zeros if that is not known.  The base's checksum is xxh3_64 of
text, hashes and the header before it.  A segment's covers all of the record and is seeded with that
of the record before it, so that no record counts behind another one than its own predecessor.

A base is written beside the old one and renamed over it.  Segments are appended and not synced:
after a power cut the map may end earlier, which its TXID tells, and a torn end is recognised and
cut off.  When the appended part outgrows the base, both become a new base.

Memory is bounded: a few bytes for each page of a segment, and `_WINDOW_PAGES` hashes while the
whole map is read.  No descriptor is kept open.  Not thread-safe: the uploader's thread has it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final, Literal, NamedTuple

import xxhash

from .errors import FormatError
from .files import Files
from .format.checksum import BytesLike
from .format.ltx import Decoder, Source
from .format.types import format_txid
from .sqlite import SpoolError

__all__ = [
    "BaseWriter",
    "History",
    "MapDamaged",
    "MapEnd",
    "PageMap",
    "SegmentHashes",
    "hash_pages",
    "hash_segment",
    "page_hash",
]

log = logging.getLogger("walship.pagemap")

page_hash = xxhash.xxh3_64_intdigest

_BASE: Final = struct.Struct(">4sIQ8sQ")
_SEGMENT: Final = struct.Struct(">4sIQI8sQ")
_BASE_MAGIC: Final = b"WSPB"
_SEGMENT_MAGIC: Final = b"WSPS"
_CHECKSUM_SIZE: Final = 8
_HASH_SIZE: Final = 8
_PGNO_SIZE: Final = 4
#: Stands for the sha256 of a segment that nobody knows.
_NO_SHA256: Final = bytes(8)
#: The text is some hundred bytes; a longer one is damage.
_TEXT_MAX: Final = 64 * 1024

#: Hashes held at once while the map is read, 8 MiB: of 4 GiB of database, in pages of 4 KiB.
_WINDOW_PAGES: Final = 1024 * 1024
#: The appended part may grow to this or to the size of the base, so that every byte appended is
#: read and written again about once.
_APPENDED_BYTES: Final = 1024 * 1024
#: A file is read in pieces of this many bytes; each read leaves the GIL to others.
_CHUNK_BYTES: Final = 1024 * 1024
#: A new base is written in pieces of this many hashes.
_PENDING_PAGES: Final = 128 * 1024


class MapDamaged(FormatError):
    """The map was changed by somebody or something: it says nothing any more."""


class History(NamedTuple):
    """Which TXIDs are meant: those of this lineage in this replica."""

    lineage: str
    replica: str


class MapEnd(NamedTuple):
    """The state that a map describes.

    ``sha256`` is the beginning (16 hex digits) of that of the segment with this TXID; empty if that
    is not known.
    """

    txid: int
    page_size: int
    commit: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SegmentHashes:
    """What a segment does to the map: the pages in it, ascending, with their hashes."""

    txid: int
    sha256: str
    page_size: int
    commit: int
    pgnos: array[int]
    hashes: array[int]


@dataclass(slots=True)
class _Found:
    """The map on disk, as far as it is whole."""

    identity: tuple[int, int]
    history: History
    base_commit: int
    base_offset: int  # of its hashes
    base_checksum: int
    end: MapEnd
    end_offset: int
    checksum: int  # of the last record

    @property
    def log_offset(self) -> int:
        """Where the segments begin."""
        return self.base_offset + _HASH_SIZE * self.base_commit


class _Record(NamedTuple):
    """One segment in the map's file; the pages as their bytes."""

    txid: int
    commit: int
    sha256: str
    n_pages: int
    body: bytes
    checksum: int
    end_offset: int


def hash_pages(data: memoryview, page_size: int) -> list[int]:
    """The hashes of pages that lie one behind the other."""
    return [page_hash(data[at : at + page_size]) for at in range(0, len(data), page_size)]


def hash_segment(
    source: Source, *, txid: int, sha256: str, name: str, chunk_bytes: int = 256 * 1024
) -> SegmentHashes:
    """Hash the pages of a level-0 segment, verifying all of it.

    Args:
        source: the whole segment, or ``read(n)``.
        txid: the TXID it must have.
        sha256: of the segment, hex; empty if it is not known.
        chunk_bytes: how much to ask ``read`` for.

    Raises:
        FormatError: it is damaged, or not the segment of that TXID.
    """
    decoder = Decoder(source, name=name, chunk_bytes=chunk_bytes)
    header = decoder.header
    if (header.min_txid, header.max_txid) != (txid, txid):
        raise FormatError(f"{name}: it is not the segment of TXID {format_txid(txid)}")
    pgnos, hashes = array("I"), array("Q")
    add_pgno, add_hash = pgnos.append, hashes.append
    for pgno, page in decoder:
        add_pgno(pgno)
        add_hash(page_hash(page))
    return SegmentHashes(txid, sha256, header.page_size, header.commit, pgnos, hashes)


class PageMap:
    """The page map in one state directory.

    Trouble with it costs no more than a full copy later: a damaged map is removed, and the log says
    so.

    Raises from every method:
        SpoolError: disk full, I/O error.  The map is what it was, or ends earlier.
    """

    def __init__(self, directory: Path, files: Files) -> None:
        self._path = directory / "pages"
        self._files = files
        self._found: _Found | None = None

    def end(self, history: History) -> MapEnd | None:
        """The state that the map describes; None if there is no map of this history."""
        with self._opened() as (_, found):
            return found.end if found is not None and found.history == history else None

    def append(self, history: History, segment: SegmentHashes) -> None:
        """Go on to the next TXID; any other segment is left out.  Not durable."""
        with self._opened(os.O_RDWR) as (fd, found):
            if found is None or found.history != history:
                return
            if (segment.txid, segment.page_size) != (found.end.txid + 1, found.end.page_size):
                return
            checksum, record = _pack(segment, found.checksum)
            if self._files.fstat(fd).st_size > found.end_offset:
                self._files.truncate(fd, found.end_offset)  # its last record was torn
            self._files.write(fd, [record], found.end_offset)
            found.end = _end(segment.txid, segment.page_size, segment.commit, segment.sha256)
            found.end_offset += len(record)
            found.checksum = checksum
            long = found.end_offset - found.log_offset > max(
                _APPENDED_BYTES, _HASH_SIZE * found.base_commit
            )
        if long:
            self._fold()

    def hashes(self, history: History) -> Iterator[int]:
        """The hash of page 1, of page 2 and so on up to the last one; 0 where it is not known.

        Raises:
            MapDamaged: there is no map of this history.
        """
        found = self._verified()
        if found is None or found.history != history:
            raise MapDamaged("there is no page map")
        return chain.from_iterable(self._windows(found))

    def begin(self, history: History, *, txid: int, page_size: int, commit: int) -> BaseWriter:
        """Start a new map; `BaseWriter.finish` puts it in the old one's place."""
        return BaseWriter(self._files, self._path, history, txid, page_size, commit)

    def describe(self, path: Path, history: History, *, txid: int, page_size: int) -> None:
        """Make the map of a database file: the state at ``txid``, which nobody may write to."""
        with _local_errors(self._path):
            fd = self._files.open(path, os.O_RDONLY)
            try:
                size = self._files.fstat(fd).st_size
                step = max(page_size, _CHUNK_BYTES)
                commit = size // page_size
                with self.begin(history, txid=txid, page_size=page_size, commit=commit) as base:
                    for offset in range(0, size, step):
                        view = memoryview(self._files.pread(fd, step, offset))
                        base.extend(hash_pages(view, page_size))
                    base.finish("")
            finally:
                self._files.close(fd)

    def discard(self, reason: str) -> None:
        """Remove the map, because it says something wrong; the log tells."""
        log.error("%s: %s; the next resync is a full copy", self._path, reason)
        self._found = None
        with _local_errors(self._path), contextlib.suppress(FileNotFoundError):
            self._files.unlink(self._path)

    def _fold(self) -> None:
        """Make all that was appended part of the base."""
        found = self._verified()
        if found is None:
            return
        end = found.end
        try:
            with self.begin(
                found.history, txid=end.txid, page_size=end.page_size, commit=end.commit
            ) as base:
                for window in self._windows(found):
                    base.extend(window)
                base.finish(end.sha256)
        except MapDamaged as error:
            self.discard(str(error))

    # -- reading ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, flags: int = os.O_RDONLY) -> Iterator[tuple[int, _Found | None]]:
        """A descriptor and what is in the file; None without a map that is whole."""
        with _local_errors(self._path):
            try:
                fd = self._files.open(self._path, flags)
            except FileNotFoundError:
                yield -1, None
                return
            try:
                yield fd, self._look(fd)
            finally:
                self._files.close(fd)

    def _look(self, fd: int) -> _Found | None:
        status = self._files.fstat(fd)
        identity = status.st_dev, status.st_ino
        found = self._found
        if found is None or (found.identity, found.end_offset) != (identity, status.st_size):
            try:
                self._found = found = self._read(fd, identity, status.st_size)
            except MapDamaged as error:
                self.discard(str(error))
                return None
        return found

    def _verified(self) -> _Found | None:
        """What is in the file, after another look at all of it."""
        self._found = None
        with self._opened() as (_, found):
            return found

    def _read(self, fd: int, identity: tuple[int, int], size: int) -> _Found:
        """Verify the whole file, but for a torn end."""
        header = self._files.pread(fd, _BASE.size, 0)
        if len(header) < _BASE.size:
            raise MapDamaged("the page map is cut off")
        magic, text_length, n_bytes, sha256, checksum = _BASE.unpack(header)
        if magic != _BASE_MAGIC or text_length > _TEXT_MAX:
            raise MapDamaged("the page map does not begin as one")
        base_offset = _BASE.size + text_length
        if base_offset + n_bytes > size:
            raise MapDamaged("the page map is cut off")
        text = self._files.pread(fd, text_length, _BASE.size)
        digest = xxhash.xxh3_64(text)
        for offset in range(base_offset, base_offset + n_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, base_offset + n_bytes - offset)
            digest.update(self._files.pread(fd, length, offset))
        digest.update(header[:-_CHECKSUM_SIZE])
        if digest.intdigest() != checksum:
            raise MapDamaged("the page map is damaged: its checksum is wrong")
        history, txid, page_size, commit = _parse_text(text)
        if n_bytes != _HASH_SIZE * commit:
            raise MapDamaged("the page map has not one hash for each page")
        found = _Found(
            identity=identity,
            history=history,
            base_commit=commit,
            base_offset=base_offset,
            base_checksum=checksum,
            end=_end(txid, page_size, commit, sha256.hex()),
            end_offset=base_offset + n_bytes,
            checksum=checksum,
        )
        for record in self._records(fd, found, size):
            if record.txid != found.end.txid + 1:
                break
            found.end = _end(record.txid, page_size, record.commit, record.sha256)
            found.end_offset, found.checksum = record.end_offset, record.checksum
        return found

    def _records(self, fd: int, found: _Found, end: int) -> Iterator[_Record]:
        """Segments from the base on, to ``end`` or the first that is not whole."""
        offset, seed = found.log_offset, found.base_checksum
        while offset + _SEGMENT.size <= end:
            header = self._files.pread(fd, _SEGMENT.size, offset)
            if len(header) < _SEGMENT.size:
                return
            magic, n_pages, txid, commit, sha256, checksum = _SEGMENT.unpack(header)
            length = n_pages * (_PGNO_SIZE + _HASH_SIZE)
            offset += _SEGMENT.size
            if magic != _SEGMENT_MAGIC or offset + length > end:
                return
            body = self._files.pread(fd, length, offset)
            if _checksum(header[:-_CHECKSUM_SIZE], body, seed) != checksum:
                return
            offset += length
            yield _Record(txid, commit, sha256.hex(), n_pages, body, checksum, offset)
            seed = checksum

    def _windows(self, found: _Found) -> Iterator[array[int]]:
        """The hashes of all pages, ascending, in pieces."""
        commit = found.end.commit
        with _local_errors(self._path):
            fd = self._files.open(self._path, os.O_RDONLY)
            try:
                for first in range(1, commit + 1, _WINDOW_PAGES):
                    yield self._window(fd, found, first, min(_WINDOW_PAGES, commit + 1 - first))
            finally:
                self._files.close(fd)

    def _window(self, fd: int, found: _Found, first: int, n_pages: int) -> array[int]:
        """The hashes of ``n_pages`` pages from page ``first`` on."""
        n_base = max(0, min(n_pages, found.base_commit + 1 - first))
        offset = found.base_offset + _HASH_SIZE * (first - 1)
        data = self._files.pread(fd, _HASH_SIZE * n_base, offset) if n_base else b""
        window = _from_bytes("Q", data)
        window.frombytes(bytes(_HASH_SIZE * (n_pages - len(window))))
        commit, end_offset = found.base_commit, found.log_offset
        for record in self._records(fd, found, found.end_offset):
            end_offset = record.end_offset
            if record.commit < commit:
                # Should the database grow again, these pages are others.
                start = max(0, record.commit + 1 - first)
                stop = max(start, min(n_pages, commit + 1 - first))
                window[start:stop] = array("Q", bytes(_HASH_SIZE * (stop - start)))
            commit = record.commit
            pgnos = _from_bytes("I", record.body[: _PGNO_SIZE * record.n_pages])
            start, stop = bisect_left(pgnos, first), bisect_left(pgnos, first + n_pages)
            if start < stop:
                hashes = _from_bytes("Q", record.body[_PGNO_SIZE * record.n_pages :])
                for pgno, value in zip(pgnos[start:stop], hashes[start:stop], strict=True):
                    window[pgno - first] = value
        if end_offset != found.end_offset:
            raise MapDamaged("the page map was changed while it was read")
        return window


class BaseWriter:
    """Writes a new page map; a context manager that removes what was not finished."""

    def __init__(
        self, files: Files, path: Path, history: History, txid: int, page_size: int, commit: int
    ) -> None:
        text = json.dumps(
            {**history._asdict(), "txid": txid, "page_size": page_size, "commit": commit}
        ).encode()
        self._files = files
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._text = text
        self._commit = commit
        self._digest = xxhash.xxh3_64(text)
        self._pending = array("Q")
        self._n_pages = 0
        self._offset = _BASE.size + len(text)
        with _local_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._fd = files.open(self._temporary, flags)

    def __enter__(self) -> BaseWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                self._files.unlink(self._temporary)

    def add(self, pgno: int, page: BytesLike) -> None:
        """Hash one page; their numbers ascend, and one that is left out is not known."""
        missing = pgno - 1 - self._n_pages
        if missing:
            self.extend([0] * missing)
        self._n_pages += 1
        self._pending.append(page_hash(page))
        if len(self._pending) >= _PENDING_PAGES:
            self._flush()

    def extend(self, hashes: Sequence[int]) -> None:
        """Go on with the hashes of the next pages."""
        self._n_pages += len(hashes)
        self._pending.extend(hashes)
        if len(self._pending) >= _PENDING_PAGES:
            self._flush()

    def _flush(self) -> None:
        data = _to_bytes(self._pending)
        self._pending = array("Q")
        self._digest.update(data)
        with _local_errors(self._path):
            self._files.write(self._fd, [data], self._offset)
        self._offset += len(data)

    def finish(self, sha256: str) -> None:
        """Put the new map in the old one's place; it survives a power cut when this returns.

        Args:
            sha256: of the segment that the state ends with, hex; empty if it is not known.
        """
        if self._n_pages < self._commit:
            self.extend([0] * (self._commit - self._n_pages))
        self._flush()
        n_bytes = _HASH_SIZE * self._n_pages
        header = _BASE.pack(_BASE_MAGIC, len(self._text), n_bytes, _short(sha256), 0)
        self._digest.update(header[:-_CHECKSUM_SIZE])
        checksum = self._digest.intdigest().to_bytes(_CHECKSUM_SIZE, "big")
        with _local_errors(self._path):
            self._files.write(self._fd, [header[:-_CHECKSUM_SIZE], checksum, self._text], 0)
            self._files.sync(self._fd)
            self._files.rename(self._temporary, self._path)
            self._files.close(self._fd)
            self._fd = -1
            self._files.sync_directory(self._path.parent)


def _pack(segment: SegmentHashes, seed: int) -> tuple[int, bytes]:
    """``(checksum, record)`` of a segment behind the record with the checksum ``seed``."""
    header = _SEGMENT.pack(
        _SEGMENT_MAGIC,
        len(segment.pgnos),
        segment.txid,
        segment.commit,
        _short(segment.sha256),
        0,
    )[:-_CHECKSUM_SIZE]
    body = _to_bytes(segment.pgnos) + _to_bytes(segment.hashes)
    checksum = _checksum(header, body, seed)
    return checksum, header + checksum.to_bytes(_CHECKSUM_SIZE, "big") + body


def _checksum(header: bytes, body: bytes, seed: int) -> int:
    digest = xxhash.xxh3_64(header, seed)
    digest.update(body)
    return digest.intdigest()


def _parse_text(text: bytes) -> tuple[History, int, int, int]:
    try:
        fields = json.loads(text)
        history = History(str(fields["lineage"]), str(fields["replica"]))
        txid, page_size, commit = (int(fields[key]) for key in ("txid", "page_size", "commit"))
    except (ValueError, TypeError, KeyError) as error:
        raise MapDamaged("the page map is of an unknown kind") from error
    return history, txid, page_size, commit


def _end(txid: int, page_size: int, commit: int, sha256: str) -> MapEnd:
    short = _short(sha256)
    return MapEnd(txid, page_size, commit, "" if short == _NO_SHA256 else short.hex())


def _short(sha256: str) -> bytes:
    """The beginning of a sha256 in hex, as the file has it."""
    return bytes.fromhex(sha256[: 2 * len(_NO_SHA256)]) or _NO_SHA256


def _to_bytes(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _from_bytes(typecode: Literal["I", "Q"], data: bytes) -> array[int]:
    values = array(typecode)
    values.frombytes(data)
    if sys.byteorder == "little":
        values.byteswap()
    return values


@contextlib.contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Turn operating system errors into one clear `SpoolError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpoolError(f"cannot read or write the page map {path}: {reason}") from error
