"""What to merge and what may be deleted, from listings written out by hand."""

from __future__ import annotations

import pytest

from walship.replica.config.levels import LevelSettings
from walship.replica.levels import (
    KEPT_L0,
    MAX_INPUTS,
    Compaction,
    L0Files,
    Listing,
    compactions,
    expired,
    expired_l0,
    is_due,
    l0_files,
    next_due_ms,
    snapshot,
)
from walship.replica.store.base import SegmentInfo

S = 1000
HOUR = 3600 * S
DAY = 24 * HOUR
#: Midnight, and so a multiple of every interval.
T0 = 19_000 * DAY
SETTINGS = LevelSettings()


def seg(level: int, low: int, high: int, created_ms: int) -> SegmentInfo:
    return SegmentInfo(level, low, high, 100, created_ms, f"{level}/{low}-{high}")


def l0(*times: int, first: int = 1) -> list[SegmentInfo]:
    """Level-0 segments with these times after T0 in ms."""
    return [seg(0, first + n, first + n, T0 + time) for n, time in enumerate(times)]


def newest(count: int = KEPT_L0, *, first: int, at: int = T0 + DAY) -> list[SegmentInfo]:
    """The last level-0 segments, from a day later, which stay and are not merged yet."""
    return [seg(0, first + n, first + n, at) for n in range(count)]


def shape(found: list[Compaction]) -> list[tuple[int, int, int]]:
    return [(each.level, each.min_txid, each.max_txid) for each in found]


def test_inputs_are_grouped_by_the_interval_their_times_lie_in() -> None:
    """Coming late makes the same segments as coming in time; what is from now on waits."""
    listing = Listing([*l0(0, 1 * S, 29 * S, 30 * S, 59 * S, 95 * S), seg(9, 1, 1, T0)])
    late = compactions(listing, SETTINGS, 1, T0 + 100 * S)
    assert shape(late) == [(1, 2, 3), (1, 4, 5)]
    assert [each.timestamp_ms for each in late] == [T0 + 29 * S, T0 + 59 * S]
    assert shape(compactions(listing, SETTINGS, 1, T0 + 30 * S)) == [(1, 2, 3)]
    assert shape(compactions(listing, SETTINGS, 1, T0 + 29 * S)) == []


def test_the_first_segment_goes_to_level_9_and_never_to_level_1() -> None:
    """A full copy is stored once, not in every level."""
    listing = Listing([*l0(0, 1 * S), *newest(first=3)])
    assert shape(compactions(listing, SETTINGS, 1, T0 + DAY)) == [(9, 1, 1), (1, 2, 2)]
    listing.add(seg(9, 1, 9, T0 + DAY))  # the one of TXID 1 has gone since
    assert shape(compactions(listing, SETTINGS, 1, T0 + DAY)) == [(1, 2, 2)]


def test_a_full_copy_followed_by_little_is_left_alone() -> None:
    """As long as all of it stays in level 0 it would only be stored twice."""
    young = Listing(newest(first=1))
    assert compactions(young, SETTINGS, 1, T0 + 3 * DAY) == []
    assert snapshot(young, SETTINGS, T0 + 3 * DAY) is None
    assert next_due_ms(young, SETTINGS, T0 + 3 * DAY) is None
    young.add(seg(0, KEPT_L0 + 1, KEPT_L0 + 1, T0 + DAY))
    assert shape(compactions(young, SETTINGS, 1, T0 + 3 * DAY))[0] == (9, 1, 1)
    assert next_due_ms(young, SETTINGS, T0 + 3 * DAY) is not None


def test_what_litestream_merged_from_the_first_on_is_gone_on_with() -> None:
    """Level 1 begins with TXID 1 there; no snapshot of our own is needed below it."""
    listing = Listing([*l0(0, 1 * S, 31 * S), seg(1, 1, 2, T0 + 1 * S)])
    assert shape(compactions(listing, SETTINGS, 1, T0 + 61 * S)) == [(1, 3, 3)]
    assert compactions(listing, SETTINGS, 2, T0 + HOUR) == []


def test_a_gap_ends_a_group() -> None:
    listing = Listing([seg(9, 1, 4, T0), *l0(0, 1 * S, first=2), *l0(2 * S, first=5)])
    assert shape(compactions(listing, SETTINGS, 1, T0 + 60 * S)) == [(1, 2, 3), (1, 5, 5)]


