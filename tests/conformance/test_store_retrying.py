"""When the retrying store tries again, how long it waits, and what it tells."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.clock import FakeClock
from support.faulty import FaultyStore
from walship.replica.errors import ObjectNotFound, PreconditionFailed, StoreError, StoreUnavailable
from walship.replica.store.local import LocalStore
from walship.replica.store.retrying import RetryingStore
from walship.replica.store.timestamps import format_timestamp, parse_timestamp


class Setup:
    """A retrying store around a faulty one around a directory."""

    def __init__(self, root: Path, script: list[str], **more: object) -> None:
        self.clock = FakeClock()
        self.inner = LocalStore(root, self.clock)
        self.faulty = FaultyStore(self.inner, script=script)
        self.store = RetryingStore(
            self.faulty,
            self.clock,
            random.Random(1),
            **more,  # type: ignore[arg-type]
        )


def test_success_at_a_later_attempt(tmp_path: Path) -> None:
    """What fails in passing is tried again until it works."""
    setup = Setup(tmp_path, ["before", "before", "ok"])
    setup.store.put("a", b"x")
    assert setup.faulty.calls["put"] == 3
    assert setup.inner.get("a") == b"x"


def test_pauses_grow_and_are_jittered(tmp_path: Path) -> None:
    """Each pause is between half and all of a bound that doubles up to its limit."""
    setup = Setup(
        tmp_path, ["before"] * 8, attempts=8, first_pause_s=1, max_pause_s=5, deadline_s=None
    )
    with pytest.raises(StoreUnavailable):
        setup.store.get("a")
    bounds = [1, 2, 4, 5, 5, 5, 5]
    assert len(setup.clock.sleeps) == len(bounds)
    for pause, bound in zip(setup.clock.sleeps, bounds, strict=True):
        assert bound / 2 <= pause <= bound
    assert len({pause / bound for pause, bound in zip(setup.clock.sleeps, bounds, strict=True)}) > 1


def test_attempts_are_limited(tmp_path: Path) -> None:
    """After the last attempt its error comes out."""
    setup = Setup(tmp_path, ["before"] * 9, attempts=3)
    with pytest.raises(StoreUnavailable):
        setup.store.head("a")
    assert setup.faulty.calls["head"] == 3


def test_the_deadline_is_kept(tmp_path: Path) -> None:
    """No attempt begins after the deadline, and nothing waits for it in vain."""
    setup = Setup(
        tmp_path, ["before"] * 99, attempts=99, first_pause_s=1, max_pause_s=1, deadline_s=3
    )
    began = setup.clock.monotonic()
    with pytest.raises(StoreUnavailable):
        setup.store.get("a")
    assert setup.clock.monotonic() - began <= 3
    assert setup.faulty.calls["get"] >= 3


def test_what_is_final_is_not_tried_again(tmp_path: Path) -> None:
    """Errors that are not retryable come out at once."""
    setup = Setup(tmp_path, [])
    with pytest.raises(ObjectNotFound):
        setup.store.get("a")
    refused = FaultyStore(
        setup.inner, script=["before"], error=lambda operation: StoreError("no", code="X")
    )
    with pytest.raises(StoreError, match="no"):
        RetryingStore(refused, setup.clock).put("a", b"x")
    assert refused.calls["put"] == 1
    assert setup.clock.sleeps == []


def test_somebody_elses_object_is_a_plain_conflict(tmp_path: Path) -> None:
    """A conflict at the first attempt is not ambiguous."""
    setup = Setup(tmp_path, [])
    setup.inner.put("a", b"theirs")
    with pytest.raises(PreconditionFailed) as caught:
        setup.store.put("a", b"mine", if_absent=True)
    assert not caught.value.ambiguous


def test_an_own_object_after_a_lost_answer_is_ambiguous(tmp_path: Path) -> None:
    """A conflict after an attempt without answer is told apart; nothing is assumed."""
    setup = Setup(tmp_path, ["after"])
    with pytest.raises(PreconditionFailed) as caught:
        setup.store.put("a", b"mine", if_absent=True)
    assert caught.value.ambiguous
    assert not caught.value.retryable
    assert setup.inner.get("a") == b"mine"


def test_a_swap_after_a_lost_answer_is_ambiguous(tmp_path: Path) -> None:
    """A compare-and-swap that found its version replaced after an attempt without answer may have
    replaced it itself; one that was answered did not."""
    setup = Setup(tmp_path, ["after"])
    tag = setup.inner.put("a", b"old").etag
    with pytest.raises(PreconditionFailed) as caught:
        setup.store.put("a", b"mine", if_match=tag)
    assert caught.value.ambiguous
    assert not caught.value.retryable
    assert setup.inner.get("a") == b"mine"
    with pytest.raises(PreconditionFailed) as caught:
        setup.store.put("a", b"late", if_match=tag)
    assert not caught.value.ambiguous


def test_reads_are_repeated(tmp_path: Path) -> None:
    """A read is tried again, with its tag, and gives what the store gives."""
    setup = Setup(tmp_path, ["before", "after", "ok", "before", "ok"])
    tag = setup.inner.put("a", b"x").etag
    version = setup.store.read("a")
    assert version is not None
    assert (version.body, version.etag) == (b"x", tag)
    assert setup.store.read("a", unless_etag=tag) is None
    assert setup.faulty.calls["read"] == 5


def test_a_conflict_after_a_clear_failure_is_not_ambiguous(tmp_path: Path) -> None:
    """If the failed attempt certainly had no effect, the object is somebody else's."""
    setup = Setup(tmp_path, [])
    setup.inner.put("a", b"theirs")
    clear = FaultyStore(
        setup.inner,
        script=["before"],
        error=lambda operation: StoreUnavailable("busy", ambiguous=False),
    )
    with pytest.raises(PreconditionFailed) as caught:
        RetryingStore(clear, setup.clock).put("a", b"mine", if_absent=True)
    assert not caught.value.ambiguous


