"""Looking at all pages: the full copy, the difference, and the page map that finds it.

When frames may have been missed, `Resync.take` compares every page with the page map of the
replica's newest state and freezes those that differ; without a map, all of them (`Resync.copy`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from .errors import FormatError, ObjectNotFound, StoreError
from .format.ltx import HEADER_SIZE, Encoder, Header, PageEncoding
from .format.types import WalSalts, format_txid, lock_pgno
from .frames import Batch, collect, page_runs, pages
from .pagemap import History, MapDamaged, MapEnd, PageMap, SegmentHashes, hash_segment, page_hash
from .record import Record, page_size_changed, size_of_main
from .sealing import Sealer, describe, frozen
from .spool import Sealed, SegmentSink, State, WalPosition
from .sqlite import ReadView

__all__ = ["FETCH_IN_PASSING", "Fetch", "Resync"]

log = logging.getLogger("walship.capture")

#: Segments that are fetched from the replica for the page map in passing; a resync fetches all.
FETCH_IN_PASSING: Final = 4
#: From so many missing segments on a full copy costs less than fetching them.
_FETCH_MAX: Final = 1000
#: A segment is fetched in pieces of this many bytes.
_FETCH_BYTES: Final = 4 * 1024 * 1024

#: ``fetch(txid, offset, length)``: bytes of a level-0 segment in the replica, fewer at its end.
Fetch = Callable[[int, int, int], bytes]


class Resync:
    """Brings a replica up to date by looking at every page.  For the uploader's thread only.

    Args:
        fetch: reads segments of the replica; one attempt a call.
        encoding: how pages are stored in new segments.
    """

    def __init__(
        self, record: Record, sealer: Sealer, *, fetch: Fetch, encoding: PageEncoding
    ) -> None:
        self._record = record
        self._sealer = sealer
        self._mutex = record.mutex
        self._spool = record.spool
        self._port = record.port
        self._files = record.files
        self._wal = record.wal
        self._name = record.name
        self._fetch = fetch
        self._encoding = encoding
        self._page_map = PageMap(record.spool.directory, record.files)

    def copy(self) -> Sealed | None:
        """Freeze the whole database under the next TXID, and make its page map.

        The mark is held for the local copy only, and the mutex is free while pages are copied:
        gates go on sealing pieces, which follow.

        Returns:
            The segment, or None if writers were in the way or the database is still empty.

        Raises:
            ContinuityError: the database has another page size than the replica.
        """
        reason = self._record.full_copy_reason

        def fill(batch: Batch, header: Header, sink: SegmentSink, view: ReadView) -> bool:
            with self._page_map.begin(
                self._history,
                txid=header.max_txid,
                page_size=header.page_size,
                commit=header.commit,
            ) as page_map:
                self._sealer.encode(batch, header, sink, view.read_main, page_map.add)
                # Ahead of the record for a moment: found like that, it is thrown away.
                page_map.finish(sink.sha256)
            return True

        sealed = self._freeze_view(fill, self._replica_page_size(), is_full=True)
        if sealed is not None:
            log.info(
                "%s: full copy as txid %s, %d bytes (%s)",
                self._name,
                format_txid(sealed.txid),
                sealed.size_bytes,
                reason,
            )
        return sealed

    def take(self) -> Sealed | None:
        """Freeze, under the next TXID, the pages that differ from the replica's newest state.

        They are found by the page map.  Without one of that state this is `copy`.  If nothing
        differs, history simply continues.

        Returns:
            The segment, or None if none is needed or writers were in the way.

        Raises:
            ContinuityError: as `copy`.
            StoreError: segments that the page map lacks could not be fetched; try again.
        """
        end = self._map_of_newest()
        if end is not None:
            try:
                return self._freeze_difference(end)
            except MapDamaged as error:
                self._page_map.discard(str(error))
        return self.copy()

    def _freeze_difference(self, end: MapEnd) -> Sealed | None:
        reason = self._record.full_copy_reason
        n_pages = n_shipped = 0

        def fill(batch: Batch, header: Header, sink: SegmentSink, view: ReadView) -> bool:
            nonlocal n_pages, n_shipped
            n_pages, n_shipped = header.commit, 0
            known = self._page_map.hashes(self._history)
            encoder = Encoder(sink.write, header, self._encoding)
            next_pgno = 1
            for pgno, run in page_runs(self._wal, batch, header.page_size, view.read_main):
                # The lock page is in no run.
                expected = list(
                    itertools.islice(known, pgno - next_pgno, pgno - next_pgno + len(run))
                )
                next_pgno = pgno + len(run)
                found = [page_hash(page) for page in run]
                if found == expected:
                    continue
                expected += [0] * (len(run) - len(expected))
                for at, page in enumerate(run):
                    if found[at] != expected[at]:
                        encoder.add_page(pgno + at, page)
                        n_shipped += 1
            encoder.finish()
            return n_shipped > 0 or header.commit != end.commit

        sealed = self._freeze_view(fill, end.page_size)
        if sealed is not None:
            log.warning(
                "%s: %s; %d of %d pages differ from the replica and follow as txid %s, %d bytes",
                self._name,
                reason,
                n_shipped,
                n_pages,
                format_txid(sealed.txid),
                sealed.size_bytes,
            )
        elif self._record.full_copy_reason is None:
            log.warning("%s: %s; all %d pages are as in the replica", self._name, reason, n_pages)
        return sealed

    def _freeze_view(
        self,
        fill: Callable[[Batch, Header, SegmentSink, ReadView], bool],
        replica_page_size: int | None,
        *,
        is_full: bool = False,
    ) -> Sealed | None:
        """Freeze what ``fill`` encodes of a view of the whole database.

        Args:
            fill: returns whether it is needed; if not, history goes on from the view.
            replica_page_size: what the page size has to be, if that is known.
            is_full: whether it encodes all pages.
        """
        with self._whole_database() as found:
            if found is None:
                return None
            batch, page_size, salts, view = found
            if replica_page_size not in (None, page_size):
                raise page_size_changed(self._record.path, page_size, replica_page_size)
            with self._mutex:
                txid = self._record.state.txid + 1
                header = self._sealer.header(txid, page_size, batch.commit, salts)
                sink = SegmentSink(self._spool, hashed=True)
            try:
                is_needed = fill(batch, header, sink, view)
                view.verify()
                body = sink.finish()
            except BaseException:
                sink.abandon()
                raise
        with self._mutex:
            after = self._settled_after_copy(page_size, batch.commit)
            if after is None or not is_needed:
                sink.abandon()
                if after is not None:
                    self._spool.record(after)
                return None
            after = frozen(after, header, sink)
            if is_full:
                after = replace(after, full_txid=after.txid)
            return self._spool.add_segment(
                after, describe(header, sink), body, keep=len(self._record.state.pieces)
            )

    @property
    def _history(self) -> History:
        state = self._record.state
        return History(state.lineage, state.replica)

    def describe(self, path: Path, history: History, txid: int, page_size: int) -> None:
        """Make the page map of a history that is about to begin, from a file that is its state."""
        self._page_map.describe(path, history, txid=txid, page_size=page_size)

    def _map_of_newest(self) -> MapEnd | None:
        """Where the page map ends once it describes the newest frozen segment; None without.

        Raises:
            StoreError: the replica could not be asked for what is missing.
        """
        state = self._record.state
        if not state.txid:
            return None
        try:
            end = self.bring_map_forward(state.txid, _FETCH_MAX)
        except (ObjectNotFound, FormatError) as error:
            self._page_map.discard(f"it cannot be brought forward: {error}")
            return None
        if end is None:
            return None
        if end.txid != state.txid or (
            end.sha256 and state.sha256 and not state.sha256.startswith(end.sha256)
        ):
            self._page_map.discard("it does not describe what was shipped last")
            return None
        return end

    def bring_map_forward(self, txid: int, fetch_max: int) -> MapEnd | None:
        """Bring the page map to ``txid``, if there is one, by the segments in between.

        They come from the spool, or from the replica: at most ``fetch_max``.

        Returns:
            Where it ends then.

        Raises:
            ObjectNotFound: the replica does not hold a segment any more.
            FormatError: a segment is damaged.
            StoreError: the replica could not be read.
            SpoolError: the map could not be written.
        """
        history, state = self._history, self._record.state
        end = self._page_map.end(history)
        if end is None:
            return None
        if end.txid > state.txid:
            self._page_map.discard("it is ahead of the record")
            return None
        frozen = {sealed.txid: sealed for sealed in state.segments}
        while end.txid < txid:
            sealed = frozen.get(end.txid + 1)
            if sealed is None:
                if not fetch_max:
                    break
                fetch_max -= 1
            self._page_map.append(history, self._hash_segment(end.txid + 1, sealed))
            before, end = end, self._page_map.end(history)
            if end is None or end.txid == before.txid:
                break
        return end

    def _hash_segment(self, txid: int, sealed: Sealed | None) -> SegmentHashes:
        name = f"segment {format_txid(txid)}"
        if sealed is None:
            read = _whole(lambda offset, length: self._fetch(txid, offset, length))
            return hash_segment(read, txid=txid, sha256="", name=name, chunk_bytes=_FETCH_BYTES)
        body = self._record.body(sealed)
        if isinstance(body, bytes):
            return hash_segment(body, txid=txid, sha256=sealed.sha256, name=name)
        with self._files.reader(body) as file:
            return hash_segment(file.read, txid=txid, sha256=sealed.sha256, name=name)

    def _replica_page_size(self) -> int | None:
        """That of the newest segment; None if there is none, or it is not in level 0."""
        state = self._record.state
        if state.segments:
            body = self._record.body(state.segments[-1])
            if isinstance(body, Path):
                with self._files.reader(body) as file:
                    body = file.read(HEADER_SIZE)
            return Header.unpack(body).page_size
        if not state.txid:
            return None
        try:
            return Header.unpack(self._fetch(state.txid, 0, HEADER_SIZE)).page_size
        except (StoreError, FormatError):
            return None  # a second look only: `replica.continuity` has asked as well

    def equals(self, other: BinaryIO, n_bytes: int) -> bool | None:
        """Whether the database is, page for page, what the file ``other`` holds.

        If so, history continues from here: what is committed from now on goes into the next TXID.

        Returns:
            None if writers were in the way.
        """
        with self._whole_database() as found:
            if found is None:
                return None
            batch, page_size, _, view = found
            same = batch.commit * page_size == n_bytes
            content = pages(self._wal, batch, page_size, view.read_main)
            locked = lock_pgno(page_size)
            while same and (item := next(content, None)) is not None:
                pgno, page = item
                if other.tell() != (pgno - 1) * page_size:
                    other.seek((pgno - 1) * page_size)
                same = pgno == locked or other.read(page_size) == page
            view.verify()
        with self._mutex:
            after = self._settled_after_copy(page_size, batch.commit)
            if after is None:
                return None
            if not same:
                self._spool.record(self._record.state.unproven(), drop_pieces=True)
                return False
            self._spool.record(after)
            return True

    @contextlib.contextmanager
    def _whole_database(
        self,
    ) -> Iterator[tuple[Batch, int, WalSalts, ReadView] | None]:
        """A consistent view of every page: ``(batch, page size, salts, view)``.

        The position is set to the view's (`State.copying`), so that gates seal what comes after.
        """
        started: list[tuple[State, WalSalts]] = []

        def observe(mx_frame: int, is_still: Callable[[], bool] | None) -> bool:
            with self._mutex:  # with it no gate lets the WAL be restarted
                header = self._wal.header()
                base = replace(
                    self._record.state.unproven(),
                    copying=True,
                    page_size=0,
                    wal_gone=header is None,
                    # The position counts once all pages are shipped or found equal, not before.
                    resync=self._record.full_copy_reason or "a comparison of all pages did not end",
                )
                salts = WalSalts(0, 0)
                if header is not None and not mx_frame:
                    # Reset, so that what it holds is in the main file, or just begun.
                    base = replace(base, position=WalPosition(header.salts, 0, header.checksum))
                elif header is not None:
                    frame = self._wal.frame(mx_frame, header.page_size)
                    if frame is None:
                        return False
                    salts = header.salts
                    base = replace(
                        base,
                        position=WalPosition(salts, mx_frame, frame.checksum),
                        written_ns=self._record.written_ns(),
                        commit=frame.commit,
                        page_size=header.page_size,
                    )
                if is_still is not None and (self._record.is_restarting(header) or not is_still()):
                    return False
                self._spool.record(base, durable=False, drop_pieces=True)
                self._record.unrecorded = None
                started.append((base, salts))
                return True

        with self._port.read_view(observe) as view:
            if view is None or not started:
                yield None
                return
            base, salts = started[0]
            page_size, commit = base.page_size, base.commit
            if not commit:
                page_size, commit = size_of_main(
                    view.read_main, self._files.stat(self._record.path).st_size
                )
                if commit == 0:
                    yield None
                    return
            newest: dict[int, int] = {}
            if not view.main_only and base.position is not None:
                # Frames up to the mark win over the main file, and the mark keeps them in place.
                overlay = collect(self._wal, 0, view.mx_frame, page_size)
                newest = {key >> 32: key for key in overlay.keys}
            locked = lock_pgno(page_size)
            keys = (newest.get(n, n << 32) for n in range(1, commit + 1) if n != locked)
            yield Batch(1, view.mx_frame, keys, commit, (0, 0), None), page_size, salts, view

    def _settled_after_copy(self, page_size: int, commit: int) -> State | None:
        """The state after all pages were read; None if continuity was lost again meanwhile."""
        now = self._record.state
        if not now.copying or self._record.unrecorded is not None:
            return None
        self._wal.sync()  # nothing may be in the replica that a power cut here can take back
        now = replace(now, copying=False, page_size=page_size, resync="", suspect=False)
        if not now.commit:
            now = replace(now, commit=commit)
        if now.wal_gone:
            now = replace(now, fingerprint=self._record.settled_fingerprint())
        return now


def _whole(fetch: Callable[[int, int], bytes]) -> Callable[[int], bytes]:
    """``read(n)`` on top of ``fetch(offset, length)``, which gives less at the end only."""
    offset, ended = 0, False

    def read(length: int) -> bytes:
        nonlocal offset, ended
        data = b"" if ended else fetch(offset, length)
        offset += len(data)
        ended = len(data) < length
        return data

    return read
