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

When frames may have been missed, `Capture.resync` compares every page with the page map of the
replica's newest state and freezes those that differ; without a map, all of them (`Capture.copy`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from .clock import Clock
from .errors import ContinuityError, FormatError, ObjectNotFound, ReplicaError, StoreError
from .format.ltx import HEADER_SIZE, NO_SALTS, Encoder, Header, PageEncoding
from .format.merge import MergeInput, merge
from .format.types import WalSalts, format_txid, is_page_size, lock_pgno
from .format.wal import (
    FRAME_HEADER_SIZE,
    WAL_HEADER_SIZE,
    WalHeader,
    frame_offset,
    wal_size,
)
from .frames import Batch, WalReader, collect, page_runs, pages
from .pagemap import History, MapDamaged, MapEnd, PageMap, SegmentHashes, hash_segment, page_hash
from .spool import (
    INLINE_BYTES,
    DrainMutex,
    Fingerprint,
    Sealed,
    SegmentSink,
    Spool,
    State,
    WalPosition,
)
from .sqlite import ReadView, RefusedError, SpoolError, SqlitePort

__all__ = ["Capture", "TailLost"]

log = logging.getLogger("walship.capture")

#: Pieces of at least this size are sent alone: merging them would cost more than a request.
_SOLO_BYTES: Final = 1024 * 1024
#: So many bytes of WAL frames are sealed and sent at once, whatever the sync interval says: better
#: in the uploader's thread, beside the checkpoint that such a commit starts, than at the gate.
_MUCH_BYTES: Final = 4 * 1024 * 1024
#: Looks at a WAL that cannot be judged, a millisecond apart, before a wait does not mind it.
_UNSETTLED_LOOKS: Final = 100
_PAST_THE_GATE: Final = "a writer outside walship removed or restarted the WAL"
#: Segments that are fetched from the replica for the page map in passing; a resync fetches all.
_FETCH_IN_PASSING: Final = 4
#: From so many missing segments on a full copy costs less than fetching them.
_FETCH_MAX: Final = 1000
#: A segment is fetched in pieces of this many bytes.
_FETCH_BYTES: Final = 4 * 1024 * 1024
#: A file changed less than this long ago may change again without a visible sign: the kernel's
#: timestamps advance in ticks of up to 10 ms.
_SETTLE_NS: Final = 20_000_000


#: ``fetch(txid, offset, length)``: bytes of a level-0 segment in the replica, fewer at its end.
Fetch = Callable[[int, int, int], bytes]


class TailLost(Exception):
    """The WAL on disk ends before what was sealed from it: a power cut or somebody cut it."""


