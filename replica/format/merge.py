"""Contiguous LTX files in, one LTX file out.

The newest version of each page wins, pages above the final commit size are dropped, and LZ4 blocks
are copied instead of compressed again.  One pass, bounded memory: a chunk per input and what
the encoder has not handed on yet.  Which files to merge is decided by the planners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Final

from walship.replica.errors import FormatError

from .checksum import BytesLike
from .ltx import NO_SALTS, Decoder, EncodedSegment, Encoder, Header, PageEncoding, Source
from .types import WalSalts, format_txid

__all__ = ["MergeInput", "merge", "merged_header"]

# Read ahead of all inputs together; with many inputs each gets a smaller share.
_READ_AHEAD_BYTES: Final = 8 * 1024 * 1024
_CHUNK_MAX_BYTES: Final = 256 * 1024
_CHUNK_MIN_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One file to merge.

    Attributes:
        source: the whole file, or ``read(n)`` which gives at most n bytes and none at the end.
        name: what error messages call it.
    """

    source: Source
    name: str = "LTX file"


def merged_header(
    headers: Sequence[Header],
    *,
    min_txid: int | None = None,
    max_txid: int | None = None,
    timestamp_ms: int | None = None,
    wal_offset: int = 0,
    wal_size: int = 0,
    salts: WalSalts = NO_SALTS,
) -> Header:
    """The header of the merge of files with these headers, oldest first.

    TXIDs span the inputs, commit size and timestamp are the last input's, and there are no WAL
    coordinates, unless something else is asked for.
    """
    first, last = headers[0], headers[-1]
    return Header(
        page_size=first.page_size,
        commit=last.commit,
        min_txid=first.min_txid if min_txid is None else min_txid,
        max_txid=last.max_txid if max_txid is None else max_txid,
        timestamp_ms=last.timestamp_ms if timestamp_ms is None else timestamp_ms,
        wal_offset=wal_offset,
        wal_size=wal_size,
        salts=salts,
    )


def merge(
    inputs: Sequence[MergeInput],
    write: Callable[[Sequence[BytesLike]], object],
    *,
    header: Header | None = None,
    min_txid: int | None = None,
    max_txid: int | None = None,
    timestamp_ms: int | None = None,
    wal_offset: int = 0,
    wal_size: int = 0,
    salts: WalSalts = NO_SALTS,
    encoding: PageEncoding = PageEncoding.BLOCK,
    check_txids: bool = True,
) -> EncodedSegment:
    """Merge ``inputs``, oldest first, into one file.

    Every input is verified to its trailer before this returns; if it raises, what was written so
    far is worthless.

    Args:
        inputs: at least one.  Ranges may overlap but not leave a gap, and each must end later
            than the one before.
        write: as for ``Encoder``.
        header: header of the result; its page size and commit must be those of the last input.
            The other header arguments are then ignored.
        min_txid: TXID range of the result, if not that of the inputs.
        max_txid: see ``min_txid``.
        timestamp_ms: timestamp of the result, if not the last input's.
        wal_offset: WAL coordinates of the result.
        wal_size: see ``wal_offset``.
        salts: see ``wal_offset``.
        encoding: BLOCK copies blocks; FRAME compresses all pages again, for older readers.
        check_txids: False for inputs whose order is known and whose TXIDs mean nothing yet.

    Raises:
        FormatError: if an input is invalid or damaged, if the inputs do not continue each other,
            or if the result would not be complete although its header says snapshot.
    """
    if not inputs:
        raise FormatError("there is nothing to merge")
    share = _READ_AHEAD_BYTES // len(inputs)
    chunk_bytes = max(_CHUNK_MIN_BYTES, min(_CHUNK_MAX_BYTES, share))
    decoders = [Decoder(item.source, name=item.name, chunk_bytes=chunk_bytes) for item in inputs]
    _check_inputs(decoders, check_txids)
    if header is None:
        header = merged_header(
            [decoder.header for decoder in decoders],
            min_txid=min_txid,
            max_txid=max_txid,
            timestamp_ms=timestamp_ms,
            wal_offset=wal_offset,
            wal_size=wal_size,
            salts=salts,
        )
    last = decoders[-1].header
    if header.page_size != last.page_size or header.commit != last.commit:
        raise FormatError("the merged file must have the page size and commit of its last input")
    encoder = Encoder(write, header, encoding)
    _merge_pages(decoders, encoder)
    return encoder.finish()


def _check_inputs(decoders: Sequence[Decoder], check_txids: bool) -> None:
    previous = decoders[0]
    for decoder in decoders[1:]:
        before, after = previous.header, decoder.header
        if after.page_size != before.page_size:
            raise FormatError(
                f"{decoder.name}: page size {after.page_size} does not match the page size "
                f"{before.page_size} of {previous.name}"
            )
        if check_txids and not (
            after.min_txid <= before.max_txid + 1 and after.max_txid > before.max_txid
        ):
            raise FormatError(
                f"{decoder.name}: TXIDs {format_txid(after.min_txid)} to "
                f"{format_txid(after.max_txid)} do not continue those of {previous.name}, which "
                f"end with {format_txid(before.max_txid)}"
            )
        previous = decoder


def _merge_pages(decoders: Sequence[Decoder], encoder: Encoder) -> None:
    commit = encoder.header.commit
    reuse_blocks = encoder.encoding is PageEncoding.BLOCK
    streams = [decoder.frames() for decoder in decoders]
    # One head per stream: (page number, age, block, page).  Age 0 is the newest input, so of
    # equal page numbers the newest comes first; the pair is unique, the rest is never compared.
    heads = []
    for age, stream in enumerate(reversed(streams)):
        frame = next(stream, None)
        if frame is not None:
            heads.append((frame[0], age, frame[1], frame[2]))
    heapify(heads)
    n_streams = len(streams)
    last_pgno = 0
    while heads:
        pgno, age, block, page = heads[0]
        if pgno != last_pgno and pgno <= commit:
            last_pgno = pgno
            try:
                if block is not None and reuse_blocks:
                    encoder.add_block(pgno, block, page)
                else:
                    encoder.add_page(pgno, page)
            except FormatError as exc:
                raise FormatError(f"the inputs do not make a whole: {exc}") from exc
        frame = next(streams[n_streams - 1 - age], None)
        if frame is None:
            heappop(heads)
        else:
            heapreplace(heads, (frame[0], age, frame[1], frame[2]))
