"""Capture: from committed WAL frames to sealed LTX bytes, and the proof that none was missed.

Frames are read through a descriptor of our own on the ``-wal`` file (closing it drops no lock of
SQLite's), only up to the frame that the wal-index has published, and the WAL's header is read
before and after: equal headers mean that no restart came between.

Two kinds of callers seal frames, serialised by one mutex:

* the uploader takes what is new and freezes it under the next TXID (`Capture.take`);
* the gate, in the thread of whoever is about to destroy WAL frames, seals what is left as a piece
  without a TXID (`Capture.gate_restart`, `Capture.gate_discard`, `Capture.drain`).

While the mutex is held there is only ``pread``, encoding, ``fdatasync`` and the NOOP checkpoint;
never a BEGIN, a checkpoint, an open of the database, or a network call.  A gate record is durable
before the WAL it speaks of is gone.

The parts: `replica.record` says where sealing goes on and whether history is continuous,
`replica.sealing` writes the bytes, `replica.resync` looks at all pages when it is not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from .clock import Clock
from .errors import ReplicaError
from .format.ltx import PageEncoding
from .format.types import WalSalts, lock_pgno
from .format.wal import FRAME_HEADER_SIZE, WalHeader
from .frames import Batch, WalReader, collect
from .record import Record
from .resync import FETCH_IN_PASSING, Fetch, Resync
from .sealing import Sealer
from .spool import Sealed, Spool, State, WalPosition
from .sqlite import RefusedError, SqlitePort

__all__ = ["Capture"]

log = logging.getLogger("walship.capture")

#: So many bytes of WAL frames are sealed and sent at once, whatever the sync interval says: better
#: in the uploader's thread, beside the checkpoint that such a commit starts, than at the gate.
_MUCH_BYTES: Final = 4 * 1024 * 1024
#: Looks at a WAL that cannot be judged, a millisecond apart, before a wait does not mind it.
_UNSETTLED_LOOKS: Final = 100
_PAST_THE_GATE: Final = "a writer outside walship removed or restarted the WAL"


class Capture:
    """Seals what a database commits.  Every public method may be called from any thread.

    Args:
        path: absolute path of the main database file.
        spool: open spool of this database; touched only under `mutex`.
        port: plain connections to the database.
        fetch: reads segments of the replica; one attempt a call.
        encoding: how pages are stored in new segments.
        max_sync_wal_bytes: WAL bytes one segment covers at most, cut at a commit; 0: no limit.

    Attributes:
        record: where sealing goes on, and whether history is continuous.
        sealer: writes the bytes.
        resync: looks at all pages; for the uploader's thread.
        mutex: the drain mutex.  Guards the spool, the WAL's descriptor and the fields below.
        in_wal_mode: whether page 1 says WAL mode, as the VFS saw it last; before that nothing may
            be read, for a reader would be in the way of switching to it.
        more: the last `take` did not take all: it was cut at the limit of one segment, or a gate is
            about to seal the rest.
    """

    def __init__(
        self,
        path: str,
        spool: Spool,
        port: SqlitePort,
        clock: Clock,
        *,
        fetch: Fetch,
        encoding: PageEncoding = PageEncoding.BLOCK,
        max_sync_wal_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.path = path
        self.record = Record(path, spool, port, clock)
        self.sealer = Sealer(self.record, encoding)
        self.resync = Resync(self.record, self.sealer, fetch=fetch, encoding=encoding)
        self.mutex = self.record.mutex
        self._name = self.record.name
        self._spool = spool
        self._port = port
        self._files = spool.files
        self._wal = self.record.wal
        self._max_sync_wal_bytes = max_sync_wal_bytes
        self._map_trouble: str | None = None
        # Guards `_note_wal`, another descriptor on the same file.
        self._note_lock = threading.Lock()
        self._note_wal = WalReader(path + "-wal", self._files)
        # Salts and mxFrame when the latest checkpoint began: the end of the WAL at a restart.
        self._known_end: tuple[WalSalts, int] | None = None
        # The WAL whose rest `_new_frames` has found, and the one whose rest is sealed, although it
        # is not known up to where it was committed; by their salts.
        self._rest: WalSalts | None = None
        self._rest_sealed: WalSalts | None = None
        # Salts of a WAL whose frames could not be judged, and how often they were looked at.
        self._unsettled: tuple[WalSalts, int] = (WalSalts(0, 0), 0)
        self.in_wal_mode = False
        self.more = False

    @property
    def state(self) -> State:
        """The spool's state; immutable."""
        return self._spool.state

    @property
    def full_copy_reason(self) -> str | None:
        """Why only `resync` can come next; None while the history is continuous."""
        return self.record.full_copy_reason

    def has_much(self) -> bool:
        """Whether enough is committed and not sealed that it is worth an object of its own."""
        if not self.mutex.acquire(blocking=False):
            return False  # somebody is sealing it right now
        try:
            position = self.state.position
            published = self._port.published()
            if position is None or published is None:
                return False
            frames = published.mx_frame - position.frame
            return frames * self.state.page_size >= _MUCH_BYTES
        finally:
            self.mutex.release()

    def acknowledge(self, txid: int) -> None:
        """The replica has every TXID up to ``txid``: the spool lets go of them.

        The page map takes them up first.  Only the uploader calls this.
        """
        try:
            self.resync.bring_map_forward(txid, FETCH_IN_PASSING)
            self._map_trouble = None
        except (ReplicaError, OSError) as error:
            # The next one tries again; in the end a resync fetches what is missing.
            if self._map_trouble != str(error):
                self._map_trouble = str(error)
                log.warning("%s: the page map falls behind: %s", self._name, error)
        with self.mutex:
            self._spool.acknowledge(txid)

    def outgrows_database(self) -> bool:
        """Whether the pieces are larger together than the main file: merged they cannot be."""
        pieces = self.state.pieces
        if len(pieces) < 2:
            return False
        fingerprint = self.record.fingerprint()
        size = fingerprint.size if fingerprint is not None else 0
        return sum(piece.size_bytes for piece in pieces) > size

    def waiting_bytes(self) -> int:
        """Bytes of sealed changes and of WAL frames that are not in the replica; about."""
        state = self.state
        unsealed = 0
        published = self._port.published()
        if published is not None and state.position is not None:
            frames = max(0, published.mx_frame - state.position.frame)
            unsealed = frames * (FRAME_HEADER_SIZE + state.page_size)
        return state.pending_bytes + unsealed

    # -- the gate -----------------------------------------------------------------------------

    def note_checkpoint(self) -> None:
        """A checkpoint begins: remember where the WAL ends, before backfill can be published."""
        published = self._port.published()
        if published is None:
            return
        # A descriptor of its own: the mutex may be held by a long capture, and nobody may wait for
        # that here.
        with self._note_lock:
            salts = self._note_wal.salts()
        if salts is not None:
            self._known_end = (salts, published.mx_frame)

    def gate_restart(self, new_header: bytes, read_main: Callable[[int, int], bytes]) -> None:
        """A new WAL header is about to be written over the old generation (or into a new file).

        Durable when this returns: everything committed so far is sealed, and the record names the
        new generation as the old one's successor.

        Args:
            new_header: the 32 bytes that SQLite wants to write.
            read_main: reads the main file in the calling thread.
        """
        header = WalHeader.parse(new_header)
        with self.mutex:
            successor = WalPosition(header.salts, 0, header.checksum)
            self._drain_old_generation(successor, header.page_size, read_main)
            self._known_end = None
            self.record.let_in = header.salts
        self._port.open()

    def gate_discard(self, read_main: Callable[[int, int], bytes]) -> None:
        """The WAL is about to be truncated to nothing or deleted; its content is in the main file.

        Durable when this returns, as for `gate_restart`; the record carries the main file's
        fingerprint, which is given up to 20 ms to age.
        """
        with self.mutex:
            if self._wal.header() is None and self.state.wal_gone:
                return
            self._drain_old_generation(None, self.state.page_size, read_main)
            self._known_end = None
            self.record.let_in = None

    def _drain_old_generation(
        self,
        successor: WalPosition | None,
        page_size: int,
        read_main: Callable[[int, int], bytes],
    ) -> None:
        """Seal the rest of the WAL on disk and record what comes after it, in one record."""
        state = self.state
        if self.record.awaits_copy:
            self.record.record_loss()
            return
        batch: Batch | None = None
        header = self._wal.header()
        old = self.record.locate(header)
        if old is None and not self.record.is_rightly_gone(header):
            self.record.lose(_PAST_THE_GATE)
            return
        if old is not None and header is not None and not state.wal_gone:
            batch = self._rest_of_wal(old, header, read_main)
            old = WalPosition(old.salts, batch.last, batch.checksum) if batch else old
        if header is not None:
            page_size = header.page_size
        after = replace(
            state,
            page_size=page_size,
            position=successor,
            previous=old,
            wal_gone=successor is None,
        )
        if successor is None:
            after = replace(after, fingerprint=self.record.settled_fingerprint())
        elif not state.wal_gone:
            after = replace(after, fingerprint=None)
        if batch is None:
            self._spool.record(after)
            return
        self._add_unwritten(batch, state.commit, page_size)
        after = replace(after, commit=batch.commit)
        self._wal.sync()
        self.sealer.seal_piece(batch, after, page_size, read_main)

    def _rest_of_wal(
        self, old: WalPosition, header: WalHeader, read_main: Callable[[int, int], bytes]
    ) -> Batch | None:
        """What a WAL that is about to go still holds; every commit of it is in the main file.

        The batch ends at the last frame that is known to be committed.  It may hold pages of frames
        behind that, but the position must not: a crash now brings this WAL back, and SQLite then
        writes its next commits over what never was one.
        """
        end = old.frame
        if self._known_end is not None and self._known_end[0] == old.salts:
            end = max(end, self._known_end[1])
        page_size = header.page_size
        batch = collect(self._wal, old.frame, end, page_size) if end > old.frame else None
        # Frames behind the known end: commits of a writer that died before it rang, or ghosts that
        # never were commits, perhaps torn by a power cut.  Their page numbers, such as they are,
        # with the main file's content are right for all of them.
        beyond: set[int] = set()
        frame_no = end + 1
        while frame := self._wal.frame(frame_no, page_size):
            if frame.salts != old.salts:
                break
            beyond.add(frame.pgno)
            frame_no += 1
        if not beyond:
            return batch
        commit = self._files.stat(self.record.path).st_size // page_size
        if batch is None:
            batch = Batch(old.frame + 1, end, [], commit, old.checksum, b"")
        keys = {key >> 32: key for key in batch.keys}
        keys.update((pgno, pgno << 32) for pgno in beyond - {0, lock_pgno(page_size)})
        batch.keys = sorted(key for key in keys.values() if key >> 32 <= commit)
        batch.commit = commit
        return batch

    def release(self, mx_frame: int) -> bool:
        """The WAL may be begun anew by somebody who passes no gate, if all of it is sealed.

        Until `hold_on` the caller sees to it that this can happen once at most, and that then no
        frame of the new one can be copied into the main file.

        Args:
            mx_frame: how many frames the WAL has.

        Returns:
            False if it must not.
        """
        with self.mutex:
            position, header = self.state.position, self._wal.header()
            if self.record.full_copy_reason is not None or position is None or header is None:
                return False
            if position.salts != header.salts or position.frame != mx_frame:
                return False
            self.record.released = header.salts
            return True

    def hold_on(self) -> None:
        """From now on nothing may begin the WAL anew but through the gate; see `release`.

        Raises:
            SpoolError: it was begun anew, and that cannot be recorded; all pages will be compared.
        """
        with self.mutex:
            if self.record.released is None:
                return
            try:
                self.record.locate(self._wal.header())
            finally:
                self.record.released = None

    def drain(self) -> None:
        """Seal everything committed in the current WAL; it stays where it is.

        Raises:
            SpoolError: the disk is full.
            RefusedError: the wal-index cannot be read just now.
        """
        with self.mutex:
            if self.record.awaits_copy:
                return
            found = self._new_frames(limit=False)
            if found is None:
                return
            batch, page_size = found
            after = self._after(batch)
            self._wal.sync()
            self.sealer.seal_piece(batch, after, page_size, self._port.read_main)
            self._rest_sealed = self._rest

    # -- the uploader -------------------------------------------------------------------------

    def take(self) -> Sealed | None:
        """Freeze what is new under the next TXID; durable in the spool when this returns.

        Only the uploader calls this, `Resync.take` and `Sealer.merge_pieces`, one at a time.

        Returns:
            The segment, or None if there is nothing new (or only a full copy can come next).
        """
        with self.mutex:
            self.more = False
            if self.full_copy_reason is not None:
                return None
            found = self._new_frames(limit=not self.state.pieces)
            # Pieces that fill the spool go first: what is new follows in a segment of its own.
            follows = found is not None and bool(self.state.pieces) and self._spool.is_full
            if found is not None and not follows:
                batch, page_size = found
                self._wal.sync()
                if not self.state.pieces:
                    segment = self.sealer.freeze(batch, self._after(batch), page_size)
                    self._rest_sealed = self._rest
                    return segment
                self.sealer.seal_piece(batch, self._after(batch), page_size, self._port.read_main)
                self._rest_sealed = self._rest
            if not self.state.pieces:
                return None
        merged = self.sealer.freeze_pieces()
        self.more = follows or bool(self.state.pieces)
        return merged

    def freeze_pieces(self) -> None:
        """Freeze all that was sealed without a TXID, and nothing else."""
        while self.state.pieces:
            self.sealer.freeze_pieces()

    def _after(self, batch: Batch) -> State:
        state = self.state
        assert state.position is not None
        position = WalPosition(state.position.salts, batch.last, batch.checksum)
        return replace(
            state,
            position=position,
            written_ns=self.record.written_ns(),
            previous=None,
            fingerprint=None,
            commit=batch.commit,
        )

    def _new_frames(self, *, limit: bool) -> tuple[Batch, int] | None:
        """Committed frames behind the position, by the race-free recipe; None if there are none."""
        self._rest = None
        header = self._wal.header()
        position = self.record.locate(header)
        state = self.state
        if self.record.is_rightly_gone(header) or (header is None and state.copying):
            return None
        if position is None:
            self.record.lose(_PAST_THE_GATE)
            return None
        if header is None or position != state.position:
            return None  # a gate was passed, and what it lets happen is not visible yet
        published = self._port.published()
        if published is None:
            if not self._port.is_shut:
                raise RefusedError(f"SQLite's wal-index cannot be read: {self._port.trouble}")
            self.more = self._is_unsettled(position, header)
            return None
        if published.mx_frame == 0:
            return self._before_the_gate(position, header)
        if published.mx_frame <= position.frame:
            return None
        last = published.mx_frame
        if limit and self._max_sync_wal_bytes:
            last = self._cut(position, last, header.page_size)
            self.more = last < published.mx_frame
        batch = collect(self._wal, position.frame, last, header.page_size)
        if self._wal.header() != header:
            return None
        if header.page_size != state.page_size:
            self._spool.record(replace(state, page_size=header.page_size), durable=False)
        self._add_unwritten(batch, state.commit, header.page_size)
        return batch, header.page_size

    def _is_unsettled(self, position: WalPosition, header: WalHeader) -> bool:
        """Whether there are frames of which nobody can say at this moment if they are committed.

        Another process may have reset the wal-index and be on its way to the gate.  But they may
        also be what a transaction left behind that was rolled back, so this ends.
        """
        frame = self._wal.frame(position.frame + 1, header.page_size)
        if frame is None or frame.salts != header.salts:
            return False
        salts, looks = self._unsettled
        self._unsettled = (header.salts, looks + 1 if salts == header.salts else 1)
        return self._unsettled[1] <= _UNSETTLED_LOOKS

    def _before_the_gate(
        self, position: WalPosition, header: WalHeader
    ) -> tuple[Batch, int] | None:
        """What is new in a WAL of which the wal-index counts no frame: nothing, unless SQLite has
        reset the index in order to start the WAL over.

        The gate was refused then or is not reached yet: all is in the main file, and who writes
        next has to take this mutex first.
        """
        if not position.frame:  # else frames of it were published once
            salts = self._port.index_salts()
            if salts is None:
                self.more = self._is_unsettled(position, header)
                return None
            if salts == header.salts:
                return None
        if self._rest_sealed == header.salts:
            return None  # where the position is says nothing: see `_rest_of_wal`
        batch = self._rest_of_wal(position, header, self._port.read_main)
        if batch is None or self._wal.header() != header:
            return None
        self._rest = header.salts
        return batch, header.page_size

    def _cut(self, position: WalPosition, last: int, page_size: int) -> int:
        """The first commit at or behind the limit of one segment."""
        step = FRAME_HEADER_SIZE + page_size
        frame_no = position.frame + max(1, self._max_sync_wal_bytes // step)
        while frame_no < last:
            frame = self._wal.frame(frame_no, page_size)
            if frame is None or frame.commit:
                break
            frame_no += 1
        return min(frame_no, last)

    def _add_unwritten(self, batch: Batch, commit_before: int, page_size: int) -> None:
        """Pages by which the database grew without a frame of their own come from the main file."""
        grown = batch.commit - commit_before
        if grown <= 0 or commit_before == 0:
            return
        have = {key >> 32 for key in batch.keys if key >> 32 > commit_before}
        if len(have) == grown:
            return
        have.add(lock_pgno(page_size))
        missing = [
            pgno << 32 for pgno in range(commit_before + 1, batch.commit + 1) if pgno not in have
        ]
        if missing:
            batch.keys = sorted([*batch.keys, *missing])

    def close(self) -> None:
        """Close the descriptors on the WAL.  The spool and the port belong to the engine."""
        with self.mutex:
            self._wal.close()
        with self._note_lock:
            self._note_wal.close()
