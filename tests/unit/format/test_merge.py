"""Merging contiguous LTX files."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import pytest

from walship.replica.errors import ChecksumError, FormatError
from walship.replica.format.ltx import Decoder, Encoder, Header, PageEncoding, decode, iter_frames
from walship.replica.format.merge import MergeInput, merge, merged_header
from walship.replica.format.types import WalSalts

PAGE_SIZE = 512


def page(text: str) -> bytes:
    return (f"{text} ".encode() * PAGE_SIZE)[:PAGE_SIZE]


def header(min_txid: int, max_txid: int, commit: int, **fields: Any) -> Header:
    return Header(
        page_size=PAGE_SIZE,
        commit=commit,
        min_txid=min_txid,
        max_txid=max_txid,
        timestamp_ms=1000 + max_txid,
        wal_offset=32,
        wal_size=max_txid * 536,
        salts=WalSalts(1, 2),
        **fields,
    )


def segment(
    head: Header, pages: Mapping[int, str], encoding: PageEncoding = PageEncoding.BLOCK
) -> bytes:
    out: list[Any] = []
    encoder = Encoder(out.extend, head, encoding)
    for pgno, text in sorted(pages.items()):
        encoder.add_page(pgno, page(text))
    encoder.finish()
    return b"".join(out)


def merged(*inputs: bytes, **options: Any) -> bytes:
    out: list[Any] = []
    sources = [MergeInput(data, f"input {n}") for n, data in enumerate(inputs)]
    result = merge(sources, out.extend, **options)
    data = b"".join(out)
    assert Decoder(data).finish() == result
    return data


SNAPSHOT = segment(header(1, 1, 3), {1: "a1", 2: "a2", 3: "a3"})
GROWN = segment(header(2, 2, 5), {2: "b2", 4: "b4", 5: "b5"})
SHRUNK = segment(header(3, 3, 4), {1: "c1", 4: "c4"})


def test_newest_page_wins_and_shrinking_drops() -> None:
    """Each page comes from its newest input, and pages above the final commit are gone."""
    head, pages = decode(merged(SNAPSHOT, GROWN, SHRUNK))
    assert pages == [(n + 1, page(text)) for n, text in enumerate(("c1", "b2", "a3", "c4"))]
    assert head == Header(page_size=PAGE_SIZE, commit=4, min_txid=1, max_txid=3, timestamp_ms=1003)


def test_header_can_be_given_in_parts_or_whole() -> None:
    """TXIDs, timestamp and WAL coordinates of the result may be set; commit stays the last's."""
    options: dict[str, Any] = {
        "min_txid": 9,
        "max_txid": 9,
        "timestamp_ms": 77,
        "wal_offset": 568,
        "wal_size": 1072,
        "salts": WalSalts(5, 6),
    }
    expected = Header(page_size=PAGE_SIZE, commit=4, **options)
    assert decode(merged(GROWN, SHRUNK, **options))[0] == expected
    assert decode(merged(GROWN, SHRUNK, header=expected))[0] == expected
    heads = [decode(data)[0] for data in (GROWN, SHRUNK)]
    assert merged_header(heads, **options) == expected
    for wrong in (
        dataclasses.replace(expected, commit=5),
        dataclasses.replace(expected, page_size=1024),
    ):
        with pytest.raises(FormatError, match="page size and commit of its last input"):
            merged(GROWN, SHRUNK, header=wrong)


