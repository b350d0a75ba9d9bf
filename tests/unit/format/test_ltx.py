"""The LTX encoder and decoder: rules of the format, limits, errors."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Iterable
from typing import Any

import lz4.block
import lz4.frame
import pytest

from walship.replica.errors import ChecksumError, FormatError
from walship.replica.format.checksum import (
    CHECKSUM_FLAG,
    RollingChecksum,
    crc64,
    crc64_combine,
)
from walship.replica.format.ltx import (
    Decoder,
    EncodedSegment,
    Encoder,
    Header,
    PageEncoding,
    decode,
    decode_frames,
    index_size_from_tail,
    iter_frames,
    page_frame,
    parse_index,
)
from walship.replica.format.types import TXID_MAX, WalSalts, lock_pgno

HEADER = Header(
    page_size=512,
    commit=300,
    min_txid=7,
    max_txid=7,
    timestamp_ms=1_700_000_000_123,
    wal_offset=32,
    wal_size=536,
    salts=WalSalts(0x01020304, 0x05060708),
)


def discard(_: object) -> None:
    """A ``write`` for files that nobody reads."""


def page(pgno: int, page_size: int = 512) -> bytes:
    return (b"page %d " % pgno * page_size)[:page_size]


def encode(
    header: Header,
    pages: Iterable[tuple[int, bytes]],
    encoding: PageEncoding = PageEncoding.BLOCK,
) -> bytes:
    out: list[Any] = []
    encoder = Encoder(out.extend, header, encoding)
    for pgno, content in pages:
        encoder.add_page(pgno, content)
    segment = encoder.finish()
    data = b"".join(out)
    assert segment.size_bytes == len(data)
    return data


def small_file(encoding: PageEncoding = PageEncoding.BLOCK) -> bytes:
    return encode(HEADER, [(n, page(n)) for n in (1, 2, 128, 300)], encoding)


def resealed(data: bytes) -> bytes:
    """``data`` with a file checksum that fits it, for files whose pages decode."""
    index_start = len(data) - index_size_from_tail(data)
    crc = crc64(data[:100])
    view = memoryview(data)[100 : index_start - 6]
    while view:
        _, flags, size = struct.unpack_from(">IHI", view)
        if flags & 1:
            head, length = 10, 10 + size
            content: bytes = lz4.block.decompress(view[10:length], uncompressed_size=1 << 16)
        else:
            content, n_read = lz4.frame.decompress(view[6:], return_bytes_read=True)
            head, length = 6, 6 + n_read
        crc = crc64(content, crc64(view[:head], crc))
        view = view[length:]
    crc = crc64(data[index_start - 6 : -8], crc)
    return data[:-8] + (crc | CHECKSUM_FLAG).to_bytes(8, "big")


def assemble(header: bytes, frames: list[tuple[int, bytes]], post_apply: int = 0) -> bytes:
    """A file from raw frames, index and checksum right, nothing else checked."""
    index = bytearray()
    offset = 100
    for pgno, frame in frames:
        for value in (pgno, offset, len(frame)):
            while value > 127:
                index.append(value & 127 | 128)
                value >>= 7
            index.append(value)
        offset += len(frame)
    index.append(0)
    body = header + b"".join(frame for _, frame in frames) + bytes(6) + index
    body += len(index).to_bytes(8, "big") + post_apply.to_bytes(8, "big")
    return resealed(body + bytes(8))


def block_frame(pgno: int, content: bytes, flags: int = 1) -> bytes:
    block: bytes = lz4.block.compress(content, store_size=False)
    return struct.pack(">IHI", pgno, flags, len(block)) + block


# --- Header ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": 1}, "unknown flags: 0x00000001"),
        ({"flags": 0x102}, "unknown flags"),
        ({"page_size": 500}, "page size: 500"),
        ({"page_size": 256}, "page size: 256"),
        ({"page_size": 131072}, "page size: 131072"),
        ({"commit": 0}, "commit 0"),
        ({"commit": 2**32}, "commit size"),
        ({"min_txid": 0}, "TXID range"),
        ({"min_txid": 8}, "TXID range"),
        ({"max_txid": TXID_MAX + 1}, "TXID range"),
        ({"timestamp_ms": 2**63}, "timestamp"),
        ({"wal_offset": -1}, "WAL offset"),
        ({"wal_size": -1}, "WAL size"),
        ({"wal_offset": 0}, "no WAL offset"),
        ({"wal_offset": 0, "wal_size": 0}, "no WAL offset"),
        ({"wal_offset": 0, "salts": WalSalts(0, 0)}, "no WAL offset"),
        ({"salts": WalSalts(2**32, 0)}, "salts"),
        ({"node_id": -1}, "node id"),
        ({"pre_apply_checksum": CHECKSUM_FLAG}, "pre-apply"),
        ({"flags": 0}, "pre-apply"),
        ({"flags": 0, "pre_apply_checksum": 5}, "pre-apply"),
        ({"flags": 0, "pre_apply_checksum": CHECKSUM_FLAG, "min_txid": 1}, "pre-apply"),
    ],
)
def test_bad_header_fields_are_named(change: dict[str, Any], message: str) -> None:
    """A header that breaks a rule is refused, and the message names the field."""
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(HEADER, **change).pack()


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 65536},
        {"commit": 2**32 - 1},
        {"max_txid": TXID_MAX},
        {"timestamp_ms": -1},
        {"node_id": 2**64 - 1},
        {"wal_offset": 0, "wal_size": 0, "salts": WalSalts(0, 0)},
        {"wal_offset": 32, "wal_size": 0, "salts": WalSalts(0, 0)},
        {"flags": 0, "pre_apply_checksum": CHECKSUM_FLAG | 5},
        {"flags": 0, "commit": 0, "min_txid": 1},
    ],
)
def test_header_round_trip(change: dict[str, Any]) -> None:
    """Extreme but valid headers survive packing."""
    header = dataclasses.replace(HEADER, **change)
    assert Header.unpack(header.pack()) == header


def test_header_of_something_else() -> None:
    """Other files and short ones are refused with a message that says so."""
    with pytest.raises(FormatError, match="not an LTX file"):
        Header.unpack(b"SQLite format 3\x00" + bytes(84))
    with pytest.raises(FormatError, match="99 bytes"):
        Header.unpack(HEADER.pack()[:99])


# --- Encoder ---


def test_known_bytes() -> None:
    """A file with one stored page has the bytes that the format prescribes."""
    data = encode(HEADER, [(6, bytes(512))])
    frame = block_frame(6, bytes(512))
    index = b"\x06\x64" + bytes([len(frame)]) + b"\x00"
    assert data[:100] == HEADER.pack()
    assert data[100:-34] == frame
    assert data[-34:-8] == bytes(6) + index + (4).to_bytes(8, "big") + bytes(8)
    covered = HEADER.pack() + frame[:10] + bytes(512) + data[100 + len(frame) : -8]
    assert data[-8:] == (crc64(covered) | CHECKSUM_FLAG).to_bytes(8, "big")


@pytest.mark.parametrize("pgno", [1, 127, 128, 16383, 16384, 2**32 - 1])
def test_index_varints(pgno: int) -> None:
    """Page numbers of every varint length are found through the index."""
    data = encode(dataclasses.replace(HEADER, commit=2**32 - 1), [(pgno, page(pgno))])
    index = parse_index(data, file_size=len(data))
    assert index.find(pgno) == (100, index.lengths[0])
    assert decode(data)[1] == [(pgno, page(pgno))]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([(5, page(5)), (5, page(5))], "page 5 comes after page 5"),
        ([(5, page(5)), (4, page(4))], "page 4 comes after page 5"),
        ([(0, page(1))], "no page number 0"),
        ([(301, page(1))], "above the commit size of 300"),
        ([(1, page(1)[:-1])], "511 bytes"),
        ([(1, page(1) + b"x")], "513 bytes"),
    ],
)
@pytest.mark.parametrize("encoding", PageEncoding)
def test_encoder_refuses_bad_pages(
    pages: list[tuple[int, bytes]], message: str, encoding: PageEncoding
) -> None:
    """Order, range and size of pages are checked before anything is written."""
    with pytest.raises(FormatError, match=message):
        encode(HEADER, pages, encoding)


@pytest.mark.parametrize("present", [[2, 3], [1, 3], [1, 2], []])
def test_incomplete_snapshots_are_refused(present: list[int]) -> None:
    """With min TXID 1 every page is needed, by the encoder and by the decoder."""
    header = dataclasses.replace(HEADER, min_txid=1, commit=3)
    with pytest.raises(FormatError, match="snapshot lacks page"):
        encode(header, [(n, page(n)) for n in present])
    data = assemble(header.pack(), [(n, block_frame(n, page(n))) for n in present])
    with pytest.raises(FormatError, match=rf"lacks {3 - len(present)} of 3 pages"):
        decode(data)


def test_lock_page_is_never_stored() -> None:
    """The lock page is refused by encoder and decoder, its neighbours are not."""
    lock = lock_pgno(65536)
    header = dataclasses.replace(HEADER, page_size=65536, commit=lock + 1)
    neighbours = [(n, page(n, 65536)) for n in (lock - 1, lock + 1)]
    assert decode(encode(header, neighbours))[1] == neighbours
    with pytest.raises(FormatError, match="lock page"):
        encode(header, [(lock, page(lock, 65536))])
    data = assemble(header.pack(), [(lock, block_frame(lock, page(lock, 65536)))])
    with pytest.raises(FormatError, match="lock page"):
        decode(data)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_snapshot_round_the_lock_page(beyond: int) -> None:
    """A complete database that ends before, at or behind the lock page needs all but that page."""
    lock = lock_pgno(65536)
    header = dataclasses.replace(HEADER, page_size=65536, commit=lock + beyond, min_txid=1)
    zero = bytes(65536)
    block = lz4.block.compress(zero, store_size=False)
    out: list[Any] = []
    encoder = Encoder(out.extend, header)
    expected = [n for n in range(1, header.commit + 1) if n != lock]
    for pgno in expected:
        encoder.add_block(pgno, block, zero)
    assert encoder.finish().n_pages == len(expected)
    data = b"".join(out)
    assert [pgno for pgno, _ in Decoder(data)] == expected

    incomplete = Encoder(discard, header)
    for pgno in expected[:-1]:
        incomplete.add_block(pgno, block, zero)
    with pytest.raises(FormatError, match=f"lacks page {expected[-1]}"):
        incomplete.finish()


def test_batches_suit_writev() -> None:
    """Output comes in batches of at most 1024 buffers and about half a megabyte, in file order."""
    header = dataclasses.replace(HEADER, page_size=4096, commit=3000)
    batches: list[list[Any]] = []
    encoder = Encoder(lambda buffers: batches.append(list(buffers)), header)
    for pgno in range(1, 3001):
        content = os.urandom(4096) if pgno < 1000 else page(pgno, 4096)
        encoder.add_page(pgno, content)
    segment = encoder.finish()
    assert max(map(len, batches)) <= 1024
    sizes = [sum(map(len, batch)) for batch in batches]
    assert max(sizes) < 1 << 20
    assert len(batches) > 8
    data = b"".join(b"".join(batch) for batch in batches)
    assert Decoder(data).finish() == segment


def test_a_page_buffer_can_be_reused_at_once() -> None:
    """What the caller does with its buffer after ``add_page`` does not change the file."""
    buffer = bytearray(512)
    for encoding in PageEncoding:
        out: list[Any] = []
        encoder = Encoder(out.extend, HEADER, encoding)
        for pgno in range(1, 40):
            buffer[:] = page(pgno)
            encoder.add_page(pgno, memoryview(buffer))
        encoder.finish()
        assert decode(b"".join(out))[1] == [(n, page(n)) for n in range(1, 40)]


def test_finish_only_once() -> None:
    """A finished file takes no more pages and is not finished twice."""
    encoder = Encoder(discard, HEADER)
    encoder.finish()
    with pytest.raises(FormatError, match="already finished"):
        encoder.finish()
    with pytest.raises(FormatError, match="already finished"):
        encoder.add_page(1, page(1))


def test_a_file_without_pages_is_valid() -> None:
    """Only the commit size changes, for example by truncation."""
    data = encode(HEADER, [])
    assert decode(data) == (HEADER, [])
    assert len(parse_index(data, file_size=len(data)).pgnos) == 0


def test_frames_are_those_of_older_writers() -> None:
    """The frame encoding begins like Litestream's before 0.5.16 and ends in mark and checksum."""
    frame_data = encode(HEADER, [(1, page(1))], PageEncoding.FRAME)
    assert frame_data[104:113] == bytes.fromhex("0000 04224d18 6440a7")
    index = parse_index(frame_data)
    assert frame_data[index.end_offset - 8 : index.end_offset - 4] == bytes(4)


