"""Which segments a restore needs: a pure function of a replica's listing.

The choice is Litestream's: the newest snapshot that fits the target, then always the segment that
reaches furthest without leaving a gap.  Nothing here reads a store; `replica.restore` lists the
replica, asks for a plan and executes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from walship.replica.errors import ConfigError, GapError, NoBackupError
from walship.replica.format.types import LEVEL_SNAPSHOT, format_txid
from walship.replica.store.base import SegmentInfo

__all__ = ["Plan", "Restorable", "format_time", "plan", "plan_from", "restorable"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Segments to apply, oldest first; together they cover TXID 1 to ``max_txid`` without a gap.

    Attributes:
        segments: at least one; a later one wins where two hold the same page.
        warnings: sentences about what the plan leaves out, for people.
    """

    segments: tuple[SegmentInfo, ...]
    warnings: tuple[str, ...] = ()

    @property
    def min_txid(self) -> int:
        """First TXID covered."""
        return self.segments[0].min_txid

    @property
    def max_txid(self) -> int:
        """TXID of the state the plan leads to."""
        return self.segments[-1].max_txid

    @property
    def size_bytes(self) -> int:
        """Sum of the segments' sizes."""
        return sum(segment.size_bytes for segment in self.segments)


def plan(
    segments: Iterable[SegmentInfo], *, txid: int | None = None, before_ms: int | None = None
) -> Plan:
    """Choose the segments that lead to a state.

    Without ``txid`` and ``before_ms`` that is the newest state; then a gap below it is an error.

    Args:
        segments: the replica's listing, all levels, in any order.
        txid: restore exactly this TXID.
        before_ms: use only segments whose ``created_ms`` is before this, in ms since the epoch.

    Raises:
        ConfigError: both targets were given.
        NoBackupError: the replica has nothing that fits; the message names the nearest that does.
        GapError: the newest state cannot be reached.
    """
    if txid is not None and before_ms is not None:
        raise ConfigError("give a TXID or a timestamp to restore to, not both")
    listing = sorted(segments)
    if not listing:
        raise NoBackupError("the replica is empty: there is nothing to restore")
    if txid is not None:
        return _plan_txid(listing, txid)
    if before_ms is not None:
        return _plan_time(listing, before_ms)
    return _plan_latest(listing)


class Restorable(NamedTuple):
    """Which states can be restored.

    Attributes:
        points: for each of them the segment of the lowest level that ends with it, oldest first.
        missing: TXIDs that are missing behind the last of them, though later ones are there.
    """

    points: list[SegmentInfo]
    missing: range


def restorable(segments: Iterable[SegmentInfo]) -> Restorable:
    """Every state that a chain of segments leads to.

    Args:
        segments: the replica's listing, all levels, in any order.
    """
    points: list[SegmentInfo] = []
    missing = range(0)
    reached = 0
    for segment in sorted(segments, key=lambda s: (s.max_txid, s.level, -s.min_txid)):
        if segment.min_txid > reached + 1:
            missing = missing or range(reached + 1, segment.min_txid)
        elif segment.max_txid > reached:
            points.append(segment)
            reached = segment.max_txid
            missing = range(0)  # what ends here starts before it
    return Restorable(points, missing)


