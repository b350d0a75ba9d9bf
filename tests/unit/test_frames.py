"""Which frame of each page counts, in small and in large batches."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import apsw
import pytest

from walship.replica import frames
from walship.replica.files import Files
from walship.replica.format.wal import frame_offset, parse_frame_header, wal_size
from walship.replica.frames import WalReader, collect, pages


@pytest.fixture
def wal(tmp_path: Path) -> WalReader:
    """A WAL in which pages repeat, and in which the database shrinks at the end."""
    with closing(apsw.Connection(str(tmp_path / "a.db"))) as db:
        db.pragma("page_size", 512)
        db.pragma("journal_mode", "wal")
        db.wal_autocheckpoint(0)
        db.execute("create table t(id integer primary key, x)")
        for n in range(300):
            db.execute("insert into t(x) values(randomblob(?))", (n % 900,))
        db.execute("update t set x = randomblob(300) where id % 3 = 0")
        db.execute("delete from t where id > 100")
        db.execute("vacuum")
        data = Path(f"{tmp_path}/a.db-wal").read_bytes()
    path = tmp_path / "copy-wal"
    path.write_bytes(data)
    reader = WalReader(str(path), Files())
    assert reader.refresh()
    return reader


def model(wal: WalReader, after: int, last: int) -> dict[int, bytes]:
    """The pages by the plainest way there is: later frames overwrite earlier ones."""
    data = Path(wal.path).read_bytes()
    found: dict[int, bytes] = {}
    commit = 0
    for frame_no in range(after + 1, last + 1):
        offset = frame_offset(frame_no, 512)
        header = parse_frame_header(data[offset : offset + 24])
        found[header.pgno] = data[offset + 24 : offset + 24 + 512]
        commit = header.commit or commit
    return {pgno: page for pgno, page in sorted(found.items()) if pgno <= commit}


@pytest.mark.parametrize("way", ["kept", "sorted", "dense"])
@pytest.mark.parametrize("after", [0, 7])
def test_the_newest_frame_of_each_page_counts(
    way: str, after: int, wal: WalReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a batch: ascending pages, the newest content, none above the end."""
    monkeypatch.setattr(frames, "_KEEP_BYTES", 1 << 30 if way == "kept" else 0)
    monkeypatch.setattr(frames, "_DENSE_FRAMES", 1 if way == "dense" else 1 << 30)
    monkeypatch.setattr(frames, "_SCAN_BYTES", 50_000)
    monkeypatch.setattr(frames, "_RUN_BYTES", 2_000)
    size = Path(wal.path).stat().st_size
    last = (size - wal_size(0, 512)) // (512 + 24)
    batch = collect(wal, after, last, 512)

    def no_main(offset: int, length: int) -> bytes:
        raise AssertionError("nothing of this comes from the main file")

    for _ in range(2):
        found = {pgno: bytes(page) for pgno, page in pages(wal, batch, 512, no_main)}
        assert found == model(wal, after, last)
        assert list(found) == sorted(found)
    assert (batch.first, batch.last) == (after + 1, last)
    assert (batch.kept is not None) == (way == "kept")
