"""Which states a listing can give back: against restore plans for each TXID, and in words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.replicas import START_MS, golden_copy, local_store, write_pages
from walship import cli
from walship.replica.errors import ConfigError, FormatError, NoBackupError
from walship.replica.marks import (
    Mark,
    find_mark,
    list_marks,
    pinned,
    put_mark,
    remove_mark,
)
from walship.replica.plan import plan, restorable
from walship.replica.store.base import SegmentInfo
from walship.replica.timeline import Gap, read_timeline


def _write(root: Path, *segments: tuple[int, int, int]) -> None:
    for level, min_txid, max_txid in segments:
        write_pages(root, level, min_txid, max_txid, 2, range(1, 3))


def _segment(level: int, min_txid: int, max_txid: int) -> SegmentInfo:
    return SegmentInfo(level, min_txid, max_txid, 200, START_MS + 1000 * max_txid, "")


def _restorable(segments: list[SegmentInfo], txid: int) -> bool:
    try:
        return plan(segments, txid=txid).max_txid == txid
    except NoBackupError:
        return False


def test_a_life(tmp_path: Path) -> None:
    """Snapshots, merged levels and fresh uploads are stretches of their own, oldest first."""
    _write(tmp_path, (9, 1, 10), (9, 1, 40), (2, 11, 20), (2, 21, 30), (2, 31, 50), (1, 51, 55))
    _write(tmp_path, (1, 56, 60), (0, 60, 60), (0, 61, 61), (0, 62, 62))
    found = read_timeline(local_store(tmp_path))
    assert [(s.level, s.min_txid, s.max_txid, s.n_points) for s in found.stretches] == [
        (9, 10, 10, 1),
        (2, 20, 50, 4),
        (1, 55, 60, 2),
        (0, 61, 62, 2),
    ]
    assert [s.step_ms for s in found.stretches] == [0, 10_000, 5_000, 1_000]
    assert (found.stretches[1].from_ms, found.stretches[1].to_ms) == (
        START_MS + 20_000,
        START_MS + 50_000,
    )
    assert (found.gap, found.warning, found.marks) == (None, "", ())


def test_what_is_missing(tmp_path: Path) -> None:
    """A gap ends what can be restored; one that a later snapshot makes good does not count."""
    _write(tmp_path, *((0, n, n) for n in (1, 2, 3, 6, 20)))
    found = read_timeline(local_store(tmp_path))
    assert (found.stretches[-1].max_txid, found.gap) == (3, Gap(4, 5))
    _write(tmp_path, (9, 1, 20))
    found = read_timeline(local_store(tmp_path))
    assert (found.stretches[-1].max_txid, found.gap) == (20, None)
    with pytest.raises(NoBackupError, match="no backup"):
        read_timeline(local_store(tmp_path / "nothing"))
    _write(tmp_path / "headless", (0, 2, 2))
    with pytest.raises(NoBackupError, match="0000000000000001 to 0000000000000001"):
        read_timeline(local_store(tmp_path / "headless"))


_LISTINGS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=14
)


@given(_LISTINGS)
def test_each_state_is_what_a_plan_says(rows: list[tuple[int, int, int]]) -> None:
    """For any listing the states are exactly the TXIDs that restore accepts."""
    segments = [
        _segment(level, 1 if level == 9 else low, low + (0 if level == 0 else more))
        for level, low, more in rows
    ]
    points = restorable(segments).points
    expected = [txid for txid in range(1, 30) if _restorable(segments, txid)]
    assert [point.max_txid for point in points] == expected


@given(_LISTINGS, st.sets(st.integers(1, 18), max_size=4))
def test_what_marks_pin_is_enough(rows: list[tuple[int, int, int]], txids: set[int]) -> None:
    """When all is deleted but what marks pin, each state that was there can still be restored."""
    segments = [
        _segment(level, 1 if level == 9 else low, low + (0 if level == 0 else more))
        for level, low, more in rows
    ]
    keep = pinned(segments, txids)
    assert keep <= set(segments)
    for txid in txids:
        assert _restorable(list(keep), txid) == _restorable(segments, txid)


def test_marks(tmp_path: Path) -> None:
    """Made once, found, listed, replaced, removed; a repeated request is no second mark."""
    _write(tmp_path, *((0, n, n) for n in range(1, 6)))
    store = local_store(tmp_path)
    mark = Mark("before-migration", 3, START_MS)
    put_mark(store, mark)
    put_mark(store, mark)  # the answer was lost
    with pytest.raises(ConfigError, match="already, at TXID 0000000000000003"):
        put_mark(store, Mark("before-migration", 4, START_MS))
    put_mark(store, Mark("V1.0_x", 1, START_MS + 1))
    assert list_marks(store) == [Mark("V1.0_x", 1, START_MS + 1), mark]
    put_mark(store, Mark("before-migration", 4, START_MS), replace=True)
    assert find_mark(store, "before-migration").txid == 4
    with pytest.raises(ConfigError, match="did you mean before-migration"):
        find_mark(store, "before-migrations")
    with pytest.raises(ConfigError, match=r"there are: V1\.0_x, before-migration"):
        find_mark(store, "zzz")
    assert remove_mark(store, "before-migration").txid == 4
    assert remove_mark(store, "V1.0_x").txid == 1
    with pytest.raises(ConfigError, match="nor any other"):
        remove_mark(store, "V1.0_x")
    with pytest.raises(NoBackupError):
        find_mark(local_store(tmp_path / "nothing"), "x")


@pytest.mark.parametrize(
    "label", ["", ".", "..", "-x", ".x", "a/b", "a b", "ä", "a\n", "x" * 101, "a%2fb", "a\0"]
)
def test_what_cannot_be_a_label(tmp_path: Path, label: str) -> None:
    """A label is a plain name: nothing that is a path, an option, or hard to type."""
    with pytest.raises(ConfigError, match="label"):
        put_mark(local_store(tmp_path), Mark(label, 1, START_MS))
    with pytest.raises(ConfigError, match="label"):
        find_mark(local_store(tmp_path), label)
    assert list(tmp_path.iterdir()) == []


def test_a_mark_that_cannot_be_read(tmp_path: Path) -> None:
    """Bytes of any kind in a mark's place give one error, and the others stay listed."""
    _write(tmp_path, (0, 1, 1))
    store = local_store(tmp_path)
    put_mark(store, Mark("good", 1, START_MS))
    whole = store.get("marks/good.json")
    rng = random.Random(3)
    for n in range(200):
        body = bytearray(whole[: rng.randrange(len(whole))] if n % 2 else whole)
        if body:
            body[rng.randrange(len(body))] = rng.randrange(256)
        store.put("marks/bad.json", bytes(body))
        with pytest.raises(FormatError, match="'bad'"):
            find_mark(store, "bad")
    assert [mark.label for mark in list_marks(store)] == ["good"]
    with pytest.raises(ConfigError, match="cannot be read"):
        put_mark(store, Mark("bad", 1, START_MS))