def test_a_segment_within_its_neighbour_is_left_out() -> None:
    """What a writer left that lost its lease while it merged."""
    level_1 = [seg(1, 2, 5, T0), seg(1, 2, 9, T0 + 1), seg(1, 4, 6, T0 + 1), seg(1, 8, 12, T0 + 2)]
    listing = Listing(level_1)
    (merged,) = compactions(listing, SETTINGS, 2, T0 + 10 * 60 * S)
    assert [(each.min_txid, each.max_txid) for each in merged.inputs] == [(2, 5), (2, 9), (8, 12)]


def test_so_many_inputs_and_no_more() -> None:
    listing = Listing([seg(9, 1, 1, T0), *l0(*[1] * 600, first=2)])
    found = compactions(listing, SETTINGS, 1, T0 + 60 * S)
    assert [len(each.inputs) for each in found] == [MAX_INPUTS, MAX_INPUTS, 600 - 2 * MAX_INPUTS]


def test_times_from_the_future_do_not_stop_it() -> None:
    """The clock was set back: what is newer than now is merged at each end of an interval."""
    listing = Listing([seg(9, 1, 1, T0), *l0(HOUR, HOUR, HOUR, first=2)])
    assert shape(compactions(listing, SETTINGS, 1, T0 + 5 * S)) == [(1, 2, 4)]


@pytest.mark.parametrize(
    ("last", "now", "due"),
    [(None, 5, True), (10, 29, False), (10, 30, True), (31, 29, True), (31, 59, False)],
)
def test_due_at_multiples_of_the_interval(last: int | None, now: int, due: bool) -> None:
    """And also when the clock was set back over one."""
    assert is_due(30, last, now) is due


def test_a_snapshot_a_day() -> None:
    """Of what the replica holds, timed when it is made; a restart makes no second one."""
    segments = [seg(9, 1, 1, T0 - HOUR), seg(1, 2, 9, T0 - HOUR), *l0(-10 * S, first=10)]
    listing = Listing(segments)
    made = snapshot(listing, SETTINGS, T0 + 5)
    assert made is not None
    assert (made.level, made.min_txid, made.max_txid, made.timestamp_ms) == (9, 1, 10, T0 + 5)
    listing.add(seg(9, 1, 10, T0 + 5))
    listing.add(seg(0, 11, 11, T0 + 10))
    assert snapshot(listing, SETTINGS, T0 + HOUR) is None
    assert snapshot(listing, SETTINGS, T0 + DAY) is not None


def test_no_snapshot_without_anything_new() -> None:
    listing = Listing([seg(9, 1, 10, T0), *l0(0, first=10)])
    assert snapshot(listing, SETTINGS, T0 + 3 * DAY) is None
    off = LevelSettings(snapshot_interval_s=0)
    listing.add(seg(0, 11, 11, T0))
    assert snapshot(listing, SETTINGS, T0 + 3 * DAY) is not None
    assert snapshot(listing, off, T0 + 3 * DAY) is None


def test_level_0_goes_when_held_above_and_old_enough() -> None:
    """Oldest first, nothing behind one that stays."""
    listing = Listing(
        [
            seg(9, 1, 1, T0),
            seg(1, 2, 3, T0 + 2),
            seg(1, 5, 6, T0 + 5),
            *l0(0, 1, 2, 3, 4, 5),
            *newest(first=7),
        ]
    )
    now = T0 + 301 * S
    assert [each.max_txid for each in expired_l0(listing, SETTINGS, now)] == [1, 2, 3]
    # TXID 3 is too young: TXID 2 stays with it, for nothing would lead to TXID 3 any more.
    assert [each.max_txid for each in expired_l0(listing, SETTINGS, T0 + 300 * S + 1)] == [1]
    listing.add(seg(1, 4, 4, T0 + 6))
    assert [each.max_txid for each in expired_l0(listing, SETTINGS, now)] == [1, 2, 3, 4, 5, 6]
    assert expired_l0(listing, LevelSettings(retention=False), now) == []


def test_level_0_is_counted_by_what_keeps_it() -> None:
    """What no level holds, what is kept for a while, what may go; the newest are never removed."""
    assert l0_files(Listing(), SETTINGS, T0) == L0Files(0, 0, 0)
    assert l0_files(Listing(l0(0, 1)), SETTINGS, T0 + HOUR) == L0Files(0, 2, 0)
    segments = [seg(9, 1, 1, T0), seg(1, 2, 20, T0 + 20 * S)]
    listing = Listing([*segments, *l0(*(n * S for n in range(20))), *l0(20 * S, first=21)])
    assert l0_files(listing, SETTINGS, T0 + 10 * S) == L0Files(0, 1, 20)
    assert l0_files(listing, SETTINGS, T0 + 304 * S) == L0Files(5, 1, 15)
    assert l0_files(listing, SETTINGS, T0 + HOUR) == L0Files(21 - KEPT_L0, 1, KEPT_L0 - 1)


