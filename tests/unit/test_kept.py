"""What is kept on this disk to be merged: bounded, and never relied on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.life import Life
from walship.replica.compaction import Kept
from walship.replica.config.levels import LevelSettings
from walship.replica.files import Files
from walship.replica.store.base import SegmentInfo


def segment(txid: int, size: int) -> SegmentInfo:
    return SegmentInfo(0, txid, txid, size, 0, "")


def has(kept: Kept, wanted: SegmentInfo) -> bool:
    path = kept.path(wanted)
    return path is not None and path.exists()


def names(directory: Path) -> int:
    return len(list(directory.glob("*.kept")))


def test_the_oldest_go_first(tmp_path: Path) -> None:
    kept = Kept(tmp_path, Files(), max_bytes=1000)
    for txid in range(1, 8):
        kept.keep(0, txid, txid, bytes([txid]) * 200)
    assert [txid for txid in range(1, 8) if has(kept, segment(txid, 200))] == [3, 4, 5, 6, 7]
    assert names(tmp_path) == 5
    kept.keep(0, 9, 9, bytes(251))  # more than a quarter of all
    assert not has(kept, segment(9, 251))
    kept.drop([segment(3, 200), segment(1, 200)])
    assert names(tmp_path) == 4
    kept.clear()
    assert names(tmp_path) == 0


def test_a_file_is_kept_by_a_second_name(tmp_path: Path) -> None:
    """And one of another size than the replica's object is none."""
    kept = Kept(tmp_path, Files())
    body = tmp_path / "body"
    body.write_bytes(b"12345")
    kept.keep(1, 2, 9, body)
    kept.keep(1, 2, 9, body)
    body.unlink()
    found = kept.path(SegmentInfo(1, 2, 9, 5, 0, ""))
    assert found is not None
    assert found.read_bytes() == b"12345"
    assert kept.path(SegmentInfo(1, 2, 9, 4, 0, "")) is None


def test_what_an_earlier_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "0-x.kept").write_bytes(b"x")
    (tmp_path / "17.merging").write_bytes(b"x")
    (tmp_path / "journal").write_bytes(b"x")
    Kept(tmp_path, Files()).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("damage", ["torn", "other", "gone", "directory"])
def test_merges_do_not_rely_on_it(damage: str, tmp_path: Path) -> None:
    """Whatever became of the files, the replica's own objects are merged then."""
    ways: dict[str, Callable[[Path], object]] = {
        "torn": lambda path: path.write_bytes(path.read_bytes()[:50].ljust(200, b"\0")),
        "other": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        "gone": lambda path: path.unlink(),
        "directory": lambda path: (path.unlink(), path.mkdir()),
    }
    life = Life(tmp_path, LevelSettings(intervals_s=(30.0, 120.0)), seed=2)
    for _ in range(60):
        life.commit()
        for path in tmp_path.glob("*.kept"):
            if path.is_file():
                ways[damage](path)
        life.advance(11.0)
    assert {s.level for s in life.listing()} >= {0, 1, 2, 9}
    assert max(s.max_txid for s in life.listing() if s.level == 1) > 55
    life.assert_txids_are_there(samples=20)