# --- the command line -----------------------------------------------------------------------------


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`timeline` for people and as JSON, `restore -label`, `unmark`."""
    root = golden_copy("a-4096-levels", tmp_path)
    store = local_store(root)
    put_mark(store, Mark("kept", 0x12, START_MS))
    put_mark(store, Mark("merged", 2, START_MS))
    code, out, err = _run(capsys, "timeline", root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["from", "txid"]
    assert any("each upload" in line for line in lines)
    assert [line.split()[:2] for line in lines[-2:]] == [
        ["merged", "0000000000000002"],
        ["kept", "0000000000000012"],
    ]
    code, out, _ = _run(capsys, "timeline", "-json", root)
    found = json.loads(out)
    assert found["ranges"][-1]["max_txid"] == "0000000000000013"
    restorable = {mark["label"]: mark["restorable"] for mark in found["marks"]}
    for mark in found["marks"]:
        target = tmp_path / f"{mark['label']}.db"
        code, out, err = _run(capsys, "restore", "-label", mark["label"], "-o", target, root)
        if restorable[mark["label"]]:
            assert (code, f"TXID {mark['txid']}" in err) == (0, True)
        else:
            assert code == 1
            assert "nearest that can be" in err
            assert mark["nearest_txids"]
        assert target.exists() == restorable[mark["label"]]
    assert _run(capsys, "unmark", root, "kept")[0] == 0
    code, _, err = _run(capsys, "restore", "-label", "merge", "-o", tmp_path / "x.db", root)
    assert (code, "did you mean merged" in err) == (1, True)
    code, _, err = _run(capsys, "restore", "-if-replica-exists", "-label", "x", "-o", "x.db", root)
    assert code == 1
    code, _, err = _run(
        capsys, "restore", "-label", "merged", "-txid", "0" * 15 + "1", "-o", "x.db", root
    )
    assert (code, "not several" in err) == (1, True)
