"""The plan against a slow model which follows the rule word by word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.replica.errors import GapError, NoBackupError
from walship.replica.plan import plan
from walship.replica.store.base import SegmentInfo


@st.composite
def listings(draw: st.DrawFn) -> list[SegmentInfo]:
    n_segments = draw(st.integers(1, 14))
    listing = {}
    for _ in range(n_segments):
        level = draw(st.sampled_from([0, 0, 0, 1, 1, 2, 8, 9]))
        low = 1 if level == 9 else draw(st.integers(1, 12))
        high = low if level == 0 else draw(st.integers(low, 14))
        created_ms = draw(st.integers(0, 20))
        listing[level, low, high] = SegmentInfo(
            level, low, high, 100, created_ms, f"{level}/{low}-{high}"
        )
    return draw(st.permutations(list(listing.values())))


def model(eligible: list[SegmentInfo]) -> list[SegmentInfo]:
    """The chain, found by looking at every segment in every step."""
    chain = sorted(each for each in eligible if each.level == 9)[-1:]
    reached = chain[-1].max_txid if chain else 0
    while True:
        candidates = [
            each
            for each in eligible
            if each.level != 9 and each.min_txid <= reached + 1 and each.max_txid > reached
        ]
        if not candidates:
            return chain
        best = sorted(candidates, key=lambda each: (-each.max_txid, each.min_txid, -each.level))[0]
        chain.append(best)
        reached = best.max_txid


@given(listings())
def test_latest_is_the_models_chain_or_a_gap(listing: list[SegmentInfo]) -> None:
    """The newest state: the model's chain; what it cannot reach is an error."""
    expected = model(listing)
    reached = expected[-1].max_txid if expected else 0
    behind = [each for each in listing if each.min_txid > reached + 1]
    if behind:
        with pytest.raises(GapError) as caught:
            plan(listing)
        assert caught.value.reachable_txid == reached
        assert caught.value.next_txid == min(each.min_txid for each in behind)
    else:
        assert list(plan(listing).segments) == expected


@given(listings(), st.integers(0, 16))
def test_txid_is_reached_exactly_or_refused(listing: list[SegmentInfo], txid: int) -> None:
    """A TXID: the model's chain over the segments that do not pass it, if it ends there."""
    expected = model([each for each in listing if each.max_txid <= txid])
    if expected and expected[-1].max_txid == txid:
        assert list(plan(listing, txid=txid).segments) == expected
    else:
        with pytest.raises(NoBackupError):
            plan(listing, txid=txid)


@given(listings(), st.integers(0, 22))
def test_timestamp_uses_what_is_strictly_older(listing: list[SegmentInfo], before_ms: int) -> None:
    """A timestamp: the model's chain over the segments created before it."""
    expected = model([each for each in listing if each.created_ms < before_ms])
    if expected:
        assert list(plan(listing, before_ms=before_ms).segments) == expected
    else:
        with pytest.raises(NoBackupError):
            plan(listing, before_ms=before_ms)


@given(listings())
def test_every_plan_covers_its_range_without_a_gap(listing: list[SegmentInfo]) -> None:
    """A plan begins at TXID 1 and each segment continues or overlaps the one before it."""
    for txid in {each.max_txid for each in listing}:
        try:
            chosen = plan(listing, txid=txid)
        except NoBackupError:
            continue
        reached = 0
        for each in chosen.segments:
            assert each.min_txid <= reached + 1 <= each.max_txid
            reached = each.max_txid
        assert reached == txid