class Capture:
    """Seals what a database commits.  Every public method may be called from any thread.

    Args:
        path: absolute path of the main database file.
        spool: open spool of this database; touched only under `mutex`.
        port: plain connections to the database.
        fetch: reads segments of the replica; one attempt a call.
        encoding: how pages are stored in new segments.
        max_sync_wal_bytes: WAL bytes one segment covers at most, cut at a commit; 0: no limit.
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
        self._name = os.path.basename(path)
        self._spool = spool
        self._port = port
        self._clock = clock
        self._fetch = fetch
        self._encoding = encoding
        self._max_sync_wal_bytes = max_sync_wal_bytes
        self._files = spool.files
        # Uploader's thread only.
        self._page_map = PageMap(spool.directory, self._files)
        self._map_trouble: str | None = None
        #: The drain mutex.  Guards the spool, the WAL descriptor and all fields below.
        self.mutex = DrainMutex(spool)
        self._wal = WalReader(path + "-wal", self._files)
        # Guards `_note_wal`, another descriptor on the same file.
        self._note_lock = threading.Lock()
        self._note_wal = WalReader(path + "-wal", self._files)
        # Salts and mxFrame when the latest checkpoint began: the end of the WAL at a restart.
        self._known_end: tuple[WalSalts, int] | None = None
        # The generation that this process let through the gate last, while its WAL is there.
        self._let_in: WalSalts | None = None
        # The WAL whose rest `_new_frames` has found, and the one whose rest is sealed, although it
        # is not known up to where it was committed; by their salts.
        self._rest: WalSalts | None = None
        self._rest_sealed: WalSalts | None = None
        # Salts of a WAL whose frames could not be judged, and how often they were looked at.
        self._unsettled: tuple[WalSalts, int] = (WalSalts(0, 0), 0)
        #: Whether page 1 says WAL mode, as the VFS saw it last; before that nothing may be read,
        #: for a reader would be in the way of switching to it.
        self.in_wal_mode = False
        # Why history is not continuous, if even that could not be recorded (disk full): the next
        # start then finds a WAL that the record does not name.
        self._unrecorded: str | None = None
        #: Bytes of WAL frames that this process has sealed; guarded by the mutex.
        self.wal_bytes = 0
        #: Checkpoints that this process has begun.
        self.checkpoints = 0
        #: The last `take` did not take all: it was cut at the limit of one segment, or a gate is
        #: about to seal the rest.
        self.more = False

    @property
    def state(self) -> State:
        """The spool's state; immutable."""
        return self._spool.state

    @property
    def full_copy_reason(self) -> str | None:
        """Why only `resync` can come next; None while the history is continuous."""
        return self._unrecorded or self._spool.state.resync or None

    @property
    def _awaits_copy(self) -> bool:
        """Nothing need be sealed: a full copy will read whatever is there when it begins."""
        state = self._spool.state
        return self._unrecorded is not None or bool(state.resync and not state.copying)

    # -- opening ------------------------------------------------------------------------------

    def prove(self) -> None:
        """Decide from the files alone whether history continues where the record ends.

        Must run before any connection is opened.  Sets `full_copy_reason`.

        Raises:
            TailLost: the WAL lost frames that were sealed from it.
        """
        with self.mutex:
            found = self._prove()
            if found is None:
                return
            reason, suspect = found
            if not self.state.pieces and (reason, suspect) == (
                self.state.resync,
                self.state.suspect,
            ):
                return
            self._unrecorded = reason
            with contextlib.suppress(SpoolError):
                state = replace(self._unproven(), resync=reason, suspect=suspect)
                self._spool.record(state, durable=False, drop_pieces=True)
                self._unrecorded = None

    def _unproven(self) -> State:
        return replace(
            self.state,
            position=None,
            previous=None,
            fingerprint=None,
            wal_gone=False,
            copying=False,
            commit=0,
        )

    def _prove(self) -> tuple[str, bool] | None:
        """None, or why history is not continuous and whether commits may have been lost."""
        state = self.state
        if state.set_aside:
            raise TailLost("its files were being replaced from the replica")
        if state.resync:
            return state.resync, state.suspect
        unchanged = self._is_unchanged()
        header = self._wal.header()
        if header is None:
            if unchanged:
                if not state.wal_gone:
                    self._spool.record(replace(state, wal_gone=True), durable=False)
                return None
            # Whoever checkpointed the WAL wrote to the main file after our last record; times that
            # are equal are those of one tick of the kernel's clock.
            main = self._fingerprint()
            written = main is not None and main.mtime_ns >= self._spool.found_mtime_ns
            suspect = state.position is not None and state.position.frame > 0 and not written
            return "the database file was changed while walship was away", suspect
        for candidate in (state.position, state.previous):
            if candidate is None or candidate.salts != header.salts:
                continue
            if not self._intact(candidate, header):
                raise TailLost("the WAL ends before what was already replicated from it")
            if candidate != state.position:
                self._spool.record(
                    replace(state, position=candidate, previous=None, wal_gone=False)
                )
            return None
        if unchanged:
            # All that happened since the clean close is in this WAL, from its first frame on.
            position = WalPosition(header.salts, 0, header.checksum)
            self._spool.record(replace(state, position=position, previous=None, wal_gone=False))
            return None
        return "the WAL was restarted or replaced while walship was away", False

    def _intact(self, position: WalPosition, header: WalHeader) -> bool:
        if position.frame == 0:
            return position.checksum == header.checksum
        frame = self._wal.frame(position.frame, header.page_size)
        return (
            frame is not None
            and frame.salts == position.salts
            and frame.checksum == position.checksum
        )

    def main_holds(self, pgno: int, page: bytes, page_size: int) -> bool:
        """Whether a page of the main file, as it is now, has this content."""
        return self._port.read_main((pgno - 1) * page_size, page_size) == page

    def scratch_path(self, purpose: str) -> Path:
        """A name for a large temporary file beside the spool; removed at the next start."""
        return self._spool.directory / f"{purpose}.tmp"

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

    def page_size(self) -> int | None:
        """Of the database as it is now, in bytes; None while it has no page."""
        with self.mutex:
            header = self._wal.header()
        if header is not None:
            return header.page_size
        fingerprint = self._fingerprint()
        size = fingerprint.size if fingerprint is not None else 0
        return _size_of_main(self._port.read_main, size)[0] or None

    def has_content(self) -> bool:
        """Whether the main file holds any page at all."""
        fingerprint = self._fingerprint()
        return fingerprint is not None and fingerprint.size > 0

    def body(self, sealed: Sealed) -> bytes | Path:
        """The frozen bytes of a segment: in memory, or the file that holds them."""
        with self.mutex:
            return self._spool.read(sealed)

    def acknowledge(self, txid: int) -> None:
        """The replica has every TXID up to ``txid``: the spool lets go of them.

        The page map takes them up first.  Only the uploader calls this.
        """
        try:
            self._bring_map_forward(txid, _FETCH_IN_PASSING)
            self._map_trouble = None
        except (ReplicaError, OSError) as error:
            # The next one tries again; in the end a resync fetches what is missing.
            if self._map_trouble != str(error):
                self._map_trouble = str(error)
                log.warning("%s: the page map falls behind: %s", self._name, error)
        with self.mutex:
            self._spool.acknowledge(txid)

    def begin(self, state: State) -> None:
        """Record a new lineage and its TXID; what was frozen for another history is dropped."""
        with self.mutex:
            self._spool.record(state, drop_segments=True)

    def amend(self, *, durable: bool = False, **changes: Any) -> None:
        """Record other values of some scalar fields of the state."""
        with self.mutex:
            self._spool.record(replace(self.state, **changes), durable=durable)

    def is_untouched(self) -> bool:
        """Whether the main file is what the record says, and there is no WAL."""
        state = self.state
        return (
            state.fingerprint is not None
            and state.fingerprint == self._fingerprint()
            and self._wal.header() is None
        )

    def restored(self, txid: int, sha256: str, page_size: int, commit: int) -> None:
        """Record that the main file holds the replica's state at a TXID, and there is no WAL.

        Args:
            sha256: of the replica's segment that ends there, hex; empty if it is not known.
        """
        with self.mutex:
            after = replace(
                self._unproven(),
                txid=txid,
                acked_txid=txid,
                restored_txid=txid,
                sha256=sha256,
                page_size=page_size,
                commit=commit,
                wal_gone=True,
                resync="",
                fingerprint=self._settled_fingerprint(),
            )
            self._spool.record(after, drop_pieces=True, drop_segments=True)

    def refresh(self, *, wait: bool = True) -> State:
        """The state, with what other processes have recorded until now.

        Args:
            wait: False leaves it as it is known here while somebody else is sealing.
        """
        if self.mutex.acquire(blocking=wait):
            self.mutex.release()
        return self.state

    def outgrows_database(self) -> bool:
        """Whether the pieces are larger together than the main file: merged they cannot be."""
        pieces = self.state.pieces
        if len(pieces) < 2:
            return False
        fingerprint = self._fingerprint()
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

    def require_full_copy(self, reason: str) -> None:
        """Give up continuity: the next segment will come from `resync`.  Says so in the log."""
        with self.mutex:
            self._lose(reason)

    def let_go(self, reason: str) -> None:
        """As `require_full_copy`, and says nothing: that copy is not to be expected soon."""
        with self.mutex:
            if self.full_copy_reason is None:
                self._discontinue(reason)

    def _lose(self, reason: str) -> None:
        if self.full_copy_reason is None:
            log.warning("%s: %s; all pages will be compared", self._name, reason)
        self._discontinue(reason)

    def _discontinue(self, reason: str) -> None:
        self._unrecorded = reason
        self._record_loss()

    def _record_loss(self) -> None:
        """Record that continuity is lost, if it is not recorded yet."""
        if self._unrecorded is None:
            return
        try:
            state = replace(self._unproven(), resync=self._unrecorded)
            self._spool.record(state, drop_pieces=True)
            self._unrecorded = None
        except SpoolError:
            # The record still says what does not hold any more.  The file's times will tell, once
            # they are on the disk: SQLite's syncs leave them out.
            fd = self._port.descriptor()
            if fd is not None:
                with contextlib.suppress(OSError):
                    self._files.sync_all(fd)

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
            self.checkpoints += 1
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
            self._let_in = header.salts
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
            self._let_in = None

    def _drain_old_generation(
        self,
        successor: WalPosition | None,
        page_size: int,
        read_main: Callable[[int, int], bytes],
    ) -> None:
        """Seal the rest of the WAL on disk and record what comes after it, in one record."""
        state = self.state
        if self._awaits_copy:
            self._record_loss()
            return
        batch: Batch | None = None
        header = self._wal.header()
        old = self._locate(header)
        if old is None and not self._is_rightly_gone(header):
            self._lose(_PAST_THE_GATE)
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
            after = replace(after, fingerprint=self._settled_fingerprint())
        elif not state.wal_gone:
            after = replace(after, fingerprint=None)
        if batch is None:
            self._spool.record(after)
            return
        self._add_unwritten(batch, state.commit, page_size)
        after = replace(after, commit=batch.commit)
        self._wal.sync()
        self._seal_piece(batch, after, page_size, read_main)

    def _locate(self, header: WalHeader | None) -> WalPosition | None:
        """Our position in the WAL on disk: the present one, or the one before the last gate.

        None if it is not ours, because it began, or went, without passing the gate; also if there
        is no WAL, rightly.
        """
        state = self.state
        if header is None:
            # Not written yet?  Then the main file is what it was when the WAL before it went.
            is_coming = state.position is not None and state.position.frame == 0
            return state.position if is_coming and self._is_unchanged() else None
        known = (state.previous,) if state.wal_gone else (state.position, state.previous)
        for candidate in known:
            if candidate is not None and candidate.salts == header.salts:
                return candidate
        return None

    def _is_rightly_gone(self, header: WalHeader | None) -> bool:
        """Whether there is no WAL, and nobody has written to the main file since it went."""
        state = self.state
        return header is None and state.wal_gone and (state.copying or self._is_unchanged())

    def _is_unchanged(self) -> bool:
        """Whether the main file is what it was when there was no WAL last."""
        fingerprint = self.state.fingerprint
        return fingerprint is not None and fingerprint == self._fingerprint()

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
        commit = self._files.stat(self.path).st_size // page_size
        if batch is None:
            batch = Batch(old.frame + 1, end, [], commit, old.checksum, b"")
        keys = {key >> 32: key for key in batch.keys}
        keys.update((pgno, pgno << 32) for pgno in beyond - {0, lock_pgno(page_size)})
        batch.keys = sorted(key for key in keys.values() if key >> 32 <= commit)
        batch.commit = commit
        return batch

    def drain(self) -> None:
        """Seal everything committed in the current WAL; it stays where it is.

        Raises:
            SpoolError: the disk is full.
            RefusedError: the wal-index cannot be read just now.
        """
        with self.mutex:
            if self._awaits_copy:
                return
            found = self._new_frames(limit=False)
            if found is None:
                return
            batch, page_size = found
            after = self._after(batch)
            self._wal.sync()
            self._seal_piece(batch, after, page_size, self._port.read_main)
            self._rest_sealed = self._rest

    def _fingerprint(self) -> Fingerprint | None:
        try:
            return Fingerprint.of(self.path, self._files)
        except FileNotFoundError:
            return None

    def _settled_fingerprint(self) -> Fingerprint | None:
        """The main file's identity, once it is old enough to prove anything.

        Nobody else can write now: the caller's thread holds SQLite's locks.
        """
        while True:
            fingerprint = self._fingerprint()
            if fingerprint is None:
                return None
            changed = max(fingerprint.mtime_ns, fingerprint.ctime_ns)
            age_ns = self._clock.now_ms() * 1_000_000 - changed
            if not 0 <= age_ns < _SETTLE_NS:
                return fingerprint
            self._clock.sleep((_SETTLE_NS - age_ns) / 1e9)

    # -- the uploader -------------------------------------------------------------------------

    def take(self) -> Sealed | None:
        """Freeze what is new under the next TXID; durable in the spool when this returns.

        Only the uploader calls this, `copy` and `merge_pieces`, one at a time.

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
                    segment = self._freeze(batch, self._after(batch), page_size)
                    self._rest_sealed = self._rest
                    return segment
                self._seal_piece(batch, self._after(batch), page_size, self._port.read_main)
                self._rest_sealed = self._rest
            if not self.state.pieces:
                return None
        merged = self._freeze_pieces()
        self.more = self.more or follows
        return merged

    def freeze_pieces(self) -> None:
        """Freeze all that was sealed without a TXID, and nothing else."""
        while self.state.pieces:
            self._freeze_pieces()

    def merge_pieces(self, *, everything: bool = False) -> None:
        """Merge the newest pieces while they may not be sent: the last version of a page counts.

        Pieces are merged with those before them once they are at least half as large together, so
        that every byte is merged a logarithmic number of times.  The mutex is free meanwhile.

        Args:
            everything: merge all of them, however large.
        """
        with self.mutex:
            state = self.state
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
            with self.mutex:
                now = self.state
                if now.pieces[start : start + len(chosen)] == chosen:
                    self._spool.replace_pieces(start, len(chosen), body, sink.size_bytes)
                else:
                    sink.abandon()
        except BaseException:
            sink.abandon()
            raise

    def copy(self) -> Sealed | None:
        """Freeze the whole database under the next TXID, and make its page map.

        The mark is held for the local copy only, and the mutex is free while pages are copied:
        gates go on sealing pieces, which follow.

        Returns:
            The segment, or None if writers were in the way or the database is still empty.

        Raises:
            ContinuityError: the database has another page size than the replica.
        """
        reason = self.full_copy_reason

        def fill(batch: Batch, header: Header, sink: SegmentSink, view: ReadView) -> bool:
            with self._page_map.begin(
                self._history,
                txid=header.max_txid,
                page_size=header.page_size,
                commit=header.commit,
            ) as page_map:
                self._encode(batch, header, sink, view.read_main, page_map.add)
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

    def resync(self) -> Sealed | None:
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
        reason = self.full_copy_reason
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
        elif self.full_copy_reason is None:
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
                raise page_size_changed(self.path, page_size, replica_page_size)
            with self.mutex:
                header = self._ltx_header(self.state.txid + 1, page_size, batch.commit, salts)
                sink = SegmentSink(self._spool, hashed=True)
            try:
                is_needed = fill(batch, header, sink, view)
                view.verify()
                body = sink.finish()
            except BaseException:
                sink.abandon()
                raise
        with self.mutex:
            after = self._settled_after_copy(page_size, batch.commit)
            if after is None or not is_needed:
                sink.abandon()
                if after is not None:
                    self._spool.record(after)
                return None
            after = _frozen(after, header, sink)
            if is_full:
                after = replace(after, full_txid=after.txid)
            return self._spool.add_segment(
                after, _describe(header, sink), body, keep=len(self.state.pieces)
            )

    # -- the page map -------------------------------------------------------------------------

    @property
    def _history(self) -> History:
        state = self.state
        return History(state.lineage, state.replica)

    def describe(self, path: Path, history: History, txid: int, page_size: int) -> None:
        """Make the page map of a history that is about to begin, from a file that is its state."""
        self._page_map.describe(path, history, txid=txid, page_size=page_size)

    def _map_of_newest(self) -> MapEnd | None:
        """Where the page map ends once it describes the newest frozen segment; None without.

        Raises:
            StoreError: the replica could not be asked for what is missing.
        """
        state = self.state
        if not state.txid:
            return None
        try:
            end = self._bring_map_forward(state.txid, _FETCH_MAX)
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

    def _bring_map_forward(self, txid: int, fetch_max: int) -> MapEnd | None:
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
        history, state = self._history, self.state
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
        body = self.body(sealed)
        if isinstance(body, bytes):
            return hash_segment(body, txid=txid, sha256=sealed.sha256, name=name)
        with self._files.reader(body) as file:
            return hash_segment(file.read, txid=txid, sha256=sealed.sha256, name=name)

    def _replica_page_size(self) -> int | None:
        """That of the newest segment; None if there is none, or it is not in level 0."""
        state = self.state
        if state.segments:
            body = self.body(state.segments[-1])
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

    # -- looking at all pages -----------------------------------------------------------------

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
        with self.mutex:
            after = self._settled_after_copy(page_size, batch.commit)
            if after is None:
                return None
            if not same:
                self._spool.record(self._unproven(), drop_pieces=True)
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
            with self.mutex:  # with it no gate lets the WAL be restarted
                header = self._wal.header()
                base = replace(
                    self._unproven(),
                    copying=True,
                    page_size=0,
                    wal_gone=header is None,
                    # The position counts once all pages are shipped or found equal, not before.
                    resync=self.full_copy_reason or "a comparison of all pages did not end",
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
                        commit=frame.commit,
                        page_size=header.page_size,
                    )
                if is_still is not None and (self._is_restarting(header) or not is_still()):
                    return False
                self._spool.record(base, durable=False, drop_pieces=True)
                self._unrecorded = None
                started.append((base, salts))
                return True

        with self._port.read_view(observe) as view:
            if view is None or not started:
                yield None
                return
            base, salts = started[0]
            page_size, commit = base.page_size, base.commit
            if not commit:
                page_size, commit = _size_of_main(
                    view.read_main, self._files.stat(self.path).st_size
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

    def _is_restarting(self, header: WalHeader | None) -> bool:
        """Whether somebody is past the gate whose new WAL header is not on disk yet."""
        return self._let_in is not None and (header is None or header.salts != self._let_in)

    def _settled_after_copy(self, page_size: int, commit: int) -> State | None:
        """The state after all pages were read; None if continuity was lost again meanwhile."""
        now = self.state
        if not now.copying or self._unrecorded is not None:
            return None
        self._wal.sync()  # nothing may be in the replica that a power cut here can take back
        now = replace(now, copying=False, page_size=page_size, resync="", suspect=False)
        if not now.commit:
            now = replace(now, commit=commit)
        if now.wal_gone:
            now = replace(now, fingerprint=self._settled_fingerprint())
        return now

    def _after(self, batch: Batch) -> State:
        state = self.state
        assert state.position is not None
        position = WalPosition(state.position.salts, batch.last, batch.checksum)
        return replace(
            state, position=position, previous=None, fingerprint=None, commit=batch.commit
        )

    def _new_frames(self, *, limit: bool) -> tuple[Batch, int] | None:
        """Committed frames behind the position, by the race-free recipe; None if there are none."""
        state = self.state
        self._rest = None
        header = self._wal.header()
        position = self._locate(header)
        if self._is_rightly_gone(header) or (header is None and state.copying):
            return None
        if position is None:
            self._lose(_PAST_THE_GATE)
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

    # -- encoding -----------------------------------------------------------------------------

    def _seal_piece(
        self,
        batch: Batch,
        after: State,
        page_size: int,
        read_main: Callable[[int, int], bytes],
    ) -> None:
        """Seal a batch without a TXID.  Its header carries the one it gets if it is sent alone."""
        txid = max(2, after.txid + 1 + len(self.state.pieces))
        header = self._header_after(batch, after, txid, page_size)
        sink = SegmentSink(self._spool, hashed=True)
        try:
            self._encode(batch, header, sink, read_main)
            body = sink.finish()
            sealed = replace(_describe(header, sink), txid=0, header_txid=txid)
            after = replace(after, timestamp_ms=header.timestamp_ms)
            self._spool.add_piece(after, sealed, body)
            self.wal_bytes += header.wal_size
        except BaseException:
            sink.abandon()
            raise

    def _freeze(self, batch: Batch, after: State, page_size: int) -> Sealed:
        header = self._header_after(batch, after, after.txid + 1, page_size)
        sink = SegmentSink(self._spool, hashed=True)
        try:
            self._encode(batch, header, sink, self._port.read_main)
            body = sink.finish()
            after = _frozen(after, header, sink)
            segment = self._spool.add_segment(after, _describe(header, sink), body)
            self.wal_bytes += header.wal_size
            return segment
        except BaseException:
            sink.abandon()
            raise

    def _freeze_pieces(self) -> Sealed | None:
        """Freeze the oldest pieces: a large one as it is, small ones merged.

        The mutex is free during the merge.
        """
        with self.mutex:
            state = self.state
            chosen = state.pieces[:1]
            if chosen[0].size_bytes >= _SOLO_BYTES:
                if chosen[0].header_txid == state.txid + 1 and chosen[0].file is not None:
                    self.more = len(state.pieces) > 1
                    return self._promote(chosen[0])
            else:
                small = itertools.takewhile(lambda p: p.size_bytes < _SOLO_BYTES, state.pieces)
                chosen = tuple(small)
            rest = len(state.pieces) - len(chosen)
            self.more = rest > 0
            # Coordinates that another reader may trust exist for the newest piece only.
            position = None if rest else state.position
            header = self._ltx_header(state.txid + 1, state.page_size, state.commit, NO_SALTS)
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
            with self.mutex:
                now = self.state
                if now.pieces[: len(chosen)] != chosen:
                    sink.abandon()  # continuity was lost meanwhile
                    return None
                after = _frozen(now, header, sink)
                keep = len(now.pieces) - len(chosen)
                return self._spool.add_segment(after, _describe(header, sink), body, keep=keep)
        except BaseException:
            sink.abandon()
            raise

    def _promote(self, piece: Sealed) -> Sealed:
        """Freeze a piece as it is: its header already carries the TXID."""
        assert piece.file is not None
        now = self.state
        after = replace(now, txid=piece.header_txid, sha256=piece.sha256)
        sealed = replace(piece, txid=piece.header_txid)
        return self._spool.add_segment(after, sealed, piece.file, keep=len(now.pieces) - 1)

    @contextlib.contextmanager
    def _inputs(self, pieces: Sequence[Sealed]) -> Iterator[list[MergeInput]]:
        """Pieces as inputs of a merge, oldest first."""
        with contextlib.ExitStack() as files:
            inputs: list[MergeInput] = []
            with self.mutex:
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
        header = self._ltx_header(txid, page_size, batch.commit, salts)
        if position is None or not position.frame:
            return header  # nothing of the generation that comes next has been read
        return replace(
            header,
            wal_offset=frame_offset(batch.first, page_size),
            wal_size=(batch.last - batch.first + 1) * (FRAME_HEADER_SIZE + page_size),
        )

    def _ltx_header(self, txid: int, page_size: int, commit: int, salts: WalSalts) -> Header:
        """A header at WAL offset 32: a reader that takes over may trust it, and no more than it."""
        # Times must not run backwards along the TXIDs, whatever the wall clock does.
        timestamp_ms = max(self._clock.now_ms(), self.state.timestamp_ms)
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

    def _encode(
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

    def close(self) -> None:
        """Close the descriptors on the WAL.  The spool and the port belong to the engine."""
        with self.mutex:
            self._wal.close()
        with self._note_lock:
            self._note_wal.close()


def _frozen(state: State, header: Header, sink: SegmentSink) -> State:
    """The state after a segment with this header."""
    return replace(
        state,
        txid=header.max_txid,
        sha256=sink.sha256,
        timestamp_ms=max(header.timestamp_ms, state.timestamp_ms),
    )


def _describe(header: Header, sink: SegmentSink) -> Sealed:
    return Sealed(
        txid=header.max_txid,
        size_bytes=sink.size_bytes,
        sha256=sink.sha256,
        timestamp_ms=header.timestamp_ms,
    )


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


def page_size_changed(path: str, page_size: int, replica_page_size: int) -> ContinuityError:
    """The error for a database that cannot become a replica's next state."""
    return ContinuityError(
        f"{path} has pages of {page_size} bytes, its replica of {replica_page_size}, and a replica "
        "cannot change its page size: replicate to a new path, or go back with PRAGMA "
        f"page_size={replica_page_size} and VACUUM outside WAL mode"
    )


def _size_of_main(read: Callable[[int, int], bytes], size: int) -> tuple[int, int]:
    """``(page size, pages)`` from the main file's header; pages 0 while there is nothing."""
    if size < 512:
        return 0, 0
    header = read(0, 512)
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    if not is_page_size(page_size):
        return 0, 0
    return page_size, size // page_size
