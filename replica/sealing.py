"""Sealing: WAL frames become LTX bytes in the spool, with a TXID or as pieces without."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from .format.ltx import NO_SALTS, Encoder, Header, PageEncoding
from .format.merge import MergeInput, merge
from .format.types import WalSalts
from .format.wal import FRAME_HEADER_SIZE, WAL_HEADER_SIZE, frame_offset, wal_size
from .frames import Batch, pages
from .record import Record
from .spool import INLINE_BYTES, Sealed, SegmentSink, State

__all__ = ["Sealer", "describe", "frozen"]

#: Pieces of at least this size are sent alone: merging them would cost more than a request.
_SOLO_BYTES: Final = 1024 * 1024


class Sealer:
    """Writes what a database commits into its spool.  One per database.

    `freeze_pieces` and `merge_pieces` are the uploader's; the rest wants the mutex held.

    Args:
        encoding: how pages are stored in new segments.

    Attributes:
        wal_bytes: bytes of WAL frames that this process has sealed; guarded by the mutex.
    """

    def __init__(self, record: Record, encoding: PageEncoding) -> None:
        self._record = record
        self._mutex = record.mutex
        self._spool = record.spool
        self._port = record.port
        self._files = record.files
        self._wal = record.wal
        self._clock = record.clock
        self._encoding = encoding
        self.wal_bytes = 0

    def seal_piece(
        self,
        batch: Batch,
        after: State,
        page_size: int,
        read_main: Callable[[int, int], bytes],
    ) -> None:
        """Seal a batch without a TXID.  Its header carries the one it gets if it is sent alone."""
        txid = max(2, after.txid + 1 + len(self._record.state.pieces))
        header = self._header_after(batch, after, txid, page_size)
        sink = SegmentSink(self._spool, hashed=True)
        try:
            self.encode(batch, header, sink, read_main)
            body = sink.finish()
            sealed = replace(describe(header, sink), txid=0, header_txid=txid)
            after = replace(after, timestamp_ms=header.timestamp_ms)
            self._spool.add_piece(after, sealed, body)
            self.wal_bytes += header.wal_size
        except BaseException:
            sink.abandon()
            raise

    def freeze(self, batch: Batch, after: State, page_size: int) -> Sealed:
        """Seal a batch under the next TXID; ``after`` is the state behind it."""
        header = self._header_after(batch, after, after.txid + 1, page_size)
        sink = SegmentSink(self._spool, hashed=True)
        try:
            self.encode(batch, header, sink, self._port.read_main)
            body = sink.finish()
            after = frozen(after, header, sink)
            segment = self._spool.add_segment(after, describe(header, sink), body)
            self.wal_bytes += header.wal_size
            return segment
        except BaseException:
            sink.abandon()
            raise

    def freeze_pieces(self) -> Sealed | None:
        """Freeze the oldest pieces: a large one as it is, small ones merged.

        The mutex is free during the merge.
        """
        with self._mutex:
            state = self._record.state
            chosen = state.pieces[:1]
            if chosen[0].size_bytes >= _SOLO_BYTES:
                if chosen[0].header_txid == state.txid + 1 and chosen[0].file is not None:
                    return self._promote(chosen[0])
            else:
                small = itertools.takewhile(lambda p: p.size_bytes < _SOLO_BYTES, state.pieces)
                chosen = tuple(small)
            rest = len(state.pieces) - len(chosen)
            # Coordinates that another reader may trust exist for the newest piece only.
            position = None if rest else state.position
            header = self.header(state.txid + 1, state.page_size, state.commit, NO_SALTS)
            if position is not None:
                end = wal_size(position.frame, state.page_size) if position.frame else 0
                header = replace(
                    header, salts=position.salts, wal_size=max(0, end - WAL_HEADER_SIZE)
                )
            sink = SegmentSink(self._spool, hashed=True)
        try:
            with self._inputs(chosen) as inputs:
                merge(
                    inputs,
                    sink.write,
                    min_txid=header.min_txid,
                    max_txid=header.max_txid,
                    timestamp_ms=header.timestamp_ms,
                    wal_offset=header.wal_offset,
                    wal_size=header.wal_size,
                    salts=header.salts,
                    encoding=self._encoding,
                    check_txids=False,
                )
            body = sink.finish()
            with self._mutex:
                now = self._record.state
                if now.pieces[: len(chosen)] != chosen:
                    sink.abandon()  # continuity was lost meanwhile
                    return None
                after = frozen(now, header, sink)
                keep = len(now.pieces) - len(chosen)
                return self._spool.add_segment(after, describe(header, sink), body, keep=keep)
        except BaseException:
            sink.abandon()
            raise

    def _promote(self, piece: Sealed) -> Sealed:
        """Freeze a piece as it is: its header already carries the TXID."""
        assert piece.file is not None
        now = self._record.state
        after = replace(now, txid=piece.header_txid, sha256=piece.sha256)
        sealed = replace(piece, txid=piece.header_txid)
        return self._spool.add_segment(after, sealed, piece.file, keep=len(now.pieces) - 1)

    def merge_pieces(self, *, everything: bool = False) -> None:
        """Merge the newest pieces while they may not be sent: the last version of a page counts.

        Pieces are merged with those before them once they are at least half as large together, so
        that every byte is merged a logarithmic number of times.  The mutex is free meanwhile.

        Args:
            everything: merge all of them, however large.
        """
        with self._mutex:
            state = self._record.state
            start, newer = 0 if everything else len(state.pieces), 0
            while start and state.pieces[start - 1].size_bytes <= 2 * newer + INLINE_BYTES:
                start -= 1
                newer += state.pieces[start].size_bytes
            chosen = state.pieces[start:]
            if len(chosen) < 2 or state.copying:
                return
            sink = SegmentSink(self._spool, hashed=False)
        try:
            with self._inputs(chosen) as inputs:
                merge(inputs, sink.write, check_txids=False)
            body = sink.finish()
            with self._mutex:
                now = self._record.state
                if now.pieces[start : start + len(chosen)] == chosen:
                    self._spool.replace_pieces(start, len(chosen), body, sink.size_bytes)
                else:
                    sink.abandon()
        except BaseException:
            sink.abandon()
            raise

    @contextlib.contextmanager
    def _inputs(self, pieces: Sequence[Sealed]) -> Iterator[list[MergeInput]]:
        """Pieces as inputs of a merge, oldest first."""
        with contextlib.ExitStack() as files:
            inputs: list[MergeInput] = []
            with self._mutex:
                for piece in pieces:
                    body = self._spool.read(piece)
                    if isinstance(body, bytes):
                        inputs.append(MergeInput(body, "a piece in the spool"))
                    else:
                        file = files.enter_context(self._files.reader(body))
                        inputs.append(MergeInput(file.read, str(body)))
            yield inputs

    def _header_after(self, batch: Batch, after: State, txid: int, page_size: int) -> Header:
        """The header of one batch, with WAL coordinates that say where to go on reading."""
        position = after.position
        salts = position.salts if position else NO_SALTS
        header = self.header(txid, page_size, batch.commit, salts)
        if position is None or not position.frame:
            return header  # nothing of the generation that comes next has been read
        return replace(
            header,
            wal_offset=frame_offset(batch.first, page_size),
            wal_size=(batch.last - batch.first + 1) * (FRAME_HEADER_SIZE + page_size),
        )

    def header(self, txid: int, page_size: int, commit: int, salts: WalSalts) -> Header:
        """A header at WAL offset 32: a reader that takes over may trust it, and no more than it."""
        # Times must not run backwards along the TXIDs, whatever the wall clock does.
        timestamp_ms = max(self._clock.now_ms(), self._record.state.timestamp_ms)
        return Header(
            page_size=page_size,
            commit=commit,
            min_txid=txid,
            max_txid=txid,
            timestamp_ms=timestamp_ms,
            wal_offset=WAL_HEADER_SIZE,
            wal_size=0,
            salts=salts,
        )

    def encode(
        self,
        batch: Batch,
        header: Header,
        sink: SegmentSink,
        read_main: Callable[[int, int], bytes],
        observe: Callable[[int, memoryview], None] | None = None,
    ) -> None:
        encoder = Encoder(sink.write, header, self._encoding)
        add_page = encoder.add_page
        for pgno, page in pages(self._wal, batch, header.page_size, read_main):
            add_page(pgno, page)
            if observe is not None:
                observe(pgno, page)
        encoder.finish()


def frozen(state: State, header: Header, sink: SegmentSink) -> State:
    """The state after a segment with this header."""
    return replace(
        state,
        txid=header.max_txid,
        sha256=sink.sha256,
        timestamp_ms=max(header.timestamp_ms, state.timestamp_ms),
    )


def describe(header: Header, sink: SegmentSink) -> Sealed:
    return Sealed(
        txid=header.max_txid,
        size_bytes=sink.size_bytes,
        sha256=sink.sha256,
        timestamp_ms=header.timestamp_ms,
    )