# --- Decoder ---


@pytest.mark.parametrize("encoding", PageEncoding)
@pytest.mark.parametrize("step", [1, 3, 100, 1 << 20])
def test_streaming_in_pieces(encoding: PageEncoding, step: int) -> None:
    """However the bytes arrive, the pages are the same."""
    data = small_file(encoding)
    stream = io.BytesIO(data)
    decoder = Decoder(lambda n: stream.read(min(n, step)))
    assert list(decoder) == decode(data)[1]
    assert decoder.finish().size_bytes == len(data)


@pytest.mark.parametrize("encoding", PageEncoding)
def test_every_truncation_is_noticed(encoding: PageEncoding) -> None:
    """A file that lacks any number of bytes at its end is refused."""
    data = small_file(encoding)
    for n_bytes in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:n_bytes])
    for extra in (b"\x00", b"LTX1", data):
        with pytest.raises(FormatError, match="behind the trailer"):
            decode(data + extra)
        with pytest.raises(FormatError, match="behind the trailer"):
            Decoder(io.BytesIO(data + extra).read).finish()


def test_one_byte_too_many_behind_a_long_index() -> None:
    """The end of the file is looked for even if all that is needed was read exactly."""
    data = encode(dataclasses.replace(HEADER, commit=2000), [(n, page(n)) for n in range(1, 2001)])
    stream = io.BytesIO(data + b"x")
    with pytest.raises(FormatError, match="behind the trailer"):
        Decoder(lambda _: stream.read(1)).finish()


