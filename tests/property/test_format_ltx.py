"""Properties of the LTX codec and of merging, over generated databases and damaged files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from walship.replica.errors import FormatError
from walship.replica.format.ltx import (
    Decoder,
    Encoder,
    Header,
    PageEncoding,
    PageIndex,
    decode,
    decode_frames,
    index_size_from_tail,
    page_frame,
    parse_index,
)
from walship.replica.format.merge import MergeInput, merge
from walship.replica.format.types import WalSalts

Pages = dict[int, bytes]

page_sizes = st.sampled_from([512 << n for n in range(8)])


def encode(header: Header, pages: Pages, encoding: PageEncoding = PageEncoding.BLOCK) -> bytes:
    out: list[Any] = []
    encoder = Encoder(out.extend, header, encoding)
    for pgno in sorted(pages):
        encoder.add_page(pgno, pages[pgno])
    encoder.finish()
    return b"".join(out)


@st.composite
def page_contents(draw: st.DrawFn, page_size: int) -> bytes:
    """A page: random where it matters to LZ4, else a repeated pattern."""
    pattern = draw(st.binary(min_size=1, max_size=64))
    noise = draw(st.binary(max_size=min(page_size, 600)))
    return (noise + pattern * page_size)[:page_size]


@st.composite
def headers(draw: st.DrawFn) -> Header:
    offset = draw(st.integers(32, 2**63 - 1) | st.just(0))
    min_txid = draw(st.integers(2, 2**64 - 1))
    u32 = st.integers(0, 2**32 - 1)
    return Header(
        page_size=draw(page_sizes),
        commit=draw(st.integers(1, 2**32 - 1)),
        min_txid=min_txid,
        max_txid=draw(st.integers(min_txid, 2**64 - 1)),
        timestamp_ms=draw(st.integers(-(2**63), 2**63 - 1)),
        wal_offset=offset,
        wal_size=draw(st.integers(0, 2**63 - 1)) if offset else 0,
        salts=WalSalts(draw(u32), draw(u32)) if offset else WalSalts(0, 0),
        node_id=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def files(draw: st.DrawFn) -> tuple[Header, Pages, PageEncoding]:
    header = draw(headers())
    lock = 0x40000000 // header.page_size + 1
    pgnos = draw(st.sets(st.integers(1, header.commit).filter(lambda n: n != lock), max_size=6))
    pages = {pgno: draw(page_contents(header.page_size)) for pgno in pgnos}
    return header, pages, draw(st.sampled_from(PageEncoding))


def in_pieces(data: bytes, step: int) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)
    return lambda n: stream.read(min(n, step))


def outcome(source: Any) -> tuple[Header, list[tuple[int, bytes]]] | str:
    """What a decoder makes of ``source``: its content, or the text of its FormatError."""
    try:
        decoder = Decoder(source)
        return decoder.header, list(decoder)
    except FormatError as exc:
        return str(exc)


@given(files(), st.sampled_from([1, 7, 1000, 1 << 20]))
def test_round_trip(file: tuple[Header, Pages, PageEncoding], step: int) -> None:
    """What is encoded decodes to the same, whole or in pieces, and the index finds each page."""
    header, pages, encoding = file
    data = encode(header, pages, encoding)
    expected = (header, sorted(pages.items()))
    assert outcome(data) == expected
    assert outcome(in_pieces(data, step)) == expected
    index = parse_index(data[-index_size_from_tail(data) :], file_size=len(data))
    for pgno, content in pages.items():
        offset, length = index.find(pgno) or (0, 0)
        assert page_frame(data[offset : offset + length], header.page_size, pgno) == content


@given(st.binary(max_size=400))
@example(b"")
@example(b"LTX1" + bytes(96))
def test_arbitrary_bytes(data: bytes) -> None:
    """Arbitrary bytes are refused with a FormatError by every reader."""
    assert isinstance(outcome(data), str)
    assert isinstance(outcome(in_pieces(data, 1)), str)
    for read in (
        lambda: parse_index(data),
        lambda: parse_index(data, file_size=len(data)),
        lambda: page_frame(data, 512, 1),
        lambda: decode_frames(data, 512),
    ):
        try:
            result = read()
        except FormatError:
            continue
        # Only nothing at all, or an index without entries, can be right by chance.
        assert result == ([], 0) or (isinstance(result, PageIndex) and not result.pgnos)


@given(
    headers(),
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    bytes(6),
                    b"\x00\x00\x00\x01\x00\x01",
                    b"\x00\x00\x00\x02\x00\x00\x04\x22\x4d\x18\x64\x40\xa7",
                    b"\x00\x00\x00\x0c\x1f\x00\x01\x00\xff\xe8\x50\x00\x00\x00\x00\x00",
                    b"\xff\xff\xff\xff",
                ]
            ),
        ),
        max_size=6,
    ),
)
def test_arbitrary_bytes_behind_a_header(header: Header, parts: list[bytes]) -> None:
    """Behind a valid header nonsense is refused too, in the same words however it arrives."""
    data = header.pack() + b"".join(parts)
    result = outcome(data)
    assert isinstance(result, str)
    assert outcome(in_pieces(data, 1)) == result


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with one to three edits."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "delete", "swap"]))
        n = draw(st.integers(1, 30))
        if kind == "set":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=30)) + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + n :]
        else:
            data = data[:at] + data[at + n : at + 2 * n] + data[at : at + n] + data[at + 2 * n :]
    return data


@settings(max_examples=300)
@given(files(), st.data())
def test_damaged_files(file: tuple[Header, Pages, PageEncoding], data: st.DataObject) -> None:
    """A damaged file is refused, or was damaged only where that changes nothing; in any pieces."""
    header, pages, encoding = file
    damaged = data.draw(damage(encode(header, pages, encoding)))
    result = outcome(damaged)
    if not isinstance(result, str):
        assert result == (header, sorted(pages.items()))
    assert outcome(in_pieces(damaged, 1)) == result
    assert outcome(in_pieces(damaged, 333)) == result


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[bytes], bytes, int]:
    """Segments 1..n of a database, its image after the last one, and its page size."""
    page_size = draw(st.sampled_from([512, 1024, 65536]))
    image: Pages = {}
    segments = []
    for txid in range(1, draw(st.integers(2, 6)) + 1):
        commit = draw(st.integers(1, 12))
        size_before = max(image, default=0)
        # Pages that are new to the database are always part of the transaction.
        changed = set(range(size_before + 1, commit + 1))
        changed |= draw(st.sets(st.integers(1, commit), max_size=4))
        update = {pgno: draw(page_contents(page_size)) for pgno in changed}
        image = {pgno: page for pgno, page in (image | update).items() if pgno <= commit}
        header = Header(
            page_size=page_size,
            commit=commit,
            min_txid=txid,
            max_txid=txid,
            timestamp_ms=txid,
            wal_offset=32,
        )
        segments.append(encode(header, update, draw(st.sampled_from(PageEncoding))))
    return segments, b"".join(image[pgno] for pgno in sorted(image)), page_size


@given(histories(), st.data())
def test_merge_equals_applying_in_turn(
    history: tuple[list[bytes], bytes, int], data: st.DataObject
) -> None:
    """However a history is cut into merges, the merge of those merges is the final database."""
    segments, image, page_size = history
    while len(segments) > 1:
        first = data.draw(st.integers(0, len(segments) - 2))
        last = data.draw(st.integers(first + 1, len(segments) - 1))
        out: list[Any] = []
        inputs = [MergeInput(in_pieces(item, 100)) for item in segments[first : last + 1]]
        merge(inputs, out.extend)
        segments[first : last + 1] = [b"".join(out)]
    header, pages = decode(segments[0])
    assert b"".join(page for _, page in pages) == image
    assert header.commit * page_size == len(image)
