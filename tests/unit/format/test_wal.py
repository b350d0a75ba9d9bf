"""The WAL reader against logs that SQLite wrote and logs that SQLite must read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from walship.replica.errors import ChecksumError, FormatError
from walship.replica.format.checksum import wal_checksum
from walship.replica.format.types import WalSalts
from walship.replica.format.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    CommitPoint,
    FrameHeader,
    WalHeader,
    frame_offset,
    iter_frame_pgnos,
    last_commit,
    n_frames_in,
    parse_frame_header,
    verified_frames,
    wal_size,
)

PAGE_SIZES = [512, 1024, 4096, 65536]


def reader(wal: bytes) -> Callable[[int, int], bytes]:
    """A read callable over bytes in memory."""
    return lambda offset, length: wal[offset : offset + length]


def open_wal_database(path: Path, page_size: int) -> apsw.Connection:
    con = apsw.Connection(str(path))
    con.execute(f"pragma page_size={page_size}")
    con.execute("pragma journal_mode=wal")
    con.wal_autocheckpoint(0)
    con.execute("create table t(id integer primary key, v text)")
    return con


def insert(con: apsw.Connection, n: int) -> None:
    with con:
        con.executemany("insert into t(v) values(?)", [(f"row {i} " * 30,) for i in range(n)])


def wal_of(path: Path) -> bytes:
    return Path(f"{path}-wal").read_bytes()


def published_frames(con: apsw.Connection) -> int:
    """mxFrame, as SQLite itself reports it."""
    ((_busy, mx_frame, _checkpointed),) = con.execute("pragma wal_checkpoint(noop)")
    return int(mx_frame)


def to_big_endian(wal: bytes) -> bytes:
    """The same log with checksums over big-endian words, as SQLite on such a machine writes it."""
    header = WalHeader.parse(wal)
    new_header = WalHeader.make(
        header.page_size,
        header.salts,
        checkpoint_seq=header.checkpoint_seq,
        big_endian=True,
    )
    out = bytearray(new_header.pack())
    sums = new_header.checksum
    for frame in verified_frames(reader(wal), header):
        head = struct.pack(">2I", frame.pgno, frame.commit)
        sums = wal_checksum(head + frame.page, *sums, True)
        out += head + struct.pack(">4I", *header.salts, *sums) + frame.page
    return bytes(out)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_reads_what_sqlite_wrote(tmp_path: Path, page_size: int) -> None:
    """All frames of a log by SQLite verify, and the last commit is the published one."""
    con = open_wal_database(tmp_path / "a.db", page_size)
    for _ in range(4):
        insert(con, 7)
    wal = wal_of(tmp_path / "a.db")
    header = WalHeader.parse(wal)
    assert header.page_size == page_size
    frames = list(verified_frames(reader(wal), header))
    assert len(frames) == published_frames(con) == n_frames_in(len(wal), page_size)
    assert wal_size(len(frames), page_size) == len(wal)
    commit = last_commit(reader(wal), header)
    ((n_pages,),) = con.execute("pragma page_count")
    assert commit == CommitPoint(len(frames), n_pages, frames[-1].checksum)
    con.close()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_sqlite_reads_big_endian_logs_made_here(tmp_path: Path, page_size: int) -> None:
    """Checksums in the other byte order are those that SQLite accepts in its recovery."""
    con = open_wal_database(tmp_path / "a.db", page_size)
    insert(con, 20)
    wal = to_big_endian(wal_of(tmp_path / "a.db"))
    header = WalHeader.parse(wal)
    assert header.big_endian
    assert last_commit(reader(wal), header) is not None
    (tmp_path / "b.db").write_bytes((tmp_path / "a.db").read_bytes())
    (tmp_path / "b.db-wal").write_bytes(wal)
    copy = apsw.Connection(str(tmp_path / "b.db"))
    assert copy.execute("select count(*) from t").fetchone() == (20,)
    assert copy.execute("pragma integrity_check").fetchone() == ("ok",)
    copy.close()
    con.close()


def test_stale_frames_behind_a_restart_are_not_read(tmp_path: Path) -> None:
    """After a WAL restart the frames of the old generation, still in the file, do not count."""
    con = open_wal_database(tmp_path / "a.db", 1024)
    insert(con, 60)
    n_old = published_frames(con)
    con.execute("pragma wal_checkpoint(restart)")
    insert(con, 1)
    wal = wal_of(tmp_path / "a.db")
    header = WalHeader.parse(wal)
    frames = list(verified_frames(reader(wal), header))
    assert len(frames) == published_frames(con) < n_old == n_frames_in(len(wal), 1024)
    con.close()


def test_uncommitted_frames_are_valid_but_no_commit(tmp_path: Path) -> None:
    """Frames of a spilled, unfinished transaction verify, yet the last commit lies before them."""
    con = open_wal_database(tmp_path / "a.db", 1024)
    insert(con, 5)
    committed = published_frames(con)
    con.execute("pragma cache_size=5")
    con.execute("begin")
    con.executemany("insert into t(v) values(?)", [("x" * 900,)] * 100)
    wal = wal_of(tmp_path / "a.db")
    header = WalHeader.parse(wal)
    assert len(list(verified_frames(reader(wal), header))) > committed
    commit = last_commit(reader(wal), header)
    assert commit is not None
    assert commit.frame_no == committed
    con.execute("rollback")
    con.close()


def test_resumes_from_a_frame_and_its_checksum(tmp_path: Path) -> None:
    """Reading on from a stored position gives the rest of the frames, and stops where asked."""
    con = open_wal_database(tmp_path / "a.db", 512)
    insert(con, 30)
    wal = wal_of(tmp_path / "a.db")
    con.close()
    header = WalHeader.parse(wal)
    frames = list(verified_frames(reader(wal), header))
    assert len(frames) > 12
    at = frames[4]
    rest = verified_frames(
        reader(wal), header, first_frame=at.frame_no + 1, checksum=at.checksum, last_frame=10
    )
    assert [(f.frame_no, f.pgno, bytes(f.page)) for f in rest] == [
        (f.frame_no, f.pgno, bytes(f.page)) for f in frames[5:10]
    ]
    wrong = (at.checksum[0] ^ 1, at.checksum[1])
    assert not list(verified_frames(reader(wal), header, first_frame=6, checksum=wrong))
    with pytest.raises(ValueError, match="checksum of the frame before"):
        list(verified_frames(reader(wal), header, first_frame=2))


def test_reads_in_bounded_batches() -> None:
    """A log longer than one batch is read in pieces of about a megabyte, each byte once."""
    header = WalHeader.make(65536, WalSalts(1, 2))
    wal = bytearray(header.pack())
    sums = header.checksum
    for pgno in range(1, 41):
        head = struct.pack(">2I", pgno, pgno)
        page = bytes([pgno]) * 65536
        sums = wal_checksum(head + page, *sums, False)
        wal += head + struct.pack(">4I", 1, 2, *sums) + page
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return bytes(wal[offset : offset + length])

    assert [f.frame_no for f in verified_frames(read, header)] == list(range(1, 41))
    assert max(length for _, length in asked) <= 1 << 20
    assert [offset for offset, _ in asked] == [32, 32 + 15 * 65560, 32 + 30 * 65560]


@pytest.mark.parametrize("where", [0, 5, 8, 12, 16, 20, 24, 24 + 511])
def test_any_damage_ends_the_log_before_that_frame(tmp_path: Path, where: int) -> None:
    """A flipped bit in page number, commit, salts, checksums or page ends the valid frames."""
    con = open_wal_database(tmp_path / "a.db", 512)
    insert(con, 10)
    wal = bytearray(wal_of(tmp_path / "a.db"))
    con.close()
    header = WalHeader.parse(wal)
    wal[frame_offset(4, 512) + where] ^= 0x10
    frames = list(verified_frames(reader(bytes(wal)), header))
    assert [frame.frame_no for frame in frames] == [1, 2, 3]


def test_a_cut_frame_does_not_count(tmp_path: Path) -> None:
    """A log that ends in the middle of a frame ends with the frame before."""
    con = open_wal_database(tmp_path / "a.db", 512)
    insert(con, 3)
    wal = wal_of(tmp_path / "a.db")
    con.close()
    header = WalHeader.parse(wal)
    n_frames = n_frames_in(len(wal), 512)
    assert len(list(verified_frames(reader(wal[:-1]), header))) == n_frames - 1
    assert last_commit(reader(wal[:WAL_HEADER_SIZE]), header) is None


def test_page_number_zero_ends_the_log() -> None:
    """A frame for page 0 is not valid even if its checksum matches."""
    header = WalHeader.make(512, WalSalts(7, 8))
    sums = wal_checksum(bytes(8 + 512), *header.checksum, False)
    wal = header.pack() + struct.pack(">6I", 0, 0, 7, 8, *sums) + bytes(512)
    assert not list(verified_frames(reader(wal), header))


def test_frame_headers_in_bulk(tmp_path: Path) -> None:
    """The bulk iterator gives the same page numbers as parsing each header."""
    con = open_wal_database(tmp_path / "a.db", 4096)
    insert(con, 50)
    wal = wal_of(tmp_path / "a.db")
    con.close()
    n_frames = n_frames_in(len(wal), 4096)
    bulk = list(iter_frame_pgnos(memoryview(wal)[WAL_HEADER_SIZE:], 4096))
    one_by_one = [parse_frame_header(wal[frame_offset(n + 1, 4096) :]) for n in range(n_frames)]
    assert bulk == [(frame.pgno,) for frame in one_by_one]
    assert isinstance(one_by_one[0], FrameHeader)
    assert one_by_one[0].salts == WalHeader.parse(wal).salts
    assert one_by_one[-1].checksum == one_by_one[-1][4:]
    assert list(iter_frame_pgnos(b"", 4096)) == []
    with pytest.raises(FormatError, match="whole number"):
        iter_frame_pgnos(wal, 4096)
    with pytest.raises(FormatError, match="24 expected"):
        parse_frame_header(bytes(FRAME_HEADER_SIZE - 1))


def test_header_round_trip() -> None:
    """A header that is packed and parsed again is the same, in both byte orders."""
    for big_endian in (False, True):
        header = WalHeader.make(
            65536, WalSalts(0xFFFFFFFF, 1), checkpoint_seq=9, big_endian=big_endian
        )
        assert len(header.pack()) == WAL_HEADER_SIZE
        assert WalHeader.parse(header.pack()) == header


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 0x377F0684, "magic"),
        (4, 3007001, "version 3007001"),
        (8, 1000, "page size: 1000"),
        (8, 1, "page size: 1"),
        (12, 99, "checksum"),
        (16, 99, "checksum"),
        (28, 99, "checksum"),
    ],
)
def test_bad_headers_are_refused(offset: int, value: int, message: str) -> None:
    """Each field of the header is checked, and the error names it."""
    data = bytearray(WalHeader.make(4096, WalSalts(3, 4)).pack())
    struct.pack_into(">I", data, offset, value)
    with pytest.raises(FormatError, match=message) as caught:
        WalHeader.parse(data)
    assert isinstance(caught.value, ChecksumError) == (message == "checksum")


def test_short_header_is_refused() -> None:
    """Fewer than 32 bytes are not a header."""
    with pytest.raises(FormatError, match="31 bytes"):
        WalHeader.parse(bytes(31))
