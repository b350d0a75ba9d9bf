"""The header of the wal-index, as the SQLite that is here writes it."""

from __future__ import annotations

from pathlib import Path

import apsw

from walship.replica.format.wal import WAL_HEADER_SIZE, WalHeader, frame_offset
from walship.replica.format.walindex import COPIES_SIZE, IndexHeader, is_initialised, whole


def test_what_sqlite_writes(tmp_path: Path) -> None:
    """Frames, salts and the running checksum are those of the WAL."""
    path = tmp_path / "app.db"
    db = apsw.Connection(str(path))
    db.pragma("journal_mode", "wal")
    db.execute("CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(9000))")
    copies = Path(f"{path}-shm").read_bytes()[:COPIES_SIZE]
    wal = Path(f"{path}-wal").read_bytes()
    db.close()
    assert is_initialised(copies)
    header = whole(copies)
    assert header is not None
    found = IndexHeader.parse(header)
    wal_header = WalHeader.parse(wal[:WAL_HEADER_SIZE])
    assert len(wal) == frame_offset(found.mx_frame + 1, wal_header.page_size)
    assert (found.salts, found.is_big_endian) == (wal_header.salts, wal_header.big_endian)
    last = frame_offset(found.mx_frame, wal_header.page_size)
    words = (wal[last + 16 : last + 20], wal[last + 20 : last + 24])
    assert found.checksum == tuple(int.from_bytes(word, "big") for word in words)


def test_torn_and_absent() -> None:
    """Half of a change is no header, and neither is a short or empty file."""
    header = bytes(range(1, 49))
    assert whole(header * 2) == header
    assert whole(header + bytes([9]) + header[1:]) is None
    assert whole(header) is None
    assert not is_initialised(header)
    assert not is_initialised(bytes(COPIES_SIZE))
