"""Which states a replica can give back, and where they get coarser: from its listing.

A state can be restored exactly if a chain of segments ends with its TXID.  Neighbouring states that
come from the same level make a `Stretch`: of level 0 each upload, of the levels above what merging
has left, of level 9 snapshots alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .errors import NoBackupError, ObjectNotFound
from .format.types import LEVEL_SNAPSHOT, format_txid
from .listing import list_replica, live_segments
from .marks import Mark, list_marks
from .plan import restorable
from .store.base import ObjectStore, SegmentInfo
from .store.timestamps import TIMESTAMP_METADATA, parse_timestamp

__all__ = ["Gap", "MarkedPoint", "Stretch", "Timeline", "read_timeline", "stretches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """States of one level that follow each other.

    Attributes:
        level: the lowest from which they can be had.
        min_txid, max_txid: the first and the last that can be restored; both inclusive.
        n_points: how many there are.
        from_ms, to_ms: times of the first and the last, ms since the epoch.
        step_ms: longest time between one and the next, also from the stretch before; 0 without.
    """

    level: int
    min_txid: int
    max_txid: int
    n_points: int
    from_ms: int
    to_ms: int
    step_ms: int


@dataclass(frozen=True, slots=True)
class Gap:
    """TXIDs that are missing, so that nothing behind them can be restored."""

    min_txid: int
    max_txid: int

    def __str__(self) -> str:
        return f"{format_txid(self.min_txid)} to {format_txid(self.max_txid)}"


@dataclass(frozen=True, slots=True)
class MarkedPoint:
    """A mark, and whether its state can still be restored.

    Attributes:
        exact: whether it can.
        below, above: the nearest TXIDs that can, where it cannot; None without.
    """

    mark: Mark
    exact: bool
    below: int | None = None
    above: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a replica can give back; oldest first.

    Attributes:
        warning: what is left out of it, in one sentence; empty if nothing is.
    """

    replica: str
    stretches: tuple[Stretch, ...]
    gap: Gap | None
    marks: tuple[MarkedPoint, ...]
    warning: str = ""


def read_timeline(store: ObjectStore) -> Timeline:
    """List a replica and say what can be restored.

    Where listings do not show the time of the content, as in S3, that of a stretch's ends is asked
    for; steps between are told by when objects were stored.

    Raises:
        NoBackupError: nothing can be restored.
        StoreError: from the store.
    """
    live = live_segments(store, list_replica(store))
    points, missing = restorable(live.segments)
    gap = Gap(missing[0], missing[-1]) if missing else None
    if not points:
        raise NoBackupError(
            f"there is no backup at {store.url}"
            if gap is None
            else f"nothing can be restored from {store.url}: TXIDs {gap} are missing"
        )
    found = stretches(points)
    if not store.logical_times:
        by_txid = {point.max_txid: point for point in points}
        found = [_with_times(store, each, by_txid) for each in found]
    txids = [point.max_txid for point in points]
    return Timeline(
        replica=store.url,
        stretches=tuple(found),
        gap=gap,
        marks=tuple(_marked(mark, txids) for mark in list_marks(store)),
        warning=live.reason,
    )


def stretches(points: Sequence[SegmentInfo]) -> list[Stretch]:
    """Put neighbouring states of the same level together.

    A snapshot among states of a lower level is one more of them.
    """
    found: list[Stretch] = []
    before: SegmentInfo | None = None
    for point in points:
        step_ms = max(0, point.created_ms - before.created_ms) if before is not None else 0
        last = found[-1] if found else None
        if last is not None and point.level in (last.level, LEVEL_SNAPSHOT):
            found[-1] = replace(
                last,
                max_txid=point.max_txid,
                n_points=last.n_points + 1,
                to_ms=point.created_ms,
                step_ms=max(last.step_ms, step_ms),
            )
        else:
            found.append(
                Stretch(
                    level=point.level,
                    min_txid=point.max_txid,
                    max_txid=point.max_txid,
                    n_points=1,
                    from_ms=point.created_ms,
                    to_ms=point.created_ms,
                    step_ms=step_ms,
                )
            )
        before = point
    return found


def _with_times(store: ObjectStore, stretch: Stretch, points: dict[int, SegmentInfo]) -> Stretch:
    return replace(
        stretch,
        from_ms=_time_of(store, points[stretch.min_txid]),
        to_ms=_time_of(store, points[stretch.max_txid]),
    )


def _time_of(store: ObjectStore, segment: SegmentInfo) -> int:
    try:
        text = store.head(segment.key).metadata.get(TIMESTAMP_METADATA, "")
    except ObjectNotFound:
        text = ""  # removed since the listing
    logical = parse_timestamp(text)
    return segment.created_ms if logical is None else logical


def _marked(mark: Mark, txids: Sequence[int]) -> MarkedPoint:
    at = bisect_left(txids, mark.txid)
    if at < len(txids) and txids[at] == mark.txid:
        return MarkedPoint(mark, True)
    return MarkedPoint(
        mark,
        False,
        txids[at - 1] if at else None,
        txids[at] if at < len(txids) else None,
    )