def test_blocks_are_copied() -> None:
    """Stored blocks reach the output byte for byte; frames are compressed to blocks."""
    literal = page("b2")
    # A block of literals alone, which no compressor would make of this page.
    block = (
        b"\xf0" + b"\xff" * ((PAGE_SIZE - 15) // 255) + bytes([(PAGE_SIZE - 15) % 255]) + literal
    )
    out: list[Any] = []
    encoder = Encoder(out.extend, header(2, 2, 3))
    encoder.add_block(2, block, literal)
    encoder.finish()
    newest = segment(header(3, 3, 3), {3: "c3"}, PageEncoding.FRAME)
    frames = {
        n: (kept, full) for n, kept, full in iter_frames(merged(SNAPSHOT, b"".join(out), newest))
    }
    assert frames[2] == (block, literal)
    assert frames[1][0] == next(iter_frames(SNAPSHOT))[1]
    assert frames[3][0] is not None
    assert frames[3][1] == page("c3")


def test_frames_for_older_readers() -> None:
    """With the frame encoding no block remains."""
    data = merged(SNAPSHOT, GROWN, encoding=PageEncoding.FRAME)
    assert [block for _, block, _ in iter_frames(data)] == [None] * 5


def test_overlap_is_allowed_gaps_are_not() -> None:
    """Ranges must continue each other: overlap yes, gap no, and each must end later."""
    both = merged(SNAPSHOT, GROWN)
    assert decode(merged(both, segment(header(2, 3, 5), {1: "x"})))[0].max_txid == 3
    with pytest.raises(FormatError, match=r"input 1: .*do not continue those of input 0"):
        merged(SNAPSHOT, SHRUNK)
    with pytest.raises(FormatError, match="do not continue"):
        merged(both, GROWN)
    with pytest.raises(FormatError, match="do not continue"):
        merged(GROWN, SNAPSHOT)


def test_txids_can_be_ignored() -> None:
    """Pieces that were not given their TXID yet merge in the order they come in."""
    first = segment(header(2, 2, 2), {1: "old", 2: "old"})
    second = segment(header(2, 2, 2), {2: "new"})
    data = merged(first, second, min_txid=8, max_txid=8, check_txids=False)
    assert decode(data)[1] == [(1, page("old")), (2, page("new"))]


def test_page_sizes_must_agree() -> None:
    """Files of databases with different page sizes are refused."""
    out: list[Any] = []
    Encoder(out.extend, dataclasses.replace(header(2, 2, 3), page_size=1024)).finish()
    with pytest.raises(FormatError, match="input 1: page size 1024 does not match"):
        merged(SNAPSHOT, b"".join(out))


def test_nothing_to_merge() -> None:
    """An empty list of inputs is an error, not an empty file."""
    with pytest.raises(FormatError, match="nothing to merge"):
        merged()


def test_single_input_is_normalised() -> None:
    """One input alone comes out with the same pages and without WAL coordinates."""
    head, pages = decode(merged(SNAPSHOT))
    assert pages == decode(SNAPSHOT)[1]
    assert (head.wal_offset, head.wal_size, head.salts) == (0, 0, (0, 0))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_input_is_verified_to_its_end(which: int) -> None:
    """A damaged trailer is noticed even in an input whose pages all lose."""
    inputs = [SNAPSHOT, GROWN, SHRUNK]
    inputs[which] = inputs[which][:-1] + bytes([inputs[which][-1] ^ 1])
    with pytest.raises(ChecksumError, match=f"input {which}: file checksum"):
        merged(*inputs)
    with pytest.raises(FormatError, match=f"input {which}: file is cut off"):
        merged(*[data[:-1] if n == which else data for n, data in enumerate(inputs)])


def test_incomplete_result_is_refused() -> None:
    """A result that calls itself a snapshot must have every page."""
    with pytest.raises(FormatError, match="lacks page 1"):
        merged(GROWN, min_txid=1)
    grown_with_hole = segment(header(2, 2, 5), {5: "b5"})
    with pytest.raises(FormatError, match="lacks page 4"):
        merged(SNAPSHOT, grown_with_hole)


def test_streams_are_read_in_small_pieces() -> None:
    """Inputs may be streams; many of them are each read in small pieces."""
    asked: list[int] = []

    def stream(data: bytes) -> Any:
        file = io.BytesIO(data)

        def read(n: int) -> bytes:
            asked.append(n)
            return file.read(min(n, 50))

        return read

    parts = [SNAPSHOT, *[segment(header(n, n, 3), {1: f"v{n}"}) for n in range(2, 600)]]
    out: list[Any] = []
    merge([MergeInput(stream(data)) for data in parts], out.extend)
    assert decode(b"".join(out))[1][0] == (1, page("v599"))
    assert max(asked) <= 16 * 1024