@pytest.mark.parametrize("encoding", PageEncoding)
def test_every_bit_flip_is_noticed(encoding: PageEncoding) -> None:
    """No flipped bit goes unnoticed unless it leaves header and pages as they were."""
    data = small_file(encoding)
    original = decode(data)
    end_of_pages = parse_index(data).end_offset
    for position in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            # Only payload bytes are outside the checksum; they may say the same in other words.
            try:
                result = decode(damaged)
            except FormatError:
                continue
            assert result == original
            assert 100 <= position < end_of_pages


def test_damaged_page_fails_the_checksum() -> None:
    """A page that decompresses to something else is a checksum error."""
    data = encode(HEADER, [(1, os.urandom(512))])
    damaged = bytearray(data)
    damaged[400] ^= 1
    with pytest.raises(ChecksumError, match="file checksum"):
        decode(damaged)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(2, block_frame(2, page(2))), (1, block_frame(1, page(1)))], "1 comes after page 2"),
        ([(2, block_frame(2, page(2)))] * 2, "2 comes after page 2"),
        ([(301, block_frame(301, page(1)))], "above the commit"),
        ([(1, block_frame(1, page(1)[:511]))], "511 bytes"),
        ([(1, block_frame(1, page(1) + b"x"))], "cannot be decompressed"),
        ([(1, struct.pack(">IH", 1, 0) + lz4.frame.compress(page(1)[:9]))], "unsupported kind"),
        (
            [
                (
                    1,
                    struct.pack(">IH", 1, 0)
                    + lz4.frame.compress(page(1)[:9], content_checksum=True, store_size=False),
                )
            ],
            "9 bytes",
        ),
    ],
)
def test_wrong_pages_with_right_checksums(frames: list[tuple[int, bytes]], message: str) -> None:
    """Order, range and length of pages are checked even if all checksums fit."""
    with pytest.raises(FormatError, match=message):
        decode(assemble(HEADER.pack(), frames))


