"""Levels, snapshots, retention: what to merge now and what may be deleted.  A pure plan.

Everything here is a function of the replica's listing, the settings and the time; `compaction`
carries it out.  Level 0 is what was sent.  A level-n segment holds what some neighbours of the
level below hold together, level 9 whole databases.  The rules are Litestream's, with these
differences, which its restore and its take-over do not notice:

* **TXID 1 never goes into level 1.**  It is the whole database, so merging it would store it again
  in every level.  Before level 1 begins, with TXID 2, it is copied in the store to level 9, as it
  is: a first snapshot.  The copy in level 0 goes like every other.
* **The last few of level 0 stay**, not the newest alone (`KEPT_L0`).  Until there are more there
  is no level 1 either, so that a full copy that is followed by little is not stored twice.
* **Merging late is the same as merging in time.**  Inputs are grouped by the multiples of the
  level's interval that their times lie between, not by when somebody came to merge them.
* **A snapshot stays until a younger one is older than the retention**, so that every time within
  the retention can be restored.  (Litestream deletes it at the age of the retention, and with it
  what could be restored from it.)  What lies wholly under the oldest snapshot goes with it.
* A level-0 segment goes only if some segment of a higher level really holds its TXID, and a
  snapshot is not made of a database that never changed.

TXIDs that lie within a merged range cannot be restored any more once the segments below are gone;
times can, to within the interval.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from .config.levels import LevelSettings
from .format.types import LEVEL_SNAPSHOT
from .plan import plan
from .store.base import IN_FLIGHT_MAX, SegmentInfo

__all__ = [
    "KEPT_L0",
    "MAX_INPUTS",
    "Compaction",
    "L0Files",
    "Listing",
    "compactions",
    "expired",
    "expired_l0",
    "full_snapshot",
    "is_due",
    "l0_files",
    "next_due_ms",
    "snapshot",
]

#: Segments merged into one at most: each takes a descriptor and a buffer.
MAX_INPUTS: Final = 256

#: The newest segments of level 0, which stay however old they are.  After a power cut the record of
#: a writer may end so many TXIDs earlier, and it looks there for what followed.
KEPT_L0: Final = IN_FLIGHT_MAX + 1

_by_name: Final = attrgetter("min_txid", "max_txid")
_by_min: Final = attrgetter("min_txid")
_by_max: Final = attrgetter("max_txid")
_by_time: Final = attrgetter("created_ms")


class Listing:
    """What a replica holds, by level, in the order of names.  Not thread-safe.

    Attributes:
        pinned: what stays although it is old, because a marked state needs it.
        start: highest TXID that a snapshot holds which was made of a full copy, at least 1: what
            is older is not merged any more, and may be damaged.
    """

    def __init__(self, segments: Iterable[SegmentInfo] = ()) -> None:
        self.pinned: Set[SegmentInfo] = frozenset()
        self.start = 1
        self._levels: list[list[SegmentInfo]] = [[] for _ in range(LEVEL_SNAPSHOT + 1)]
        for segment in segments:
            self._levels[segment.level].append(segment)
        for level in self._levels:
            level.sort(key=_by_name)

    def __iter__(self) -> Iterator[SegmentInfo]:
        for level in self._levels:
            yield from level

    def __getitem__(self, level: int) -> Sequence[SegmentInfo]:
        return self._levels[level]

    def add(self, segment: SegmentInfo) -> None:
        """Note a segment; one of the same name is replaced."""
        level = self._levels[segment.level]
        at = bisect_left(level, _by_name(segment), key=_by_name)
        if at < len(level) and _by_name(level[at]) == _by_name(segment):
            level[at] = segment
        else:
            insort(level, segment, key=_by_name)

    def remove(self, segments: Iterable[SegmentInfo]) -> None:
        """Forget segments; those that are not there are passed over."""
        for segment in segments:
            level = self._levels[segment.level]
            at = bisect_left(level, _by_name(segment), key=_by_name)
            if at < len(level) and _by_name(level[at]) == _by_name(segment):
                del level[at]

    def reach(self, level: int) -> int:
        """Highest TXID of a level; 0 without any."""
        return max((segment.max_txid for segment in self._levels[level][-MAX_INPUTS:]), default=0)

    @property
    def head(self) -> int:
        """Highest TXID of level 0."""
        return self.reach(0)

    def has_merged(self, txid: int) -> bool:
        """Whether a segment of levels 1 to 8 holds a TXID."""
        for level in self._levels[1:LEVEL_SNAPSHOT]:
            at = bisect_right(level, txid, key=_by_min)
            if at and level[at - 1].max_txid >= txid:
                return True
        return False

    def has_end(self, txid: int) -> bool:
        """Whether a segment above level 0 ends with a TXID."""
        for level in self._levels[1:]:
            at = bisect_right(level, txid, key=_by_min)
            if any(segment.max_txid == txid for segment in level[max(0, at - 2) : at]):
                return True
        return any(segment.max_txid == txid for segment in self._levels[LEVEL_SNAPSHOT])


@dataclass(frozen=True, slots=True)
class Compaction:
    """Segments to merge into one.

    Attributes:
        level: of the result.
        inputs: at least one, oldest first.  Of a single one the result is a copy.
        timestamp_ms: of the result, ms since the epoch.
        is_full: the single input holds all pages: the result begins with TXID 1, and is no copy.
    """

    level: int
    inputs: tuple[SegmentInfo, ...]
    timestamp_ms: int
    is_full: bool = False

    @property
    def min_txid(self) -> int:
        return 1 if self.is_full else self.inputs[0].min_txid

    @property
    def max_txid(self) -> int:
        return self.inputs[-1].max_txid


def is_due(interval_ms: int, last_ms: int | None, now_ms: int) -> bool:
    """Whether a multiple of the interval lies between two times; also if the clock was set back."""
    return last_ms is None or now_ms // interval_ms != last_ms // interval_ms


def compactions(
    listing: Listing, settings: LevelSettings, level: int, now_ms: int
) -> list[Compaction]:
    """What to merge into a level; the level below must be up to date.

    What is from the present interval waits for its end.
    """
    interval_ms = settings.interval_ms(level)
    present = now_ms // interval_ms
    found: list[Compaction] = []
    if level == 1:
        first = _first_snapshot(listing)
        if first is not None:
            found.append(first)
    group: list[SegmentInfo] = []

    def close() -> None:
        if group:
            found.append(Compaction(level, tuple(group), group[-1].created_ms))
            group.clear()

    for segment in _pending(listing, level):
        window = segment.created_ms // interval_ms
        if window == present:
            break
        if group:
            last = group[-1]
            if segment.max_txid <= last.max_txid:
                continue  # held by its neighbour already
            if (
                window != group[0].created_ms // interval_ms
                or segment.min_txid > last.max_txid + 1
                or len(group) == MAX_INPUTS
            ):
                close()
        group.append(segment)
    close()
    return found


def _first_snapshot(listing: Listing) -> Compaction | None:
    """TXID 1 as it is, once level 1 is to hold what follows."""
    level = listing[0]
    if _is_young(listing) or not level or level[0].max_txid != 1:
        return None
    if listing[1] and listing[1][0].min_txid == 1:
        return None  # Litestream has merged it
    if listing[LEVEL_SNAPSHOT]:
        return None
    return Compaction(LEVEL_SNAPSHOT, (level[0],), level[0].created_ms)


def _is_young(listing: Listing) -> bool:
    """Whether there is the first copy and little more, all of which stays in level 0."""
    level = listing[0]
    return (
        0 < len(level) <= KEPT_L0
        and level[0].max_txid == 1
        and not any(listing[above] for above in range(1, LEVEL_SNAPSHOT + 1))
    )


def _has_news(listing: Listing) -> bool:
    """Whether a snapshot would hold more than the newest one does."""
    return listing.head > max(listing.reach(LEVEL_SNAPSHOT), 1) and not _is_young(listing)


def _pending(listing: Listing, level: int) -> Sequence[SegmentInfo]:
    """Segments of the level below that are not in this one yet."""
    if level == 1 and _is_young(listing):
        return ()
    done = max(listing.reach(level), listing.start)
    below = listing[level - 1]
    return below[bisect_right(below, done, key=_by_min) :]


def snapshot(
    listing: Listing, settings: LevelSettings, now_ms: int, *, demanded: bool = False
) -> Compaction | None:
    """The snapshot to make now, of what the replica holds; None if there need not be one.

    Args:
        demanded: whether there has to be one of the newest state, whatever the interval.

    Raises:
        GapError, NoBackupError: the replica's newest state cannot be restored.
    """
    snapshots = listing[LEVEL_SNAPSHOT]
    interval_ms = settings.interval_ms(LEVEL_SNAPSHOT)
    if demanded:
        has_news = listing.head > listing.reach(LEVEL_SNAPSHOT)
    else:
        has_news = interval_ms > 0 and _has_news(listing)
    if not has_news:
        return None
    if snapshots and not demanded:
        newest_ms = snapshots[-1].created_ms
        if newest_ms // interval_ms == now_ms // interval_ms:
            return None
    chain = plan(listing).segments[:MAX_INPUTS]
    return Compaction(LEVEL_SNAPSHOT, chain, max(now_ms, chain[-1].created_ms))


def full_snapshot(listing: Listing, full_txid: int) -> Compaction | None:
    """The snapshot to make of a full copy that came after others; None if there is one.

    It is what lets a replica be restored again that is damaged further back, and what ``start`` may
    stand for.

    Args:
        full_txid: TXID of the newest full copy.
    """
    if full_txid <= 1 or listing.reach(LEVEL_SNAPSHOT) >= full_txid:
        return None
    for segment in reversed(listing[0]):
        if segment.min_txid == segment.max_txid == full_txid:
            return Compaction(LEVEL_SNAPSHOT, (segment,), segment.created_ms, is_full=True)
    return None


def _base(listing: Listing, settings: LevelSettings, now_ms: int) -> SegmentInfo | None:
    """The snapshot from which the oldest time within the retention can be restored."""
    oldest_ms = now_ms - round(settings.snapshot_retention_s * 1000)
    for candidate in reversed(listing[LEVEL_SNAPSHOT]):
        if candidate.created_ms < oldest_ms:
            return candidate
    return None


def expired(listing: Listing, settings: LevelSettings, now_ms: int) -> list[SegmentInfo]:
    """Snapshots, then segments of levels 1 to 8, that are not needed any more; in that order.

    The newest of each level stays.
    """
    base = _base(listing, settings, now_ms) if settings.retention else None
    if base is None:
        return []
    doomed = [each for each in listing[LEVEL_SNAPSHOT] if each.max_txid < base.max_txid]
    for level in range(1, LEVEL_SNAPSHOT):
        reach = listing.reach(level)
        for segment in listing[level]:
            if segment.min_txid > base.max_txid:
                break
            if segment.max_txid <= base.max_txid and segment.max_txid < reach:
                doomed.append(segment)
    return [segment for segment in doomed if segment not in listing.pinned]


def expired_l0(listing: Listing, settings: LevelSettings, now_ms: int) -> list[SegmentInfo]:
    """Level-0 segments that are held by a higher level and old enough, oldest first.

    Never the newest `KEPT_L0`, and none behind one that stays.  Those that were merged into one
    segment go together, so that no TXID is listed which nothing leads to.
    """
    if not settings.retention:
        return []
    base = _base(listing, settings, now_ms)
    oldest_ms = now_ms - round(settings.l0_retention_s * 1000)
    doomed: list[SegmentInfo] = []
    for segment in listing[0][:-KEPT_L0]:
        if segment.created_ms > oldest_ms or not _is_held(listing, segment, base):
            break
        doomed.append(segment)
    while doomed and not _is_end(listing, doomed[-1].max_txid, base):
        doomed.pop()
    return [segment for segment in doomed if segment not in listing.pinned]


@dataclass(frozen=True, slots=True)
class L0Files:
    """Segments of level 0 in a replica, counted by what keeps them.

    Attributes:
        eligible: nothing: they may be removed.
        not_compacted: no higher level holds them yet.
        too_recent: they were merged, and are kept for a while (``l0-retention``).
    """

    eligible: int
    not_compacted: int
    too_recent: int


def l0_files(listing: Listing, settings: LevelSettings, now_ms: int) -> L0Files:
    """Count the segments of level 0; takes no longer for many of them."""
    segments = listing[0]
    reach = max(listing.reach(level) for level in range(1, LEVEL_SNAPSHOT + 1))
    n_merged = bisect_right(segments, reach, key=_by_max)
    oldest_ms = now_ms - round(settings.l0_retention_s * 1000)
    removable = max(0, min(n_merged, len(segments) - KEPT_L0))
    n_old = bisect_right(segments, oldest_ms, 0, removable, key=_by_time)
    return L0Files(n_old, len(segments) - n_merged, n_merged - n_old)


def _ripe_l0_ms(listing: Listing, settings: LevelSettings, base: SegmentInfo | None) -> int | None:
    """When the oldest level-0 segments may go; None if they may not as things are."""
    newest_ms = 0
    for segment in listing[0][:-KEPT_L0]:
        if segment in listing.pinned:
            continue
        if not _is_held(listing, segment, base):
            return None
        newest_ms = max(newest_ms, segment.created_ms)
        if _is_end(listing, segment.max_txid, base):
            return newest_ms + round(settings.l0_retention_s * 1000)
    return None


def _is_end(listing: Listing, txid: int, base: SegmentInfo | None) -> bool:
    """Whether what follows a TXID does not need its level-0 segment."""
    return (base is not None and txid <= base.max_txid) or listing.has_end(txid)


def _is_held(listing: Listing, segment: SegmentInfo, base: SegmentInfo | None) -> bool:
    txid = segment.max_txid
    if base is not None and txid <= base.max_txid:
        return True
    if txid == 1:
        first = listing[LEVEL_SNAPSHOT][:1]
        return (bool(first) and first[0].max_txid == 1) or listing.has_merged(1)
    return listing.has_merged(txid)


def next_due_ms(listing: Listing, settings: LevelSettings, now_ms: int) -> int | None:
    """When there may be something to do, if nothing is sent until then; ms since the epoch.

    None: never, so that an idle database sends no requests.
    """
    due: list[int] = []

    def at_next_multiple(interval_ms: int) -> None:
        due.append((now_ms // interval_ms + 1) * interval_ms)

    for level in settings.levels:
        if _pending(listing, level):
            at_next_multiple(settings.interval_ms(level))
    interval_ms = settings.interval_ms(LEVEL_SNAPSHOT)
    if interval_ms and _has_news(listing):
        at_next_multiple(interval_ms)
    if settings.retention:
        base = _base(listing, settings, now_ms)
        ripe_ms = _ripe_l0_ms(listing, settings, base)
        if ripe_ms is not None:
            check_ms = round(settings.l0_retention_check_interval_s * 1000)
            due.append(max(ripe_ms, now_ms + check_ms))
        retention_ms = round(settings.snapshot_retention_s * 1000)
        due.extend(
            max(each.created_ms + retention_ms + 1, now_ms + 1)
            for each in listing[LEVEL_SNAPSHOT]
            if base is None or each.max_txid > base.max_txid
        )
    return min(due, default=None)
