"""What the record says about the WAL and the main file, and whether it still holds.

The spool's state names the place in the WAL up to which everything is sealed, and what the main
file looked like when there was no WAL.  `Record` compares it with the files: at the start
(`Record.prove`), and each time frames are to be read (`Record.locate`).  Once it does not hold,
continuity is lost, and only a comparison of all pages brings it back (`replica.resync`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .clock import Clock
from .errors import ContinuityError
from .format.types import WalSalts, format_txid, is_page_size
from .format.wal import WalHeader
from .frames import WalReader
from .spool import DrainMutex, Fingerprint, Sealed, Spool, State, WalPosition
from .sqlite import SpoolError, SqlitePort

__all__ = ["Record", "TailLost", "page_size_changed", "size_of_main"]

log = logging.getLogger("walship.capture")

#: A file changed less than this long ago may change again without a visible sign: the kernel's
#: timestamps advance in ticks of up to 10 ms.
_SETTLE_NS: Final = 20_000_000


class TailLost(Exception):
    """The WAL on disk ends before what was sealed from it: a power cut or somebody cut it."""


class Record:
    """The record of one database beside its files.  Its methods may be called by any thread.

    Methods without a word about it take the mutex where they need it; `lose`, `discontinue`,
    `record_loss`, `locate`, `is_rightly_gone` and `is_restarting` want it held.

    Args:
        path: absolute path of the main database file.
        spool: open spool of this database; touched only under `mutex`.
        port: plain connections to the database.

    Attributes:
        mutex: the drain mutex.  Guards the spool, the WAL's descriptor and what is sealed.
        wal: reads the WAL; under the mutex.
        let_in: salts of the generation that this process let through the gate last, while its WAL
            is there.
        released: salts of a generation, all of which is sealed, that may be followed by another one
            without passing the gate, once.
        unrecorded: why history is not continuous, if even that could not be recorded (disk full):
            the next start then finds a WAL that the record does not name.
    """

    def __init__(self, path: str, spool: Spool, port: SqlitePort, clock: Clock) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.spool = spool
        self.port = port
        self.clock = clock
        self.files = spool.files
        self.mutex = DrainMutex(spool)
        self.wal = WalReader(path + "-wal", self.files)
        self.let_in: WalSalts | None = None
        self.released: WalSalts | None = None
        self.unrecorded: str | None = None

    @property
    def state(self) -> State:
        """The spool's state; immutable."""
        return self.spool.state

    @property
    def full_copy_reason(self) -> str | None:
        """Why only `resync` can come next; None while the history is continuous."""
        return self.unrecorded or self.spool.state.resync or None

    @property
    def awaits_copy(self) -> bool:
        """Nothing need be sealed: a full copy will read whatever is there when it begins."""
        state = self.spool.state
        return self.unrecorded is not None or bool(state.resync and not state.copying)

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
            self.unrecorded = reason
            with contextlib.suppress(SpoolError):
                state = replace(self.state.unproven(), resync=reason, suspect=suspect)
                self.spool.record(state, durable=False, drop_pieces=True)
                self.unrecorded = None

    def _prove(self) -> tuple[str, bool] | None:
        """None, or why history is not continuous and whether commits may have been lost."""
        state = self.state
        if state.set_aside:
            raise TailLost("its files were being replaced from the replica")
        if state.resync:
            return state.resync, state.suspect
        unchanged = self.is_unchanged()
        header = self.wal.header()
        if header is None:
            if unchanged:
                if not state.wal_gone:
                    self.spool.record(replace(state, wal_gone=True), durable=False)
                return None
            # Whoever checkpointed the WAL wrote to the main file since we sealed what is in it.
            written = 0 < state.written_ns < self.written_ns()
            suspect = state.position is not None and state.position.frame > 0 and not written
            return "the database file was changed while walship was away", suspect
        for candidate in (state.position, state.previous):
            if candidate is None or candidate.salts != header.salts:
                continue
            if not self._intact(candidate, header):
                raise TailLost("the WAL ends before what was already replicated from it")
            if candidate != state.position:
                self.spool.record(replace(state, position=candidate, previous=None, wal_gone=False))
            return None
        if unchanged:
            # All that happened since the clean close is in this WAL, from its first frame on.
            position = WalPosition(header.salts, 0, header.checksum)
            self.spool.record(replace(state, position=position, previous=None, wal_gone=False))
            return None
        return "the WAL was restarted or replaced while walship was away", False

    def _intact(self, position: WalPosition, header: WalHeader) -> bool:
        if position.frame == 0:
            return position.checksum == header.checksum
        frame = self.wal.frame(position.frame, header.page_size)
        return (
            frame is not None
            and frame.salts == position.salts
            and frame.checksum == position.checksum
        )

    def main_holds(self, pgno: int, page: bytes, page_size: int) -> bool:
        """Whether a page of the main file, as it is now, has this content."""
        return self.port.read_main((pgno - 1) * page_size, page_size) == page

    def scratch_path(self, purpose: str) -> Path:
        """A name for a large temporary file beside the spool; removed at the next start."""
        return self.spool.directory / f"{purpose}.tmp"

    def page_size(self) -> int | None:
        """Of the database as it is now, in bytes; None while it has no page."""
        with self.mutex:
            header = self.wal.header()
        if header is not None:
            return header.page_size
        fingerprint = self.fingerprint()
        size = fingerprint.size if fingerprint is not None else 0
        return size_of_main(self.port.read_main, size)[0] or None

    def has_content(self) -> bool:
        """Whether the main file holds any page at all."""
        fingerprint = self.fingerprint()
        return fingerprint is not None and fingerprint.size > 0

    def body(self, sealed: Sealed) -> bytes | Path:
        """The frozen bytes of a segment: in memory, or the file that holds them."""
        with self.mutex:
            return self.spool.read(sealed)

    def begin(self, state: State) -> None:
        """Record a new lineage and its TXID; what was frozen for another history is dropped."""
        with self.mutex:
            self.spool.record(state, drop_segments=True)

    def amend(self, *, durable: bool = False, **changes: Any) -> None:
        """Record other values of some scalar fields of the state."""
        with self.mutex:
            self.spool.record(replace(self.state, **changes), durable=durable)

    def is_untouched(self) -> bool:
        """Whether the main file is what the record says, and there is no WAL."""
        state = self.state
        return (
            state.fingerprint is not None
            and state.fingerprint == self.fingerprint()
            and self.wal.header() is None
        )

    def restored(self, txid: int, sha256: str, page_size: int, commit: int) -> None:
        """Record that the main file holds the replica's state at a TXID, and there is no WAL.

        Args:
            sha256: of the replica's segment that ends there, hex; empty if it is not known.
        """
        with self.mutex:
            after = replace(
                self.state.unproven(),
                txid=txid,
                acked_txid=txid,
                restored_txid=txid,
                sha256=sha256,
                page_size=page_size,
                commit=commit,
                wal_gone=True,
                resync="",
                fingerprint=self.settled_fingerprint(),
            )
            self.spool.record(after, drop_pieces=True, drop_segments=True)

    def refresh(self, *, wait: bool = True) -> State:
        """The state, with what other processes have recorded until now.

        Args:
            wait: False leaves it as it is known here while somebody else is sealing.
        """
        if self.mutex.acquire(blocking=wait):
            self.mutex.release()
        return self.state

    def require_full_copy(self, reason: str) -> None:
        """Give up continuity: the next segment will come from `resync`.  Says so in the log."""
        with self.mutex:
            self.lose(reason)

    def go_on_behind(self, txid: int, sha256: str, timestamp_ms: int) -> None:
        """The replica's next segment is somebody else's: let go of what was frozen here instead.

        What comes next is found by comparing all pages with the state that it has made (`resync`),
        and so takes everything back of which it says something else.

        Args:
            txid: of that segment; all before it are in the replica.
            sha256: of that segment, hex.
            timestamp_ms: the time in it, ms since the epoch.

        Raises:
            SpoolError: that cannot be recorded; nothing has changed.
        """
        reason = f"a former writer's upload came late, as txid {format_txid(txid)}"
        with self.mutex:
            after = replace(
                self.state.unproven(),
                txid=txid,
                acked_txid=txid,
                sha256=sha256,
                timestamp_ms=max(timestamp_ms, self.state.timestamp_ms),
                resync=reason,
            )
            self.spool.record(after, drop_pieces=True, drop_segments=True)
            self.unrecorded = None
        log.warning("%s: %s; all pages will be compared", self.name, reason)

    def let_go(self, reason: str) -> None:
        """As `require_full_copy`, and says nothing: that copy is not to be expected soon."""
        with self.mutex:
            if self.full_copy_reason is None:
                self.discontinue(reason)

    def lose(self, reason: str) -> None:
        if self.full_copy_reason is None:
            log.warning("%s: %s; all pages will be compared", self.name, reason)
        self.discontinue(reason)

    def discontinue(self, reason: str) -> None:
        self.unrecorded = reason
        self.record_loss()

    def record_loss(self) -> None:
        """Record that continuity is lost, if it is not recorded yet."""
        if self.unrecorded is None:
            return
        try:
            state = replace(self.state.unproven(), resync=self.unrecorded)
            self.spool.record(state, drop_pieces=True)
            self.unrecorded = None
        except SpoolError:
            # The record still says what does not hold any more.  The file's times will tell, once
            # they are on the disk: SQLite's syncs leave them out.
            fd = self.port.descriptor()
            if fd is not None:
                with contextlib.suppress(OSError):
                    self.files.sync_all(fd)

    def locate(self, header: WalHeader | None) -> WalPosition | None:
        """Our position in the WAL on disk: the present one, or the one before the last gate.

        None if it is not ours, because it began, or went, without passing the gate; also if there
        is no WAL, rightly.
        """
        state = self.state
        # A gate that it went through meanwhile may have recorded that it is gone.
        last = state.previous if state.wal_gone else state.position
        if self.released is not None and last is not None and last.salts == self.released:
            if header is None and not state.wal_gone:
                return last  # cut off; what follows it is not written yet
            if header is not None and header.salts != self.released:
                return self._follow(header, last)
        if header is None:
            # Not written yet?  Then the main file is what it was when the WAL before it went.
            is_coming = state.position is not None and state.position.frame == 0
            return state.position if is_coming and self.is_unchanged() else None
        known = (state.previous,) if state.wal_gone else (state.position, state.previous)
        for candidate in known:
            if candidate is not None and candidate.salts == header.salts:
                return candidate
        return None

    def _follow(self, header: WalHeader, last: WalPosition) -> WalPosition:
        """Go on in the generation that has followed the one that was released."""
        position = WalPosition(header.salts, 0, header.checksum)
        self.spool.record(
            replace(self.state, position=position, previous=last, fingerprint=None, wal_gone=False)
        )
        self.let_in, self.released = header.salts, None
        return position

    def is_rightly_gone(self, header: WalHeader | None) -> bool:
        """Whether there is no WAL, and nobody has written to the main file since it went."""
        state = self.state
        return header is None and state.wal_gone and (state.copying or self.is_unchanged())

    def is_unchanged(self) -> bool:
        """Whether the main file is what it was when there was no WAL last."""
        fingerprint = self.state.fingerprint
        return fingerprint is not None and fingerprint == self.fingerprint()

    def is_restarting(self, header: WalHeader | None) -> bool:
        """Whether somebody is past the gate whose new WAL header is not on disk yet."""
        return self.let_in is not None and (header is None or header.salts != self.let_in)

    def fingerprint(self) -> Fingerprint | None:
        try:
            return Fingerprint.of(self.path, self.files)
        except FileNotFoundError:
            return None

    def written_ns(self) -> int:
        """When the main file was written to last, ns since the epoch; 0 without one."""
        fingerprint = self.fingerprint()
        return 0 if fingerprint is None else fingerprint.mtime_ns

    def settled_fingerprint(self) -> Fingerprint | None:
        """The main file's identity, once it is old enough to prove anything.

        Nobody else can write now: the caller's thread holds SQLite's locks.
        """
        while True:
            fingerprint = self.fingerprint()
            if fingerprint is None:
                return None
            changed = max(fingerprint.mtime_ns, fingerprint.ctime_ns)
            age_ns = self.clock.now_ms() * 1_000_000 - changed
            if not 0 <= age_ns < _SETTLE_NS:
                return fingerprint
            self.clock.sleep((_SETTLE_NS - age_ns) / 1e9)


def page_size_changed(path: str, page_size: int, replica_page_size: int) -> ContinuityError:
    """The error for a database that cannot become a replica's next state."""
    return ContinuityError(
        f"{path} has pages of {page_size} bytes, its replica of {replica_page_size}, and a replica "
        "cannot change its page size: replicate to a new path, or go back with PRAGMA "
        f"page_size={replica_page_size} and VACUUM outside WAL mode"
    )


def size_of_main(read: Callable[[int, int], bytes], size: int) -> tuple[int, int]:
    """``(page size, pages)`` from the main file's header; pages 0 while there is nothing."""
    if size < 512:
        return 0, 0
    header = read(0, 512)
    page_size = int.from_bytes(header[16:18], "big")
    page_size = 65536 if page_size == 1 else page_size
    if not is_page_size(page_size):
        return 0, 0
    return page_size, size // page_size
