"""The page map: what it says is what was put in, and where it cannot be sure it says nothing."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walship.replica.files import Files
from walship.replica.format.ltx import Encoder, Header
from walship.replica.pagemap import (
    History,
    MapDamaged,
    PageMap,
    SegmentHashes,
    hash_segment,
    page_hash,
)

HISTORY = History("lineage", "s3://bucket/app")
PAGE_SIZE = 512


def _page(pgno: int, txid: int) -> bytes:
    return random.Random(pgno << 16 | txid).randbytes(PAGE_SIZE)


def _segment(txid: int, pgnos: list[int], commit: int) -> SegmentHashes:
    values = [page_hash(_page(pgno, txid)) for pgno in pgnos]
    return SegmentHashes(
        txid, f"{txid:016x}" * 4, PAGE_SIZE, commit, array("I", pgnos), array("Q", values)
    )


def _begin(page_map: PageMap, commit: int, txid: int = 1) -> list[int]:
    expected = []
    with page_map.begin(HISTORY, txid=txid, page_size=PAGE_SIZE, commit=commit) as base:
        for pgno in range(1, commit + 1):
            base.add(pgno, _page(pgno, txid))
            expected.append(page_hash(_page(pgno, txid)))
        base.finish("ab" * 32)
    return expected


def _apply(expected: list[int], segment: SegmentHashes) -> list[int]:
    """The model: the hashes after one more segment."""
    longer = expected + [0] * (segment.commit - len(expected))
    for pgno, value in zip(segment.pgnos, segment.hashes, strict=True):
        longer[pgno - 1] = value
    return longer[: segment.commit]


@pytest.fixture
def page_map(tmp_path: Path) -> PageMap:
    return PageMap(tmp_path, Files())


_steps = st.lists(
    st.tuples(st.integers(1, 40), st.sets(st.integers(1, 40), max_size=12)), max_size=12
)


@settings(max_examples=60)
@given(commit=st.integers(0, 30), steps=_steps, small=st.booleans())
def test_it_is_the_sum_of_its_segments(
    tmp_path_factory: pytest.TempPathFactory,
    commit: int,
    steps: list[tuple[int, set[int]]],
    small: bool,
) -> None:
    """Whatever grows, shrinks or changes: the hashes are those of the pages as they are last."""
    directory = tmp_path_factory.mktemp("map")
    page_map = PageMap(directory, Files())
    with pytest.MonkeyPatch.context() as patch:
        if small:  # windows of a few pages, and a new base every few segments
            patch.setattr("walship.replica.pagemap._WINDOW_PAGES", 7)
            patch.setattr("walship.replica.pagemap._APPENDED_BYTES", 200)
        expected = _begin(page_map, commit)
        for txid, (new_commit, pgnos) in enumerate(steps, 2):
            inside = sorted(pgno for pgno in pgnos if pgno <= new_commit)
            segment = _segment(txid, inside, new_commit)
            expected = _apply(expected, segment)
            page_map.append(HISTORY, segment)
            for each in (page_map, PageMap(directory, Files())):
                end = each.end(HISTORY)
                assert end is not None
                assert (end.txid, end.commit, end.sha256) == (
                    txid,
                    new_commit,
                    f"{txid:016x}",
                )
                assert list(each.hashes(HISTORY)) == expected


def _three_segments(page_map: PageMap) -> dict[int, list[int]]:
    """A map with three segments; the hashes at each TXID."""
    states = {1: _begin(page_map, 5)}
    for txid, pgnos, commit in ((2, [1, 3], 5), (3, [6], 6), (4, [2], 4)):
        segment = _segment(txid, pgnos, commit)
        states[txid] = _apply(states[txid - 1], segment)
        page_map.append(HISTORY, segment)
    return states


def _check(directory: Path, states: dict[int, list[int]]) -> int:
    """What a fresh reader makes of the file: a state that was (its TXID), or nothing (0)."""
    page_map = PageMap(directory, Files())
    end = page_map.end(HISTORY)
    if end is None:
        return 0
    try:
        found = list(page_map.hashes(HISTORY))
    except MapDamaged:
        return 0
    assert found == states[end.txid]
    assert end.commit == len(found)
    return end.txid


def test_cut_off_anywhere(page_map: PageMap, tmp_path: Path) -> None:
    """A file that ends early is a map that ends earlier, or none."""
    states = _three_segments(page_map)
    path = tmp_path / "pages"
    whole = path.read_bytes()
    seen = set()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        seen.add(_check(tmp_path, states))
    assert seen == {0, 1, 2, 3}
    path.write_bytes(whole)
    assert _check(tmp_path, states) == 4


def test_every_bit_flipped(page_map: PageMap, tmp_path: Path) -> None:
    """No damage makes it say something that never was."""
    states = _three_segments(page_map)
    path = tmp_path / "pages"
    whole = path.read_bytes()
    rng = random.Random(7)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert _check(tmp_path, states) < 4


def test_a_torn_end_is_written_over(page_map: PageMap, tmp_path: Path) -> None:
    """The next segment goes where the last whole one ends."""
    states = _three_segments(page_map)
    path = tmp_path / "pages"
    path.write_bytes(path.read_bytes()[:-3])
    again = PageMap(tmp_path, Files())
    again.append(HISTORY, _segment(4, [2], 4))
    assert _check(tmp_path, states) == 4


@pytest.mark.parametrize(
    "segment",
    [
        _segment(4, [1], 5),
        _segment(2, [1], 5),
        SegmentHashes(3, "", 1024, 5, array("I"), array("Q")),
    ],
    ids=["behind a gap", "again", "other page size"],
)
def test_what_does_not_continue_it_is_left_out(page_map: PageMap, segment: SegmentHashes) -> None:
    """Only the very next TXID in the same page size counts."""
    _begin(page_map, 5, txid=2)
    before = list(page_map.hashes(HISTORY))
    page_map.append(HISTORY, segment)
    end = page_map.end(HISTORY)
    assert end is not None
    assert end.txid == 2
    assert list(page_map.hashes(HISTORY)) == before


@pytest.mark.parametrize(
    "other", [History("another", HISTORY.replica), History(HISTORY.lineage, "file:///r")]
)
def test_another_history(page_map: PageMap, other: History) -> None:
    """A map speaks of the lineage and replica it was made for, and of no other."""
    _three_segments(page_map)
    assert page_map.end(other) is None
    with pytest.raises(MapDamaged):
        page_map.hashes(other)
    page_map.append(other, _segment(5, [1], 5))
    end = page_map.end(HISTORY)
    assert end is not None
    assert end.txid == 4


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"WSPB", b"not a map" * 1000])
def test_anything_else_is_no_map(page_map: PageMap, tmp_path: Path, content: bytes) -> None:
    """Files that were never a map: none, no traceback, and a new one can be made."""
    (tmp_path / "pages").write_bytes(content)
    assert page_map.end(HISTORY) is None
    page_map.append(HISTORY, _segment(2, [1], 5))
    expected = _begin(page_map, 3)
    assert list(page_map.hashes(HISTORY)) == expected


def test_an_unfinished_base_changes_nothing(page_map: PageMap, tmp_path: Path) -> None:
    """A base appears when it is whole, and leaves nothing behind when it is given up."""
    states = _three_segments(page_map)
    with page_map.begin(HISTORY, txid=9, page_size=PAGE_SIZE, commit=2) as base:
        base.add(1, _page(1, 9))
    assert _check(tmp_path, states) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]


def test_hashes_of_a_segment() -> None:
    """They are those of its pages; a segment with another TXID is refused by the caller's name."""
    parts: list[bytes] = []
    header = Header(page_size=512, commit=3, min_txid=7, max_txid=7, timestamp_ms=1)
    encoder = Encoder(lambda pieces: parts.extend(bytes(p) for p in pieces), header)
    for pgno in (1, 3):
        encoder.add_page(pgno, _page(pgno, 7))
    encoder.finish()
    body = b"".join(parts)
    found = hash_segment(body, txid=7, sha256="", name="it")
    assert list(found.pgnos) == [1, 3]
    assert list(found.hashes) == [page_hash(_page(1, 7)), page_hash(_page(3, 7))]
    with pytest.raises(Exception, match=r"it: it is not the segment of TXID 0{15}8"):
        hash_segment(body, txid=8, sha256="", name="it")