def test_ambiguity_outlives_a_clear_last_failure(tmp_path: Path) -> None:
    """If any attempt may have had an effect, the last error says so."""
    setup = Setup(tmp_path, [])
    kinds = iter([True, False])
    faulty = FaultyStore(
        setup.inner,
        script=["after", "before"],
        error=lambda operation: StoreUnavailable("x", ambiguous=next(kinds)),
    )
    with pytest.raises(StoreUnavailable) as caught:
        RetryingStore(faulty, setup.clock, attempts=2).put("a", b"mine")
    assert caught.value.ambiguous


def test_a_listing_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    """A listing that breaks off is continued: nothing twice, nothing left out."""
    setup = Setup(tmp_path, ["after"] * 4, attempts=9)
    keys = [f"k{n}" for n in range(6)]
    for key in keys:
        setup.inner.put(key, b"")
    assert [info.key for info in setup.store.list("")] == keys
    assert setup.faulty.calls["list"] == 5


def test_deletes_are_repeated(tmp_path: Path) -> None:
    """A delete whose answer was lost is sent again."""
    setup = Setup(tmp_path, ["after", "before"])
    setup.inner.put("a", b"")
    setup.store.delete(["a"])
    assert list(setup.inner.list("")) == []


def test_the_rest_is_passed_on(tmp_path: Path) -> None:
    """URL, layout and close are the inner store's."""
    setup = Setup(tmp_path, [])
    assert setup.store.url == setup.inner.url
    assert setup.store.level_prefix(3) == "ltx/3/"
    setup.store.close()
    with pytest.raises(ValueError, match="attempts"):
        RetryingStore(setup.inner, setup.clock, attempts=0)


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_736_000_000_000, "2025-01-04T14:13:20Z"),
        (1_736_000_000_100, "2025-01-04T14:13:20.1Z"),
        (1_736_000_000_120, "2025-01-04T14:13:20.12Z"),
        (1_736_000_000_001, "2025-01-04T14:13:20.001Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
    ],
)
def test_timestamps(milliseconds: int, text: str) -> None:
    """Times are RFC 3339 in UTC without zeros at the end of the fraction."""
    assert format_timestamp(milliseconds) == text
    assert parse_timestamp(text) == milliseconds


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("2025-01-04T14:13:20.123456789Z", 1_736_000_000_123),
        ("2025-01-04t14:13:20z", 1_736_000_000_000),
        ("2025-01-04T16:13:20+02:00", 1_736_000_000_000),
        ("2025-01-04T08:43:20.5-05:30", 1_736_000_000_500),
        ("2025-01-04 14:13:20Z", None),
        ("2025-01-04T14:13:20", None),
        ("2025-13-04T14:13:20Z", None),
        ("2025-01-04T14:13:20.Z", None),
        ("", None),
    ],
)
def test_timestamps_of_others(text: str, milliseconds: int | None) -> None:
    """Other spellings of RFC 3339 are read, everything else is None."""
    assert parse_timestamp(text) == milliseconds


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
def test_timestamps_round_trip(milliseconds: int) -> None:
    """Every time of the years 1 to 9999 comes back to the millisecond."""
    assert parse_timestamp(format_timestamp(milliseconds)) == milliseconds


@given(st.text())
def test_any_text_is_a_timestamp_or_none(text: str) -> None:
    """No text makes the reader fail."""
    assert parse_timestamp(text) is None or isinstance(parse_timestamp(text), int)