def test_unknown_page_flags_are_refused() -> None:
    """A page flag that is not defined, and page number 0 with a flag, are errors."""
    for flags in (2, 3, 0x8001):
        data = small_file()
        damaged = data[:104] + flags.to_bytes(2, "big") + data[106:]
        with pytest.raises(FormatError, match="unknown flags"):
            decode(damaged)
    with pytest.raises(FormatError, match="no page number 0"):
        decode(data[:100] + bytes(4) + data[104:])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "cannot be decompressed"),
        (1, "cannot be decompressed"),
        (512 + 2 + 16, "cut off in page 1"),
        (512 + 2 + 17, "impossible length"),
        (2**31, "impossible length"),
        (2**32 - 1, "impossible length"),
    ],
)
def test_payload_length_is_not_trusted(size: int, message: str) -> None:
    """An absurd payload length is an error at once, before it is read or allocated."""
    data = small_file()
    asked = []
    stream = io.BytesIO(data[:106] + size.to_bytes(4, "big") + data[110:])

    def read(n: int) -> bytes:
        asked.append(n)
        return stream.read(n)

    with pytest.raises(FormatError, match=message):
        Decoder(read, chunk_bytes=64).finish()
    assert max(asked) < 4096


def test_announced_content_size_is_not_trusted() -> None:
    """An LZ4 frame that announces a huge page is an error, not an allocation."""
    frame = bytearray(lz4.frame.compress(page(1), content_checksum=True, store_size=True))
    assert decode(assemble(HEADER.pack(), [(1, struct.pack(">IH", 1, 0) + bytes(frame))]))[1] == [
        (1, page(1))
    ]
    frame[6:14] = (2**60).to_bytes(8, "little")
    body = HEADER.pack() + struct.pack(">IH", 1, 0) + bytes(frame) + bytes(100)
    with pytest.raises(FormatError, match=f"{2**60} bytes"):
        decode(body)