def format_time(timestamp_ms: int) -> str:
    """A time in ms since the epoch as RFC 3339 text in UTC, with milliseconds."""
    try:
        moment = datetime.fromtimestamp(timestamp_ms // 1000, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return f"{timestamp_ms} ms since 1970"
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{timestamp_ms % 1000:03d}Z"


def plan_from(segments: Iterable[SegmentInfo], txid: int) -> list[SegmentInfo]:
    """The segments that lead from the state at a TXID, which is there, to the newest, oldest first.

    Snapshots are not used.  Ends before a gap; empty if nothing continues from there.
    """
    return _extend([], txid, sorted(segments))


def _chain(listing: Sequence[SegmentInfo]) -> list[SegmentInfo]:
    """The segments of a sorted listing that reach the highest TXID without a gap, oldest first."""
    snapshots = [segment for segment in listing if segment.level == LEVEL_SNAPSHOT]
    newest = snapshots[-1:]
    return _extend(newest, _reach(newest), listing)


def _extend(
    chain: list[SegmentInfo], reached: int, listing: Sequence[SegmentInfo]
) -> list[SegmentInfo]:
    """Append to a chain what continues it, from the levels below the snapshots."""
    # Once a segment may continue the chain it stays a candidate, so one pass in the order of the
    # first TXID is enough; only the best candidate so far can ever be chosen.
    pending = iter(sorted((s for s in listing if s.level != LEVEL_SNAPSHOT), key=_by_min_txid))
    upcoming = next(pending, None)
    best: SegmentInfo | None = None
    while True:
        while upcoming is not None and upcoming.min_txid <= reached + 1:
            if best is None or _preference(upcoming) > _preference(best):
                best = upcoming
            upcoming = next(pending, None)
        if best is None or best.max_txid <= reached:
            return chain
        chain.append(best)
        reached = best.max_txid


def _by_min_txid(segment: SegmentInfo) -> int:
    return segment.min_txid


def _preference(segment: SegmentInfo) -> tuple[int, int, int, int]:
    """Furthest reach first; then the longest, the most compacted, the oldest."""
    return segment.max_txid, -segment.min_txid, segment.level, -segment.created_ms


def _reach(chain: Sequence[SegmentInfo]) -> int:
    return chain[-1].max_txid if chain else 0


def _plan_latest(listing: Sequence[SegmentInfo]) -> Plan:
    chain = _chain(listing)
    reached = _reach(chain)
    behind = [segment for segment in listing if segment.min_txid > reached + 1]
    if not behind:
        return _finish(chain, lambda: "the replica is empty: there is nothing to restore")
    next_txid = min(segment.min_txid for segment in behind)
    newest = max(segment.max_txid for segment in listing)
    if chain:
        last = format_time(chain[-1].created_ms)
        advice = f"restore up to the gap with -txid {format_txid(reached)} (of {last})"
    else:
        advice = "no state can be restored"
    raise GapError(
        f"the replica has a gap: TXIDs {format_txid(reached + 1)} to {format_txid(next_txid - 1)}"
        f" are missing, the newest is {format_txid(newest)}; {advice}",
        reachable_txid=reached,
        next_txid=next_txid,
    )


def _plan_txid(listing: Sequence[SegmentInfo], txid: int) -> Plan:
    chain = _chain([segment for segment in listing if segment.max_txid <= txid])
    if _reach(chain) == txid and chain:
        return Plan(tuple(chain))
    points = restorable(listing).points
    at = bisect_left(points, txid, key=lambda point: point.max_txid)
    nearest = [_point(point) for point in points[max(0, at - 1) : at + 1]]
    if nearest:
        advice = "nearest that can be: " + " and ".join(nearest)
    else:
        advice = "no other state can be restored either"
    raise NoBackupError(f"TXID {format_txid(txid)} cannot be restored from this replica; {advice}")


def _plan_time(listing: Sequence[SegmentInfo], before_ms: int) -> Plan:
    eligible = [segment for segment in listing if segment.created_ms < before_ms]

    def nothing() -> str:
        starts = [segment for segment in listing if segment.min_txid == 1]
        if not starts:
            return "no state can be restored: the replica has no segment that starts at TXID 1"
        oldest = min(starts, key=lambda segment: (segment.created_ms, segment.max_txid))
        return (
            f"the replica holds no state before {format_time(before_ms)}; the oldest that can be"
            f" restored is from {format_time(oldest.created_ms)} (TXID"
            f" {format_txid(oldest.max_txid)}): give a later time"
        )

    chain = _chain(eligible)
    reached = _reach(chain)
    warnings: tuple[str, ...] = ()
    if chain and any(segment.min_txid > reached + 1 for segment in eligible):
        warnings = (
            f"the replica has a gap behind TXID {format_txid(reached)}: later segments from before"
            f" {format_time(before_ms)} are left out",
        )
    return _finish(chain, nothing, warnings)


def _point(point: SegmentInfo) -> str:
    return f"{format_txid(point.max_txid)} ({format_time(point.created_ms)})"


def _finish(
    chain: Sequence[SegmentInfo], nothing: Callable[[], str], warnings: tuple[str, ...] = ()
) -> Plan:
    if not chain:
        raise NoBackupError(nothing())
    return Plan(tuple(chain), warnings)
