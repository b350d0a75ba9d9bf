"""Properties of the WAL reader, over generated logs and damaged ones."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from walship.replica.errors import FormatError
from walship.replica.format.checksum import wal_checksum
from walship.replica.format.types import WalSalts
from walship.replica.format.wal import (
    WalHeader,
    frame_offset,
    last_commit,
    verified_frames,
    wal_size,
)

u32 = st.integers(0, 2**32 - 1)
salts = st.builds(WalSalts, u32, u32)


def append_frames(
    wal: bytearray, header: WalHeader, sums: tuple[int, int], frames: list[tuple[int, int, bytes]]
) -> tuple[int, int]:
    """Append frames as SQLite does; gives the running checksum behind them."""
    for pgno, commit, pattern in frames:
        page = (pattern * header.page_size)[: header.page_size]
        head = struct.pack(">2I", pgno, commit)
        sums = wal_checksum(head + page, *sums, header.big_endian)
        wal += head + struct.pack(">4I", *header.salts, *sums) + page
    return sums


frame_lists = st.lists(
    st.tuples(
        st.integers(1, 2**32 - 1),
        st.just(0) | st.integers(1, 99),
        st.binary(min_size=1, max_size=9),
    ),
    max_size=8,
)
headers = st.builds(
    lambda size, pair, big_endian: WalHeader.make(size, pair, big_endian=big_endian),
    st.sampled_from([512, 1024, 65536]),
    salts,
    st.booleans(),
)


@given(headers, frame_lists, frame_lists, salts)
def test_new_generation_over_an_old_one(
    header: WalHeader,
    new: list[tuple[int, int, bytes]],
    old: list[tuple[int, int, bytes]],
    old_salts: WalSalts,
) -> None:
    """Frames of an older generation behind the new ones never count, whatever their checksums."""
    old_header = WalHeader.make(header.page_size, old_salts, big_endian=header.big_endian)
    wal = bytearray(header.pack())
    sums = append_frames(wal, header, header.checksum, new)
    if old_salts != header.salts:
        # The worst case: an old frame whose checksum continues the new ones.
        append_frames(wal, old_header, sums, old)
    data = bytes(wal)
    found = list(verified_frames(lambda offset, n: data[offset : offset + n], header))
    assert [(f.pgno, f.commit) for f in found] == [(pgno, commit) for pgno, commit, _ in new]
    commits = [n for n, frame in enumerate(new, 1) if frame[1]]
    last = last_commit(lambda offset, n: data[offset : offset + n], header)
    assert (last.frame_no if last else 0) == max(commits, default=0)


@given(headers, frame_lists, st.data())
def test_damage_ends_the_log_where_it_is(
    header: WalHeader, frames: list[tuple[int, int, bytes]], data: st.DataObject
) -> None:
    """Frames before the damage are found, the damaged one and all behind it are not."""
    wal = bytearray(header.pack())
    append_frames(wal, header, header.checksum, frames)
    if not frames:
        return
    at = data.draw(st.integers(32, len(wal) - 1))
    wal[at] ^= data.draw(st.integers(1, 255))
    n_intact = max(n for n in range(len(frames) + 1) if wal_size(n, header.page_size) <= at)
    found = verified_frames(lambda offset, n: bytes(wal[offset : offset + n]), header)
    assert [frame.frame_no for frame in found] == list(range(1, n_intact + 1))
    assert frame_offset(n_intact + 1, header.page_size) == wal_size(n_intact, header.page_size)


@given(st.binary(max_size=40), headers, st.integers(0, 31), st.integers(1, 255))
def test_headers_are_right_or_refused(data: bytes, header: WalHeader, at: int, flip: int) -> None:
    """Arbitrary bytes and headers with one damaged byte raise FormatError and nothing else."""
    damaged = bytearray(header.pack())
    damaged[at] ^= flip
    for candidate in (data, bytes(damaged)):
        try:
            WalHeader.parse(candidate)
        except FormatError:
            continue
        raise AssertionError(f"accepted {candidate.hex()}")