def test_wrong_index_with_right_checksum() -> None:
    """The index must equal the frames although the file checksum covers it."""
    data = small_file()
    index_start = len(data) - index_size_from_tail(data)
    for position in range(index_start, len(data) - 16):
        damaged = bytearray(data)
        damaged[position] ^= 1
        if position < len(data) - 24:
            damaged = bytearray(
                damaged[:-8]
                + (
                    (
                        crc64(
                            damaged[index_start - 6 : -8],
                            decode_frames(data[100 : index_start - 6], 512, crc64(data[:100]))[1],
                        )
                        | CHECKSUM_FLAG
                    ).to_bytes(8, "big")
                )
            )
        with pytest.raises(FormatError, match="page index"):
            decode(damaged)


def test_post_apply_checksum_must_be_absent() -> None:
    """Without tracked checksums the post-apply field is 0."""
    with pytest.raises(FormatError, match="post-apply"):
        decode(assemble(HEADER.pack(), [], post_apply=CHECKSUM_FLAG | 1))


def test_tracked_snapshot_checksum_is_verified() -> None:
    """A snapshot that keeps database checksums must have the right one, and must have one."""
    header = dataclasses.replace(HEADER, flags=0, min_txid=1, commit=2)
    frames = [(n, block_frame(n, page(n))) for n in (1, 2)]
    rolling = RollingChecksum()
    for pgno in (1, 2):
        rolling.toggle(pgno, page(pgno))
    assert len(decode(assemble(header.pack(), frames, rolling.value))[1]) == 2
    with pytest.raises(ChecksumError, match="post-apply"):
        decode(assemble(header.pack(), frames, rolling.value ^ 1))
    with pytest.raises(FormatError, match="post-apply checksum is missing"):
        decode(assemble(header.pack(), frames, 0))


def test_errors_name_the_file() -> None:
    """Errors of a decoder begin with the name it was given, header errors too."""
    data = small_file()
    with pytest.raises(FormatError, match=r"^0/x\.ltx: file is cut off"):
        Decoder(data[:-1], name="0/x.ltx").finish()
    with pytest.raises(FormatError, match=r"^0/x\.ltx: not an LTX file"):
        Decoder(b"\x00" * 100, name="0/x.ltx")


def test_finish_is_repeatable_and_remembers_failure() -> None:
    """``finish`` gives the same answer twice, and never a good one after an error."""
    data = small_file()
    decoder = Decoder(data)
    next(iter(decoder))
    first = decoder.finish()
    assert isinstance(first, EncodedSegment)
    assert decoder.finish() == first
    bad = Decoder(data[:-1])
    for _ in range(2):
        with pytest.raises(FormatError):
            bad.finish()


def test_errors_of_the_source_pass_through() -> None:
    """What ``read`` raises is the caller's own business and arrives unchanged."""
    stream = io.BytesIO(small_file())

    def read(n: int) -> bytes:
        if stream.tell() > 100:
            raise ConnectionResetError("gone")
        return stream.read(min(n, 101))

    with pytest.raises(ConnectionResetError, match="gone"):
        Decoder(read).finish()


def test_blocks_come_out_as_they_are_stored() -> None:
    """``frames`` gives the stored block, which add_block takes without compressing again."""
    data = small_file()
    out: list[Any] = []
    encoder = Encoder(out.extend, HEADER)
    for pgno, block, content in iter_frames(data):
        assert block is not None
        encoder.add_block(pgno, block, content)
    encoder.finish()
    assert b"".join(out) == data
    assert all(block is None for _, block, _ in iter_frames(small_file(PageEncoding.FRAME)))


# --- Index and single frames ---


