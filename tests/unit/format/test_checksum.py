"""CRC-64 and its combination, page and database checksums, the WAL checksum."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.replica.format.checksum import (
    CHECKSUM_FLAG,
    RollingChecksum,
    crc64,
    crc64_combine,
    page_checksum,
    wal_checksum,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "golden" / "vectors.json").read_text()
)


def vector_pages() -> list[tuple[int, bytes]]:
    return [(1, bytes(512)), (2, bytes(range(256)) * 16)]


def reference_wal_checksum(data: bytes, c1: int, c2: int, big_endian: bool) -> tuple[int, int]:
    """The algorithm as SQLite's file format page words it."""
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    for x0, x1 in zip(words[::2], words[1::2], strict=True):
        c1 = (c1 + x0 + c2) & 0xFFFFFFFF
        c2 = (c2 + x1 + c1) & 0xFFFFFFFF
    return c1, c2


@pytest.mark.parametrize("vector", VECTORS["crc64_go_iso"])
def test_crc64_vectors(vector: dict[str, str]) -> None:
    """The CRC is CRC-64/GO-ISO."""
    data = (
        vector["input_ascii"].encode()
        if "input_ascii" in vector
        else bytes.fromhex(vector["input_hex"])
    )
    assert f"{crc64(data):016x}" == vector["crc"]


def test_page_and_database_checksum_vectors() -> None:
    """Page checksums, and their sum over a database, equal the recorded ones."""
    rolling = RollingChecksum()
    assert rolling.value == CHECKSUM_FLAG
    for vector, (pgno, page) in zip(VECTORS["page_checksum"], vector_pages(), strict=True):
        assert f"{page_checksum(pgno, page):016x}" == vector["checksum"]
        rolling.toggle(pgno, page)
    assert f"{rolling.value:016x}" == VECTORS["rolling_checksum"]["checksum"]


def test_rolling_checksum_depends_on_content_only() -> None:
    """Replacing a page gives the checksum of a database that always had the new content."""
    direct = RollingChecksum()
    direct.toggle(1, b"b" * 512)
    direct.toggle(2, b"c" * 512)
    edited = RollingChecksum()
    edited.toggle(2, b"c" * 512)
    edited.toggle(1, b"a" * 512)
    edited.replace(1, b"a" * 512, b"b" * 512)
    assert edited.value == direct.value
    edited.toggle(1, b"b" * 512)
    edited.toggle(2, b"c" * 512)
    assert edited.value == CHECKSUM_FLAG


@given(st.binary(max_size=300), st.binary(max_size=5000))
def test_crc64_combines(first: bytes, second: bytes) -> None:
    """The CRC of two parts follows from the CRCs of the parts, and chaining agrees with it."""
    whole = crc64(first + second)
    assert crc64_combine(crc64(first), crc64(second), len(second)) == whole
    assert crc64(second, crc64(first)) == whole


@pytest.mark.parametrize("n_bytes", [0, 1, 15, 16, 17, 255, 4096, 1_000_003, 8 << 20])
def test_crc64_combines_long_parts(n_bytes: int) -> None:
    """Combination holds for the sizes of ranged reads too."""
    second = bytes(n_bytes)
    assert crc64_combine(crc64(b"abc"), crc64(second), n_bytes) == crc64(b"abc" + second)


def test_crc64_combine_refuses_a_negative_length() -> None:
    """A negative length is a mistake of the caller, not a part."""
    with pytest.raises(ValueError, match="negative"):
        crc64_combine(1, 2, -1)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    "n_bytes", [0, 8, 24, 56, 64, 72, 504, 512, 1024, 2048, 4096, 4104, 6216, 8192, 65536]
)
def test_wal_checksum_equals_the_plain_algorithm(n_bytes: int, big_endian: bool) -> None:
    """The fast form equals the documented loop, also where every sum overflows."""
    mixed = (b"\x00\x01\xfe\xff\x80SQLite" * (n_bytes // 11 + 1))[:n_bytes]
    for data in (mixed, b"\xff" * n_bytes, bytes(n_bytes)):
        for c1, c2 in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (1, 0x80000000)):
            expected = reference_wal_checksum(data, c1, c2, big_endian)
            assert wal_checksum(data, c1, c2, big_endian) == expected


@given(
    st.integers(0, 200).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_wal_checksum_of_any_data(data: bytes, c1: int, c2: int, big_endian: bool) -> None:
    """The fast form equals the documented loop for any data and start."""
    expected = reference_wal_checksum(data, c1, c2, big_endian)
    assert wal_checksum(memoryview(data), c1, c2, big_endian) == expected


def test_wal_checksum_refuses_odd_lengths() -> None:
    """Data that is not pairs of words is refused instead of being cut."""
    with pytest.raises(ValueError, match="multiples of 8"):
        wal_checksum(b"1234567", 0, 0, False)
