"""Brings a database file that nobody has open from one TXID of its replica to the newest.

The file is changed in place, so that it takes as long as what is missing, however large the
database is.  A failure or crash in the middle leaves a file that is no state of the database: who
calls this has to remember that it began, and restores the file then.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import FormatError
from .format.ltx import Decoder, Source
from .listing import Live, list_replica, live_segments
from .plan import plan_from
from .store.base import ObjectStore, SegmentInfo, list_segments
from .store.local import fsync_file

__all__ = ["CaughtUp", "catch_up", "fetched"]

#: How much of a segment is fetched at once, bytes.
_RANGE_BYTES: Final = 8 << 20
#: Segments that are fetched before it is their turn.
_AHEAD: Final = 8


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """What was reached.

    Attributes:
        txid: the state the file holds now; the one it held if nothing was missing.
        sha256: of the segment that ends there, hex; empty if nothing was missing or nobody knows.
        page_size: bytes; 0 if nothing was missing.
        commit: size of the database in pages; 0 if nothing was missing.
        n_segments: how many were applied.
    """

    txid: int
    sha256: str
    page_size: int
    commit: int
    n_segments: int


def catch_up(
    store: ObjectStore, path: Path, txid: int, begin: Callable[[], None]
) -> CaughtUp | None:
    """Apply to a file everything the replica has behind a TXID; durable when this returns.

    Args:
        store: the replica; should retry by itself.
        path: a database file that holds the state at ``txid``.  No ``-wal`` belongs to it, and
            nobody has it open.
        begin: called before the file is changed.

    Returns:
        None if the newest state cannot be reached from there: what leads to it was compacted into
        snapshots.  The file was not changed then.

    Raises:
        FormatError: a segment is damaged; the file may be changed in part.
        StoreError: from the store; the file may be changed in part.
        OSError: the file could not be written.
    """
    # From its own segment on, on which the next one has to rest.
    live = live_segments(store, list(list_segments(store, 0, after_txid=txid - 1)), covered=txid)
    segments = _plan(live, txid)
    if segments is None:
        live = live_segments(store, list_replica(store))
        segments = _plan(live, txid)
    if segments is None:
        return None
    if not segments:
        return CaughtUp(txid, "", 0, 0, 0)
    begin()
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="walship-catch-up") as pool:
            for segment, source in fetched(pool, store, segments):
                page_size, commit = _apply(segment, source, fd)
        os.ftruncate(fd, commit * page_size)
        fsync_file(fd)
    finally:
        os.close(fd)
    return CaughtUp(
        segments[-1].max_txid, live.sha256(segments[-1]), page_size, commit, len(segments)
    )


def _plan(live: Live, txid: int) -> list[SegmentInfo] | None:
    """What leads from a TXID to the newest in a listing; None if that cannot be reached."""
    segments = plan_from(live.segments, txid)
    reached = segments[-1].max_txid if segments else txid
    newest = max((segment.max_txid for segment in live.segments), default=0)
    return segments if reached >= newest else None


def fetched(
    pool: ThreadPoolExecutor, store: ObjectStore, segments: Sequence[SegmentInfo]
) -> Iterator[tuple[SegmentInfo, Source]]:
    """Each segment with its content; small ones are fetched ahead of need."""
    ahead: deque[Future[bytes] | None] = deque()
    upcoming = iter(segments)
    for segment in segments:
        while len(ahead) < _AHEAD and (following := next(upcoming, None)) is not None:
            small = following.size_bytes <= _RANGE_BYTES
            ahead.append(pool.submit(store.get, following.key) if small else None)
        future = ahead.popleft()
        yield segment, _ranges(store, segment) if future is None else future.result()


def _ranges(store: ObjectStore, segment: SegmentInfo) -> Callable[[int], bytes]:
    """Reads a large segment from front to back, a range at a time."""
    position = 0

    def read(length: int) -> bytes:
        nonlocal position
        if position >= segment.size_bytes:
            return b""
        data = store.get(segment.key, position, length)
        position += len(data)
        return data

    return read


def _apply(segment: SegmentInfo, source: Source, fd: int) -> tuple[int, int]:
    """Write one segment's pages; its page size and commit."""
    decoder = Decoder(source, name=segment.key, chunk_bytes=_RANGE_BYTES)
    header = decoder.header
    if (header.min_txid, header.max_txid) != (segment.min_txid, segment.max_txid):
        raise FormatError(f"{segment.key}: it holds other TXIDs than its name says")
    for pgno, page in decoder:
        os.pwrite(fd, page, (pgno - 1) * header.page_size)
    return header.page_size, header.commit
