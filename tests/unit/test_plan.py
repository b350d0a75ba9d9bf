"""The choice of segments: golden plans of Litestream, gaps, and what the errors tell."""

from __future__ import annotations

import pytest

from support.replicas import manifest
from walship.replica.errors import ConfigError, GapError, NoBackupError
from walship.replica.format.types import parse_segment_name
from walship.replica.plan import Plan, format_time, plan
from walship.replica.store.base import SegmentInfo

SETS = [
    "a-4096-levels",
    "b-512",
    "b-65536",
    "c-vacuum-shrink",
    "d-incremental-vacuum",
    "e-mixed-frame-block",
]
WITH_PLANS = ["a-4096-levels", "c-vacuum-shrink"]


def segment(level: int, min_txid: int, max_txid: int, created_ms: int | None = None) -> SegmentInfo:
    created = max_txid * 1000 if created_ms is None else created_ms
    return SegmentInfo(level, min_txid, max_txid, 100, created, f"{level}/{min_txid}-{max_txid}")


def golden_listing(name: str) -> list[SegmentInfo]:
    listing = []
    for entry in manifest(name)["files"]:
        txids = parse_segment_name(entry["path"].rpartition("/")[2])
        assert txids is not None
        listing.append(
            SegmentInfo(entry["level"], *txids, entry["size"], entry["mtime_ms"], entry["path"])
        )
    return listing


def names(chosen: Plan) -> list[tuple[int, str]]:
    return [(each.level, each.key.rpartition("/")[2]) for each in chosen.segments]


def recorded(entries: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(each["level"], each["name"]) for each in entries]


@pytest.mark.parametrize("name", WITH_PLANS)
def test_latest_plan_is_litestreams(name: str) -> None:
    """Without a target the plan equals the one that Litestream's dry run printed."""
    assert names(plan(golden_listing(name))) == recorded(manifest(name)["latest_plan"])


@pytest.mark.parametrize("name", WITH_PLANS)
def test_plan_for_txid_is_litestreams(name: str) -> None:
    """With a TXID the plan equals the one that Litestream's dry run printed."""
    cases = manifest(name)["plan_for_txid"]
    assert cases
    for txid, expected in cases.items():
        assert names(plan(golden_listing(name), txid=int(txid, 16))) == recorded(expected)


@pytest.mark.parametrize("name", SETS)
def test_every_recorded_txid_has_a_plan(name: str) -> None:
    """Each TXID that Litestream could restore is reached exactly."""
    txids = manifest(name)["txids"]
    assert txids
    for txid in txids:
        chosen = plan(golden_listing(name), txid=int(txid, 16))
        assert (chosen.min_txid, chosen.max_txid) == (1, int(txid, 16))


@pytest.mark.parametrize("name", WITH_PLANS)
def test_timestamps_select_what_litestream_selects(name: str) -> None:
    """A timestamp means "strictly before"; before the first segment there is no backup.

    Litestream's command refuses a time after its newest object when it is given a URL, and restores
    the newest state when it is given a configuration; the newest state is right in both.
    """
    listing = golden_listing(name)
    newest_ms = max(each.created_ms for each in listing)
    newest_txid = max(each.max_txid for each in listing)
    outcomes = set()
    for case in manifest(name)["timestamp_cases"]:
        moment = case["timestamp_ms"]
        if "txid" in case:
            expected = int(case["txid"], 16)
        elif moment > newest_ms:
            expected = newest_txid
        else:
            with pytest.raises(NoBackupError, match="the oldest that can be restored is from"):
                plan(listing, before_ms=moment)
            outcomes.add("too early")
            continue
        assert plan(listing, before_ms=moment).max_txid == expected
        outcomes.add("found")
    assert outcomes == {"found", "too early"}


def test_equal_reach_prefers_the_longest_then_the_most_compacted() -> None:
    """Of segments that reach equally far: smallest first TXID, then highest level."""
    listing = [segment(9, 1, 1), segment(0, 2, 4), segment(1, 1, 4), segment(2, 1, 4)]
    assert [(each.level, each.min_txid) for each in plan(listing).segments] == [(9, 1), (2, 1)]