def test_the_newest_of_level_0_stay() -> None:
    """A writer that comes back looks for what followed its record, however old it is."""
    listing = Listing([seg(9, 1, 1, T0), seg(1, 2, 20, T0 + 20), *l0(*range(20))])
    gone = expired_l0(listing, SETTINGS, T0 + HOUR)
    assert [each.max_txid for each in gone] == [1]  # TXID 2 to 20 were merged together
    for txid in range(2, 21):
        listing.add(seg(1, txid, txid, T0 + txid))
    gone = expired_l0(listing, SETTINGS, T0 + HOUR)
    assert [each.max_txid for each in gone] == list(range(1, 20 - KEPT_L0 + 1))


def test_level_0_under_the_oldest_snapshot_goes_whatever_it_was_merged_with() -> None:
    """What it was merged into has gone already, so that no segment ends there any more."""
    listing = Listing([seg(9, 1, 3, T0), *l0(1, 2, first=2), *newest(first=4)])
    assert [each.max_txid for each in expired_l0(listing, SETTINGS, T0 + 2 * DAY)] == [2, 3]
    listing.remove([listing[0][1]])
    assert [each.max_txid for each in expired_l0(listing, SETTINGS, T0 + 2 * DAY)] == [2]
    assert next_due_ms(listing, SETTINGS, T0 + 2 * DAY) == T0 + 2 * DAY + 15 * S


def test_the_first_segment_stays_until_a_snapshot_holds_it() -> None:
    """Level 1 begins behind it: without it nothing could be restored."""
    listing = Listing([seg(1, 2, 3, T0 + 2), *l0(0, 1, 2), *newest(first=4)])
    assert expired_l0(listing, SETTINGS, T0 + HOUR) == []
    listing.add(seg(9, 1, 3, T0 + HOUR))
    assert expired_l0(listing, SETTINGS, T0 + HOUR) == []  # TXID 2 still stands on it
    gone = expired_l0(listing, SETTINGS, T0 + HOUR + DAY + 1)
    assert [each.max_txid for each in gone] == [1, 2, 3]


def test_a_snapshot_stays_until_a_younger_one_is_old() -> None:
    """So that each time within the retention has one to begin at."""
    listing = Listing(
        [
            *(seg(9, 1, 10 * day, T0 + day * DAY) for day in (1, 2, 3)),
            *(seg(1, txid, txid + 4, T0) for txid in range(6, 41, 5)),
            seg(2, 6, 25, T0),
            seg(2, 26, 30, T0),
            seg(3, 6, 20, T0),
        ]
    )
    assert expired(listing, SETTINGS, T0 + 2 * DAY) == []
    doomed = expired(listing, SETTINGS, T0 + 3 * DAY + 1)
    assert [(each.level, each.max_txid) for each in doomed] == [(9, 10), (1, 10), (1, 15), (1, 20)]
    assert expired(listing, LevelSettings(retention=False), T0 + 3 * DAY + 1) == []


def test_at_rest_nothing_is_ever_due() -> None:
    """So an idle database sends no requests."""
    at_rest = Listing([seg(9, 1, 10, T0 - 2 * DAY), *l0(-2 * DAY, first=10)])
    for level in (1, 2, 3):
        at_rest.add(seg(level, 2, 10, T0 - 2 * DAY))
    assert next_due_ms(at_rest, SETTINGS, T0) is None
    assert next_due_ms(Listing(l0(-2 * DAY)), SETTINGS, T0) is None


def test_when_something_is_due_next() -> None:
    listing = Listing([seg(9, 1, 1, T0), *l0(0, 1 * S)])
    assert next_due_ms(listing, SETTINGS, T0 + 2 * S) == T0 + 30 * S
    listing.add(seg(1, 2, 2, T0 + 1 * S))
    assert next_due_ms(listing, SETTINGS, T0 + 31 * S) == T0 + 300 * S
    for level in (2, 3):
        listing.add(seg(level, 2, 2, T0 + 1 * S))
    assert next_due_ms(listing, SETTINGS, T0 + 2 * HOUR) == T0 + DAY