@pytest.mark.parametrize("encoding", PageEncoding)
def test_page_frame_checks_what_it_was_asked_for(encoding: PageEncoding) -> None:
    """A ranged read that hit the wrong place is noticed."""
    data = small_file(encoding)
    offset, length = parse_index(data).find(128) or (0, 0)
    frame = data[offset : offset + length]
    assert page_frame(frame, 512, 128) == page(128)
    for wrong, pgno in ((frame, 127), (frame + b"\x00", 128), (frame[:-1], 128), (b"", 128)):
        with pytest.raises(FormatError):
            page_frame(wrong, 512, pgno)
    with pytest.raises(FormatError):
        page_frame(frame, 1024, 128)
    with pytest.raises(FormatError, match="no page number 0"):
        page_frame(bytes(20), 512, 128)


@pytest.mark.parametrize("encoding", PageEncoding)
def test_ranges_combine_to_the_file_checksum(encoding: PageEncoding) -> None:
    """CRCs of ranges fetched out of order combine to the checksum in the trailer."""
    data = small_file(encoding)
    index = parse_index(data)
    head = 10 if encoding is PageEncoding.BLOCK else 6
    crc = crc64(data[:100])
    for at in range(0, 4, 2):
        end = index.offsets[at + 1] + index.lengths[at + 1]
        pages, part = decode_frames(data[index.offsets[at] : end], 512)
        assert len(pages) == 2
        crc = crc64_combine(crc, part, 2 * (head + 512))
    tail = data[index.end_offset : -8]
    crc = crc64_combine(crc, crc64(tail), len(tail))
    assert (crc | CHECKSUM_FLAG).to_bytes(8, "big") == data[-8:]


def test_index_needs_its_whole_tail() -> None:
    """Too short a tail is an error that says how much is needed."""
    data = small_file()
    size = index_size_from_tail(data[-24:])
    assert list(parse_index(data[-size:]).pgnos) == [1, 2, 128, 300]
    with pytest.raises(FormatError, match=f"needs {size} bytes, only {size - 1}"):
        parse_index(data[-size + 1 :])
    with pytest.raises(FormatError, match="24 are needed"):
        index_size_from_tail(data[-23:])
    with pytest.raises(FormatError, match="does not fit the size"):
        parse_index(data, file_size=len(data) + 1)


def indexed(entries: bytes) -> bytes:
    return entries + len(entries).to_bytes(8, "big") + bytes(16)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (indexed(b""), "impossible index size"),
        (bytes(8) + (2**64 - 1).to_bytes(8, "big") + bytes(16), "impossible index size"),
        (indexed(b"\x01"), "zero byte"),
        (indexed(b"\x00\x00"), "out of order"),
        (indexed(b"\x01\x64\x20\x00\x00"), "out of order"),
        (indexed(b"\x01\x64\x20\x01\x84\x01\x20\x00"), "out of order"),
        (indexed(b"\x02\x64\x20\x01\x84\x01\x20\x00"), "out of order"),
        (indexed(b"\x01\x65\x20\x00"), "offset 101"),
        (indexed(b"\x01\x64\x06\x00"), "6 bytes"),
        (indexed(b"\x01\x64\x00"), "damaged"),
        (indexed(b"\x01\x00"), "damaged"),
        (indexed(b"\xff" * 20 + b"\x00"), "damaged"),
        (indexed(b"\x01\x64" + b"\xff" * 20 + b"\x00"), "damaged"),
        (indexed(b"\x80\x00"), "damaged"),
        (indexed(b"\x81\x00\x64\x20\x00"), "damaged"),
        (indexed(b"\x01\xe4\x00\x20\x00"), "damaged"),
        (indexed(b"\x01\x64\xa0\x00\x00"), "damaged"),
    ],
)
def test_damaged_indexes_are_refused(tail: bytes, message: str) -> None:
    """Bytes that are no index give a FormatError, whatever they claim."""
    with pytest.raises(FormatError, match=message):
        parse_index(tail)


def test_endless_varint_is_refused() -> None:
    """Megabytes of continuation bytes are refused without building the number they spell."""
    with pytest.raises(FormatError, match="damaged"):
        parse_index(indexed(b"\xff" * 3_000_000 + b"\x00"))


def test_large_index_is_compact() -> None:
    """An index entry takes 16 bytes, so that 400,000 pages need 6.4 MB."""
    data = encode(HEADER, [(n, page(n)) for n in range(1, 301)])
    index = parse_index(data)
    assert [array.typecode for array in index] == ["I", "Q", "I"]
    assert sum(array.itemsize for array in index) == 16