def test_furthest_reach_wins_even_when_it_overlaps() -> None:
    """A segment may begin below what is reached already."""
    listing = [segment(9, 1, 10), segment(0, 11, 11), segment(2, 9, 14), segment(1, 11, 12)]
    assert [each.level for each in plan(listing).segments] == [9, 2]


def test_empty_replica_has_no_backup() -> None:
    """An empty listing is not an error of the reader but the absence of a backup."""
    with pytest.raises(NoBackupError, match="empty"):
        plan([])


def test_two_targets_are_refused() -> None:
    """A TXID and a timestamp exclude each other."""
    with pytest.raises(ConfigError, match="not both"):
        plan([segment(0, 1, 1)], txid=1, before_ms=1)


def test_missing_txid_names_its_neighbours() -> None:
    """Inside a compacted range the error names the nearest TXIDs on both sides."""
    listing = [segment(9, 1, 3), segment(1, 4, 0x10)]
    with pytest.raises(NoBackupError) as caught:
        plan(listing, txid=5)
    assert (
        "nearest that can be: 0000000000000003 (1970-01-01T00:00:03.000Z) and 0000000000000010"
        " (1970-01-01T00:00:16.000Z)"
    ) in str(caught.value)


def test_missing_txid_names_the_nearest_that_can_be_restored() -> None:
    """Behind many segments that lead nowhere the next state is found, however far it is."""
    stray = [segment(0, txid, txid) for txid in range(20, 90)]
    listing = [segment(0, 1, 1), segment(9, 1, 100), *stray]
    for txid in (2, 19, 50, 99):
        with pytest.raises(NoBackupError, match=r"0000000000000001 \(.*\) and 0000000000000064 \("):
            plan(listing, txid=txid)


def test_txid_above_the_newest_names_the_newest() -> None:
    """A TXID that was never replicated is refused, naming the newest one."""
    with pytest.raises(NoBackupError, match="nearest that can be: 0000000000000002"):
        plan([segment(0, 1, 1), segment(0, 2, 2)], txid=9)


def test_txid_zero_is_never_restorable() -> None:
    """There is no state before TXID 1."""
    with pytest.raises(NoBackupError):
        plan([segment(0, 1, 1)], txid=0)


def test_gap_in_the_middle_is_named() -> None:
    """A gap below the newest state is an error which names it and what is left."""
    listing = [segment(0, 1, 1), segment(0, 2, 2), segment(1, 5, 30)]
    with pytest.raises(GapError) as caught:
        plan(listing)
    assert (caught.value.reachable_txid, caught.value.next_txid) == (2, 5)
    message = str(caught.value)
    assert "0000000000000003 to 0000000000000004" in message
    assert "-txid 0000000000000002" in message


def test_gap_before_the_first_segment_leaves_nothing() -> None:
    """Without TXID 1 nothing can be restored."""
    with pytest.raises(GapError, match="no state can be restored"):
        plan([segment(0, 4, 4), segment(0, 5, 5)])


def test_gap_does_not_matter_for_a_txid_before_it() -> None:
    """A TXID below the gap is restored without a word."""
    listing = [segment(0, 1, 1), segment(0, 2, 2), segment(1, 5, 30)]
    assert plan(listing, txid=2) == Plan((listing[0], listing[1]))


def test_timestamp_with_a_gap_warns() -> None:
    """With a timestamp a gap is no error, as in Litestream, but it is not silent."""
    listing = [segment(0, 1, 1), segment(1, 5, 30)]
    chosen = plan(listing, before_ms=40_000)
    assert chosen.max_txid == 1
    assert "gap" in chosen.warnings[0]


def test_plan_adds_up_its_segments() -> None:
    """Size and TXID range are those of all segments."""
    chosen = plan([segment(9, 1, 3), segment(0, 4, 4)])
    assert (chosen.min_txid, chosen.max_txid, chosen.size_bytes) == (1, 4, 200)


def test_times_are_printed_in_utc() -> None:
    """Times in messages are RFC 3339 with milliseconds."""
    assert format_time(1_795_361_441_107) == "2026-11-22T15:30:41.107Z"
