"""What a replica holds, and what does not count at its end.

Several uploads may be under way at once, and they are acknowledged in TXID order.  So a writer that
dies or is fenced can leave segments that nobody was told of, and that lead nowhere:

* behind a gap, because one before them never arrived;
* resting on a predecessor that is not the one in the replica, because another writer's came first
  under its TXID: applied to that one they would make a database that never was.  The metadata of a
  segment names its predecessor, so this shows;
* without content, where a server keeps an object of a client that died after the headers.

They are passed over by everybody who reads a replica, and give way to the segment of the writer
that goes on (`replica.sender`).  Both can only be among the last few, for no writer sends a segment
before the one `IN_FLIGHT_MAX` TXIDs ahead of it is acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Final, NamedTuple

from .errors import ObjectNotFound
from .format.types import LEVEL_MAX, format_txid
from .store.base import (
    IN_FLIGHT_MAX,
    PREVIOUS_METADATA,
    SHA256_METADATA,
    ObjectInfo,
    ObjectStore,
    SegmentInfo,
    list_segments,
)

__all__ = ["Live", "list_replica", "live_segments", "replica_head", "rests_on_another"]

#: HEAD requests at once.
_AT_ONCE: Final = 8


def list_replica(
    store: ObjectStore, levels: Sequence[int] | None = None, *, parallelism: int = 8
) -> list[SegmentInfo]:
    """The segments of a replica (of some levels only, if given), ordered by level and TXID."""
    if levels is None:
        levels = range(LEVEL_MAX + 1)
    with ThreadPoolExecutor(min(parallelism, LEVEL_MAX + 1)) as pool:
        listings = pool.map(lambda level: list(list_segments(store, level)), levels)
        return sorted(segment for listing in listings for segment in listing)


def replica_head(store: ObjectStore) -> SegmentInfo | None:
    """The segment that reaches furthest, of those that count; None in an empty replica."""
    listing = [segment for segment in list_replica(store) if segment.size_bytes]
    live = live_segments(store, listing).segments
    # Level 0 wins: that is where the next one follows.
    return max(live, key=lambda segment: (segment.max_txid, -segment.level), default=None)


class Live(NamedTuple):
    """A listing without what leads nowhere.

    Attributes:
        segments: what counts, ordered by level and TXID.
        reason: why something was left out, in one sentence for people; empty if nothing was.
        tail: the last objects of level 0 by their keys, where the store keeps metadata.
    """

    segments: list[SegmentInfo]
    reason: str
    tail: Mapping[str, ObjectInfo]

    def sha256(self, segment: SegmentInfo) -> str:
        """Digest (hex) of a segment of the tail; empty if nobody knows."""
        found = self.tail.get(segment.key)
        return "" if found is None else found.metadata.get(SHA256_METADATA, "")


def live_segments(store: ObjectStore, listing: Sequence[SegmentInfo], *, covered: int = 0) -> Live:
    """Leave out the uploads that their writers did not live to finish.

    Args:
        listing: of all levels, or what a longer one holds from some TXID on.
        covered: there is no gap up to here, whatever the listing shows.

    Raises:
        StoreError: from the store.
    """
    segments = sorted(s for s in listing if s.size_bytes or not _never_arrived(store, s))
    level0 = [s for s in segments if s.level == 0]
    rest = level0[: -IN_FLIGHT_MAX - 1]
    covered = max(
        [covered, *(s.max_txid for s in segments if s.level), *(s.max_txid for s in rest)]
    )
    tail = level0[len(rest) :]
    known: list[ObjectInfo | None] = [None] * len(tail)
    if not store.logical_times or _first_behind_gap(tail, covered) < len(tail):
        known = _look(store, tail)  # a directory keeps no metadata
    live, reason = _live_tail(tail, known, covered)
    found = {segment.key: info for segment, info in zip(tail, known, strict=True) if info}
    return Live(sorted([*(s for s in segments if s.level), *rest, *live]), reason, found)


def _live_tail(
    tail: list[SegmentInfo], known: Sequence[ObjectInfo | None], covered: int
) -> tuple[list[SegmentInfo], str]:
    """Cut the last segments of level 0 off where they lead nowhere; and why."""
    gap = _first_behind_gap(tail, covered)
    for index, (before, found) in enumerate(pairwise(known[:gap]), 1):
        txid = tail[index].min_txid
        follows = txid == tail[index - 1].max_txid + 1 > covered
        if not follows or before is None or found is None:
            continue
        if rests_on_another(found.metadata, before.metadata):
            return _fresh(tail[:index], known), (
                f"TXID {format_txid(txid)} and what follows is left out: another writer has put "
                f"{format_txid(txid - 1)} before it, and it was not acknowledged"
            )
    behind = tail[gap:]
    if not behind:
        return _fresh(tail, known), ""
    missing = max(covered, tail[gap - 1].max_txid if gap else 0) + 1
    if behind[-1].max_txid >= missing + IN_FLIGHT_MAX or not all(
        found is not None and SHA256_METADATA in found.metadata for found in known[gap:]
    ):
        return _fresh(tail, known), ""  # it is damage
    return _fresh(tail[:gap], known), (
        f"TXID {format_txid(missing)} is missing and {len(behind)} segment(s) behind it are left "
        "out: their writer ended before they were acknowledged"
    )


def _first_behind_gap(tail: Sequence[SegmentInfo], covered: int) -> int:
    for index, segment in enumerate(tail):
        if segment.min_txid > covered + 1:
            return index
        covered = max(covered, segment.max_txid)
    return len(tail)


def _fresh(
    segments: Sequence[SegmentInfo], known: Sequence[ObjectInfo | None]
) -> list[SegmentInfo]:
    """With the sizes of the objects that were looked at: they may have been replaced since the
    listing, and never are again.  Where the tag differs nobody knows which a listing shows: some
    stores have one of their own there."""
    return [
        segment
        if found is None
        else replace(
            segment,
            size_bytes=found.size_bytes,
            etag=segment.etag if segment.etag == found.etag else None,
        )
        for segment, found in zip(segments, known, strict=False)
    ]


def _never_arrived(store: ObjectStore, segment: SegmentInfo) -> bool:
    """Whether an empty object is an upload of walship's that never ended; others are damage."""
    found = None if segment.level else _head(store, segment)
    return found is not None and not found.size_bytes and SHA256_METADATA in found.metadata


def rests_on_another(metadata: Mapping[str, str], before: Mapping[str, str]) -> bool:
    """Whether a segment names another predecessor than the one with the metadata ``before``."""
    previous, sha256 = metadata.get(PREVIOUS_METADATA), before.get(SHA256_METADATA)
    return bool(previous and sha256) and previous != sha256


def _look(store: ObjectStore, segments: Sequence[SegmentInfo]) -> list[ObjectInfo | None]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="walship-tail") as pool:
        return list(pool.map(lambda segment: _head(store, segment), segments))


def _head(store: ObjectStore, segment: SegmentInfo) -> ObjectInfo | None:
    try:
        return store.head(segment.key)
    except ObjectNotFound:
        return None  # removed since the listing
