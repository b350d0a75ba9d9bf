"""The spool: what is sealed but not yet known to be in the replica, and the position.

One append-only journal per database, in ``.<database name>-walship/`` beside it (mode 0700)::

    lock       record locks of the processes that use the database (`election`)
    journal    the records below, one after the other; zeros behind the last
    <n>.ltx    sealed segments too large for the journal; named by a record before they count

A record is ``magic, type, length of the JSON part, length of the payload, xxh3_64`` (24 bytes, big
endian) followed by both parts.  The checksum covers all of it, so a torn tail is recognised and
cut off.  One append and one ``fdatasync`` make a gate or a segment durable, where a file with
rename and directory sync takes three: that is what the application's thread pays at the gate.

What the records say, applied in order, is the `State`: the position in the WAL, the pieces that a
gate had to seal (no TXID yet), and the segments whose bytes are frozen because they may have been
sent.  The same function applies a record when it is written and when it is read back.

Any number of processes write the journal in turn: whoever wants to takes the drain lock, applies
what others have appended since, and appends.  A record that is whole counts, whatever became of the
process that wrote it.

Nothing here knows SQLite or the store.  The spool is not thread-safe: its owner serialises (see
`DrainMutex`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from .clock import Clock
from .config.settings import state_name
from .election import Locks
from .errors import FormatError
from .files import OS_FILES, Files
from .format.types import WalSalts
from .sqlite import SpoolError

__all__ = [
    "DrainMutex",
    "Fingerprint",
    "Sealed",
    "SegmentSink",
    "Spool",
    "State",
    "WalPosition",
    "read_state",
    "state_directory",
]

log = logging.getLogger("walship.spool")

_RECORD: Final = struct.Struct(">4sB3xIIQ")
_MAGIC: Final = b"WSJ1"
#: Payloads up to this many bytes go into the journal itself, larger ones into a file of their own.
INLINE_BYTES: Final = 256 * 1024
#: The journal grows in steps of this many bytes, so that most appends change no file size and
#: fdatasync has no metadata to write (measured: 110 us against 190 us).
_GROWTH_BYTES: Final = 1024 * 1024
#: Rewrite the journal once dead bytes exceed this and what is alive.
_REWRITE_BYTES: Final = 4 * 1024 * 1024


#: How long to wait for the drain lock, in seconds, and the pauses between attempts.  It is held for
#: as long as sealing takes: seconds for a transaction of a gigabyte.
_LOCK_WAIT_S: Final = 120.0
_LOCK_PAUSE_FIRST_S: Final = 0.000_05
_LOCK_PAUSE_LONGEST_S: Final = 0.005


#: Why a database needs a full copy that never had one.
NEVER_COPIED: Final = "there is no record of what was replicated"


class WalPosition(NamedTuple):
    """A place in a WAL: everything up to and including ``frame`` is sealed.

    ``frame`` counts from 1; 0 means that nothing of this generation has been sealed.  ``checksum``
    is SQLite's running checksum stored in that frame (in the WAL header for frame 0).
    """

    salts: WalSalts
    frame: int
    checksum: tuple[int, int]

    def to_json(self) -> list[int]:
        return [*self.salts, self.frame, *self.checksum]

    @classmethod
    def from_json(cls, value: Sequence[int]) -> WalPosition:
        salt1, salt2, frame, checksum1, checksum2 = value
        return cls(WalSalts(salt1, salt2), frame, (checksum1, checksum2))


class Fingerprint(NamedTuple):
    """Identity of a cleanly closed main file: equal means that nobody wrote to it since."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str], files: Files = OS_FILES) -> Fingerprint:
        status = files.stat(path)
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """LTX bytes in the spool: a piece (``txid`` 0) or a frozen segment.

    Attributes:
        txid: TXID of a segment; 0 for a piece that has none yet.
        size_bytes: length of the LTX bytes.
        sha256: of the LTX bytes, hex; empty for a merged piece.
        header_txid: the TXID in a piece's own LTX header: it may be frozen as it is under this one.
        file: name in the state directory, or None if the bytes are in the journal.
        offset: where in the journal they are.
        timestamp_ms: the segment's timestamp, ms since the epoch.
        previous: sha256 of the segment with the TXID before, hex; empty if that is not known.
    """

    txid: int
    size_bytes: int
    sha256: str = ""
    file: str | None = None
    offset: int = 0
    timestamp_ms: int = 0
    header_txid: int = 0
    previous: str = ""

    def to_json(self, file: str | None) -> dict[str, Any]:
        return {
            "txid": self.txid,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "timestamp_ms": self.timestamp_ms,
            "header_txid": self.header_txid,
            "previous": self.previous,
            "file": file,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything the journal knows, as of its last record.

    Attributes:
        lineage: random id of this replica's history, hex; empty before the first segment.
        replica: the replica this state belongs to, as its URL without secrets.
        txid: highest TXID frozen here or found in the replica as ours; 0 for none.
        sha256: of the segment with that TXID, hex; empty if it is not known.
        acked_txid: highest TXID known to be in the replica.
        restored_txid: the one that a restore has made the main file from; 0 without.
        full_txid: of the newest full copy; nothing older is needed to restore that.  0 without.
        position: up to where the WAL is sealed; None: only a full copy can come next.
        written_ns: when the main file was written to last before the frame there was sealed, ns
            since the epoch; 0 if that is not known.
        previous: where the WAL was drained when the last gate let it go, until the new one shows.
        commit: size of the database in pages at the position; 0 if unknown.
        page_size: bytes; 0 if unknown.
        fingerprint: of the main file while there is no WAL, or None.
        wal_gone: everything is in the main file and sealed; what is in the WAL, if anything, does
            not matter.
        copying: a full copy was begun at the position and is not a segment yet.
        resync: why history is not continuous, so that only a comparison of all pages, or a full
            copy, can come next; empty while it is.
        suspect: the WAL vanished without a clean close: its commits may be lost.
        set_aside: the database's files are being replaced from the replica, because they lost what
            was sealed; name of what the found ones become.  Empty otherwise.
        timestamp_ms: the newest one given to a segment or piece, ms since the epoch.
        nonces: of the leases that this state directory may hold in the replica (`fence`).
        fence_tested: URL of the replica whose conditional writes were seen to work; or empty.
        destination: URL of the replica that the processes which have the database open ship it to,
            whether they have reached it yet or not.
        refusal: why no process may commit any more: class name and message; or empty.
        admitted: connections may use the files: they are not going to be changed under them.
        adopt: somebody decided that this database becomes the replica's next state, whatever the
            replica holds now.
        pieces: sealed by a gate and not in a segment yet, oldest first.
        segments: frozen and not acknowledged yet, ascending TXIDs.
    """

    lineage: str = ""
    replica: str = ""
    txid: int = 0
    sha256: str = ""
    acked_txid: int = 0
    restored_txid: int = 0
    full_txid: int = 0
    position: WalPosition | None = None
    written_ns: int = 0
    previous: WalPosition | None = None
    commit: int = 0
    page_size: int = 0
    fingerprint: Fingerprint | None = None
    wal_gone: bool = False
    copying: bool = False
    resync: str = NEVER_COPIED
    suspect: bool = False
    set_aside: str = ""
    timestamp_ms: int = 0
    nonces: tuple[str, ...] = ()
    fence_tested: str = ""
    destination: str = ""
    refusal: tuple[str, ...] = ()
    admitted: bool = True
    adopt: bool = False
    pieces: tuple[Sealed, ...] = ()
    segments: tuple[Sealed, ...] = ()

    @property
    def files(self) -> set[str]:
        """Names of the files that hold large pieces and segments."""
        return {s.file for s in (*self.pieces, *self.segments) if s.file is not None}

    def unproven(self) -> State:
        """The state without all that speaks of the files as they were."""
        return replace(
            self,
            position=None,
            previous=None,
            fingerprint=None,
            wal_gone=False,
            copying=False,
            commit=0,
        )

    @property
    def pending_bytes(self) -> int:
        """Bytes sealed here that are not known to be in the replica."""
        return sum(s.size_bytes for s in self.pieces) + sum(s.size_bytes for s in self.segments)


class _Kind(IntEnum):
    """What a record does to the state."""

    STATE = 1  # replaces the scalar fields
    PIECE = 2  # adds a piece and moves the position
    SEGMENT = 3  # freezes a segment; the pieces before it are in it
    ACK = 4  # the replica has this TXID


def state_directory(path: str | os.PathLike[str], meta_path: str | None = None) -> Path:
    """Where the state of the database at ``path`` lives."""
    if meta_path:
        return Path(meta_path)
    directory, name = os.path.split(os.fspath(path))
    return Path(directory, state_name(name))


def _scalars(state: State) -> dict[str, Any]:
    return {
        "lineage": state.lineage,
        "replica": state.replica,
        "txid": state.txid,
        "sha256": state.sha256,
        "acked_txid": state.acked_txid,
        "restored_txid": state.restored_txid,
        "full_txid": state.full_txid,
        "position": state.position and state.position.to_json(),
        "written_ns": state.written_ns,
        "previous": state.previous and state.previous.to_json(),
        "commit": state.commit,
        "page_size": state.page_size,
        "fingerprint": state.fingerprint and list(state.fingerprint),
        "wal_gone": state.wal_gone,
        "copying": state.copying,
        "resync": state.resync,
        "suspect": state.suspect,
        "set_aside": state.set_aside,
        "timestamp_ms": state.timestamp_ms,
        "nonces": list(state.nonces),
        "fence_tested": state.fence_tested,
        "destination": state.destination,
        "refusal": list(state.refusal),
        "admitted": state.admitted,
        "adopt": state.adopt,
    }


def _state_of(
    meta: dict[str, Any], pieces: tuple[Sealed, ...], segments: tuple[Sealed, ...]
) -> State:
    position, previous, fingerprint = meta["position"], meta["previous"], meta["fingerprint"]
    return State(
        lineage=meta["lineage"],
        replica=meta["replica"],
        txid=meta["txid"],
        sha256=meta["sha256"],
        acked_txid=meta["acked_txid"],
        restored_txid=meta.get("restored_txid", 0),
        full_txid=meta.get("full_txid", 0),
        position=WalPosition.from_json(position) if position else None,
        written_ns=meta.get("written_ns", 0),
        previous=WalPosition.from_json(previous) if previous else None,
        commit=meta["commit"],
        page_size=meta["page_size"],
        fingerprint=Fingerprint(*fingerprint) if fingerprint else None,
        # The first journals had no more than position and fingerprint to tell these from.
        wal_gone=meta.get("wal_gone", fingerprint is not None and position is None),
        copying=meta["copying"],
        resync=meta.get("resync", "" if position or fingerprint else NEVER_COPIED),
        suspect=meta.get("suspect", False),
        set_aside=meta.get("set_aside", ""),
        timestamp_ms=meta.get("timestamp_ms", 0),
        nonces=tuple(meta.get("nonces", ())),
        fence_tested=meta.get("fence_tested", ""),
        destination=meta.get("destination", ""),
        refusal=tuple(meta.get("refusal", ())),
        admitted=meta.get("admitted", True),
        adopt=meta.get("adopt", False),
        pieces=pieces,
        segments=segments,
    )


def _apply(state: State, kind: int, meta: dict[str, Any], offset: int, length: int) -> State:
    """The state after one record; ``offset`` and ``length`` say where its payload lies."""
    pieces, segments = state.pieces, state.segments
    if kind == _Kind.STATE:
        pieces = () if meta.get("drop_pieces") else pieces
        segments = () if meta.get("drop_segments") else segments
        return _state_of(meta, pieces, segments)
    if kind == _Kind.ACK:
        txid = meta["txid"]
        left = tuple(s for s in segments if s.txid > txid)
        return replace(state, acked_txid=max(txid, state.acked_txid), segments=left)
    sealed = Sealed(**meta["seal"], offset=0 if meta["seal"]["file"] else offset)
    if sealed.file is None and length != sealed.size_bytes:
        raise FormatError("spool journal: a payload has the wrong length")
    if kind == _Kind.PIECE:
        start = meta.get("start", len(pieces))
        end = start + meta.get("count", 0)
        return _state_of(meta, (*pieces[:start], sealed, *pieces[end:]), segments)
    if kind == _Kind.SEGMENT:
        # `keep` pieces were sealed after the mark that a long first copy was taken under.
        keep = meta.get("keep", 0)
        return _state_of(meta, pieces[len(pieces) - keep :] if keep else (), (*segments, sealed))
    raise FormatError(f"spool journal: unknown record type {kind}")


@dataclass(slots=True)
class _Journal:
    """An open journal file, which one it is, where its next record goes, and its length."""

    fd: int
    identity: tuple[int, int]
    end: int
    size: int


class Spool:
    """The journal of one database.

    Raises from every writing method:
        SpoolError: disk full, I/O error.  What was durable before still is, and the state in memory
            is what the journal says.
    """

    def __init__(self, directory: Path, files: Files, clock: Clock, locks: Locks) -> None:
        self.directory = directory
        self._path = str(directory / "journal")
        self.files = files
        #: The locks of this process on the directory.
        self.locks = locks
        #: No other process had the database open when this one came; until `admit`.
        self.alone = False
        #: Sealed bytes from which on the spool counts as full; 0 for no limit.
        self.max_bytes = 0
        self._clock = clock
        self._depth = 0
        self._state = State()
        self._journal: _Journal | None = None
        self._next_file = 1

    @classmethod
    def open(cls, directory: Path, clock: Clock, files: Files | None = None) -> Spool:
        """Open the state directory (made if missing) and read the journal back.

        Waits for as long as another process is about it, be it to restore the database.  The drain
        lock is held when this returns; `admit` or `close` end that.

        Raises:
            InUseError: this process has it open already.
            SpoolError: the directory or journal cannot be written.
        """
        files = files or OS_FILES
        with _local_errors(directory):
            files.make_directory(directory)
            spool = cls(directory, files, clock, Locks(files, directory))
        try:
            spool._wait_for_lock(None)
            with _local_errors(directory):
                spool.alone = spool.locks.is_alone()
                spool._load()
        except BaseException:
            spool.close()
            raise
        return spool

    def admit(self) -> None:
        """What only a process that is alone may do is done: let others in."""
        self.alone = False
        with _local_errors(self.directory):
            self.locks.attend()
        self.unlock()

    def leave(self) -> bool:
        """This process is done with the database; call it locked.

        Returns:
            Whether no other has it open: then this one still counts as present, for whatever is
            left to do.  Of several that leave at once exactly one learns that it is the last.
        """
        if self.locks.is_alone():
            self.locks.attend()
            return True
        self.locks.be_absent()
        return False

    # -- the drain lock -----------------------------------------------------------------------

    def lock(self, *, wait: bool = True) -> bool:
        """Take the drain lock and apply what other processes have recorded.  May be nested.

        Returns:
            False without it, if ``wait`` is false.

        Raises:
            SpoolError: the journal is gone, or another process holds the lock for minutes.
        """
        if self._depth == 0 and self._journal is not None:
            with _local_errors(self.directory):
                if not self.locks.try_drain():
                    if not wait:
                        return False
                    self._wait_for_lock(_LOCK_WAIT_S)
                    self._depth = 0
                try:
                    self._refresh()
                except BaseException:
                    self.locks.end_drain()
                    raise
        self._depth += 1
        return True

    def unlock(self) -> None:
        """Give the drain lock back."""
        self._depth -= 1
        if self._depth == 0 and self._journal is not None:
            self.locks.end_drain()

    def _wait_for_lock(self, limit_s: float | None) -> None:
        pause, began, told = _LOCK_PAUSE_FIRST_S, self._clock.monotonic(), False
        while not self.locks.try_drain():
            waited = self._clock.monotonic() - began
            if limit_s is not None and waited > limit_s:
                raise SpoolError(
                    f"another process has held the spool in {self.directory} for {waited:.0f} s: "
                    "is one stopped or hanging?"
                )
            if limit_s is None and waited > 5 and not told:
                told = True
                log.info("%s: waiting for another process that opens it", self.directory)
            self._clock.sleep(pause)
            pause = min(2 * pause, _LOCK_PAUSE_LONGEST_S)
        self._depth = 1

    def _refresh(self) -> None:
        """Apply the records that other processes have appended."""
        journal = self._open_journal()
        try:
            status = self.files.stat(self._path)
        except FileNotFoundError as error:
            raise SpoolError(
                f"the spool in {self.directory} was removed while it was in use: close the "
                "database everywhere and open it again"
            ) from error
        if (status.st_dev, status.st_ino) != journal.identity:
            self.files.close(journal.fd)
            self._journal, self._state = None, State()
            self._read_journal()
            return
        before = journal.end
        for kind, meta, offset, length, end in _records(self.files, journal.fd, journal.end):
            self._state = _apply(self._state, kind, meta, offset, length)
            journal.end = end
        if journal.end != before:
            journal.size = max(journal.size, status.st_size)

    @property
    def state(self) -> State:
        """What the journal says; immutable, so any thread may keep it."""
        return self._state

    @property
    def is_full(self) -> bool:
        """Whether so much waits here that another piece is refused (max-spool-bytes)."""
        return 0 < self.max_bytes < self._state.pending_bytes

    # -- writing ------------------------------------------------------------------------------

    def record(
        self,
        state: State,
        *,
        durable: bool = True,
        drop_pieces: bool = False,
        drop_segments: bool = False,
    ) -> None:
        """Record the scalar fields of ``state`` (its pieces and segments are left as they are).

        Args:
            durable: whether it must survive a power cut before this returns.
            drop_pieces: forget the pieces: what comes next contains them.
            drop_segments: forget the frozen segments: they belong to another history.
        """
        meta = _scalars(state)
        meta["drop_pieces"] = drop_pieces
        meta["drop_segments"] = drop_segments
        self._append(_Kind.STATE, meta, (), durable)
        if drop_pieces or drop_segments:
            self.tidy()

    def add_piece(self, state: State, sealed: Sealed, body: Sequence[Any] | str) -> None:
        """Seal a piece: durable when this returns.

        Args:
            state: scalar fields after the piece, above all the position.
            sealed: size, sha256, timestamp and the TXID in its header; ``txid`` is 0.
            body: the LTX bytes as buffers, or the name of a file made with `create_file`.
        """
        if self.is_full:
            raise SpoolError(f"the spool in {self.directory} is full (max-spool-bytes)")
        self._seal(_Kind.PIECE, _scalars(state), sealed, body)

    def replace_pieces(
        self, start: int, count: int, body: Sequence[Any] | str, size_bytes: int
    ) -> None:
        """Put the merge of ``count`` pieces from index ``start`` on in their place.

        Also in a full spool: it takes less room than they do.
        """
        meta = _scalars(self._state)
        meta["start"], meta["count"] = start, count
        self._seal(_Kind.PIECE, meta, Sealed(txid=0, size_bytes=size_bytes), body)

    def add_segment(
        self, state: State, sealed: Sealed, body: Sequence[Any] | str, *, keep: int = 0
    ) -> Sealed:
        """Freeze a segment under its TXID: durable when this returns, so it may be sent.

        Args:
            state: scalar fields after the segment.
            sealed: txid, size, sha256 and timestamp; where the bytes lie and what they follow is
                filled in.
            keep: how many of the newest pieces are *not* in the segment.
        """
        meta = _scalars(state)
        meta["keep"] = keep
        sealed = replace(sealed, previous=self._state.sha256)
        self._seal(_Kind.SEGMENT, meta, sealed, body)
        return self._state.segments[-1]

    def acknowledge(self, txid: int) -> None:
        """The replica has every TXID up to ``txid``.  Not durable: bytes in the spool prove it."""
        done = [s for s in self._state.segments if s.txid <= txid]
        self._append(_Kind.ACK, {"txid": txid}, (), durable=False)
        for sealed in done:
            if sealed.file is not None:
                with contextlib.suppress(FileNotFoundError):
                    self.files.unlink(self.directory / sealed.file)
        self.tidy()

    def create_file(self) -> tuple[int, str]:
        """``(fd, name)`` of a new file for a large body; sync it before it is named in a record."""
        with _local_errors(self.directory):
            while True:
                name = f"{self._next_file:016x}.ltx"
                self._next_file += 1
                with contextlib.suppress(FileExistsError):
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                    return self.files.open(self.directory / name, flags), name

    def _seal(
        self, kind: _Kind, meta: dict[str, Any], sealed: Sealed, body: Sequence[Any] | str
    ) -> None:
        file: str | None = None
        pieces: Sequence[Any] = ()
        if isinstance(body, str):
            file = body
            with _local_errors(self.directory):
                self.files.sync_directory(self.directory)
        elif sealed.size_bytes > INLINE_BYTES:
            with _local_errors(self.directory):
                fd, file = self.create_file()
                try:
                    self.files.write(fd, body)
                    self.files.sync(fd)
                except BaseException:
                    self.files.unlink(self.directory / file)
                    raise
                finally:
                    self.files.close(fd)
                self.files.sync_directory(self.directory)
        else:
            pieces = body
        meta["seal"] = sealed.to_json(file)
        before = self._state.pieces
        self._append(kind, meta, pieces, durable=True)
        named = self._state.files
        for piece in before:
            if piece.file is not None and piece.file not in named:
                with contextlib.suppress(FileNotFoundError):
                    self.files.unlink(self.directory / piece.file)

    # -- reading ------------------------------------------------------------------------------

    def read(self, sealed: Sealed) -> bytes | Path:
        """The LTX bytes of a piece or segment: in memory, or the path of its file."""
        if sealed.txid:
            # The journal may have been rewritten since the caller got to know where the bytes lie.
            sealed = next((s for s in self._state.segments if s.txid == sealed.txid), sealed)
        if sealed.file is not None:
            return self.directory / sealed.file
        journal = self._open_journal()
        with _local_errors(self.directory):
            data = self.files.pread(journal.fd, sealed.size_bytes, sealed.offset)
        if len(data) != sealed.size_bytes:
            raise SpoolError(f"the spool journal in {self.directory} was cut off by somebody")
        return data

    # -- the journal --------------------------------------------------------------------------

    def _open_journal(self) -> _Journal:
        if self._journal is None:
            raise SpoolError(f"the spool in {self.directory} is closed")
        return self._journal

    def _append(
        self, kind: _Kind, meta: dict[str, Any], payload: Sequence[Any], durable: bool
    ) -> None:
        journal = self._open_journal()
        text = json.dumps(meta, separators=(",", ":")).encode()
        length = sum(len(part) for part in payload)
        header = pack_record_header(kind, text, payload, length)
        end = journal.end + _RECORD.size + len(text) + length
        with _local_errors(self.directory):
            if end + _RECORD.size > journal.size:
                grown = -(-(end + _RECORD.size) // _GROWTH_BYTES) * _GROWTH_BYTES
                self.files.allocate(journal.fd, journal.size, grown - journal.size)
                journal.size = grown
            try:
                self.files.write(journal.fd, [header, text, *payload], journal.end)
                if durable:
                    self.files.sync(journal.fd)
            except OSError:
                # Nobody may take it for a record that counts.
                with contextlib.suppress(OSError):
                    self.files.write(journal.fd, [bytes(_RECORD.size)], journal.end)
                raise
        self._state = _apply(self._state, kind, meta, end - length, length)
        journal.end = end

    def tidy(self) -> None:
        """Rewrite the journal when most of it is dead.  Takes a few milliseconds then."""
        journal = self._open_journal()
        alive = sum(
            s.size_bytes for s in (*self._state.pieces, *self._state.segments) if s.file is None
        )
        if journal.end > _REWRITE_BYTES + 2 * alive:
            self._rewrite()

    def _rewrite(self) -> None:
        """Write the present state as a new journal and put it in the old one's place."""
        old = self._journal
        state = self._state
        path = self._path
        temporary = self.directory / "journal.tmp"
        with _local_errors(self.directory):
            fd = self.files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                fresh = _Journal(fd, self._identity(fd), 0, 0)
                bodies = [
                    (sealed, () if sealed.file else (self.read(sealed),))
                    for sealed in (*state.pieces, *state.segments)
                ]
                self._journal, self._state = fresh, State()
                self._append(_Kind.STATE, _scalars(state), (), durable=False)
                for kind, group in ((_Kind.SEGMENT, state.segments), (_Kind.PIECE, state.pieces)):
                    for sealed, body in bodies:
                        if sealed not in group:
                            continue
                        meta = _scalars(state)
                        meta["seal"] = sealed.to_json(sealed.file)
                        self._append(kind, meta, body, durable=False)
                self.files.sync(fd)
                self.files.rename(temporary, path)
                self.files.sync_directory(self.directory)
            except BaseException:
                self._journal, self._state = old, state
                self.files.close(fd)
                raise
        if old is not None:
            self.files.close(old.fd)

    def _identity(self, fd: int) -> tuple[int, int]:
        status = self.files.fstat(fd)
        return status.st_dev, status.st_ino

    def _load(self) -> None:
        """Read the journal; a process that is alone also removes what others left half done."""
        if self.alone:
            self._remove(lambda name: name.endswith((".tmp", ".fifo")))
        self._read_journal()
        if self._journal is None:
            self._rewrite()
        if self.alone:
            named = self._state.files
            self._remove(lambda name: name.endswith(".ltx") and name not in named)

    def _remove(self, unwanted: Callable[[str], bool]) -> None:
        for name in self.files.names(self.directory):
            if unwanted(name):
                self.files.unlink(self.directory / name)

    def _read_journal(self) -> None:
        try:
            fd = self.files.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return
        status = self.files.fstat(fd)
        try:
            state, end = _replay(self.files, fd)
        except FormatError as error:
            self.files.close(fd)
            aside = self.directory / "journal.damaged"
            log.error("%s; it is kept as %s, and a resync is needed", error, aside)
            self.files.rename(self._path, aside)
            return
        self._state = state
        self._journal = _Journal(fd, self._identity(fd), end, status.st_size)
        if self.alone:
            self._clear_tail()

    def _clear_tail(self) -> None:
        """Cut a torn tail off, so that its bytes can never look like a record again."""
        journal = self._open_journal()
        if journal.size > journal.end:
            self.files.truncate(journal.fd, journal.end)
            self.files.sync(journal.fd)
            journal.size = journal.end

    def close(self) -> None:
        """Close the journal and release all locks.  Safe to call twice."""
        if self._journal is not None:
            self.files.close(self._journal.fd)
            self._journal = None
        self.locks.close()


class DrainMutex:
    """Guards a spool against other threads and, by its drain lock, other processes.  May be nested.

    Entering applies what other processes have recorded, and raises what `Spool.lock` does.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._lock = threading.RLock()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take it; False if it is taken, or the drain lock is, and ``blocking`` is false."""
        if not self._lock.acquire(blocking=blocking):
            return False
        try:
            if self._spool.lock(wait=blocking):
                return True
        except BaseException:
            self._lock.release()
            raise
        self._lock.release()
        return False

    def release(self) -> None:
        """Give it back."""
        try:
            self._spool.unlock()
        finally:
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SegmentSink:
    """Takes the LTX bytes of one segment: in memory while small, then in a file of the spool.

    Args:
        spool: owner of the file; only `Spool.create_file` is called.
        hashed: whether a sha256 is wanted (not for pieces that will be merged again).
    """

    def __init__(self, spool: Spool, *, hashed: bool) -> None:
        self._spool = spool
        self._digest = hashlib.sha256() if hashed else None
        self._parts: list[Any] = []
        self._fd = -1
        self.file: str | None = None
        self.size_bytes = 0

    def write(self, parts: Sequence[Any]) -> None:
        """Append buffers, which are copied."""
        # One buffer to hash and to write: a call for each page would cost more than the copy.
        data = b"".join(parts)
        self.size_bytes += len(data)
        if self._digest is not None:
            self._digest.update(data)
        self._parts.append(data)
        if self._fd < 0:
            if self.size_bytes <= INLINE_BYTES:
                return
            self._fd, self.file = self._spool.create_file()
        pending, self._parts = self._parts, []
        with _local_errors(self._spool.directory):
            self._spool.files.write(self._fd, pending)

    def finish(self) -> Sequence[Any] | str:
        """The body for `Spool.add_piece` or `Spool.add_segment`; a file is on disk then."""
        if self.file is None:
            return self._parts
        with _local_errors(self._spool.directory):
            self._spool.files.sync(self._fd)
        self._spool.files.close(self._fd)
        self._fd = -1
        return self.file

    def abandon(self) -> None:
        """Remove what was written.  Safe to call at any time."""
        if self._fd >= 0:
            self._spool.files.close(self._fd)
            self._fd = -1
        if self.file is not None:
            with contextlib.suppress(OSError):
                self._spool.files.unlink(self._spool.directory / self.file)
        self._parts = []

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest() if self._digest is not None else ""


def read_state(directory: Path) -> State | None:
    """The state as it stands on disk, without a lock and without changing anything.

    Returns:
        None if there is no journal.

    Raises:
        FormatError: the journal is not one of ours.
    """
    try:
        fd = os.open(directory / "journal", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _replay(OS_FILES, fd)[0]
    finally:
        os.close(fd)


def _replay(files: Files, fd: int) -> tuple[State, int]:
    """``(state, end)`` after all whole records of a journal."""
    state = State()
    offset = 0
    for kind, meta, payload_offset, length, end in _records(files, fd):
        state = _apply(state, kind, meta, payload_offset, length)
        offset = end
    if offset == 0 and files.fstat(fd).st_size:
        raise FormatError("the spool's journal does not begin with one of its records")
    return state, offset


def _records(
    files: Files, fd: int, offset: int = 0
) -> Iterator[tuple[int, dict[str, Any], int, int, int]]:
    while True:
        header = files.pread(fd, _RECORD.size, offset)
        if len(header) < _RECORD.size:
            return
        magic, kind, text_length, length, checksum = _RECORD.unpack(header)
        if magic != _MAGIC:
            return
        start = offset + _RECORD.size
        body = files.pread(fd, text_length + length, start)
        if len(body) != text_length + length:
            return
        digest = xxhash.xxh3_64(header[:-8])
        digest.update(body)
        if digest.intdigest() != checksum:
            return
        try:
            meta = json.loads(body[:text_length])
        except ValueError as error:
            raise FormatError(
                "spool journal: a record with a right checksum is not JSON"
            ) from error
        offset = start + text_length + length
        yield kind, meta, start + text_length, length, offset


def pack_record_header(kind: int, text: bytes, payload: Sequence[Any], length: int) -> bytes:
    """The 24 bytes before a record, checksum included."""
    prefix = _RECORD.pack(_MAGIC, kind, len(text), length, 0)[:-8]
    digest = xxhash.xxh3_64(prefix)
    digest.update(text)
    for part in payload:
        digest.update(part)
    return prefix + digest.intdigest().to_bytes(8, "big")


@contextlib.contextmanager
def _local_errors(directory: Path) -> Iterator[None]:
    """Turn operating system errors into one clear `SpoolError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpoolError(f"cannot write the spool in {directory}: {reason}") from error


def new_lineage() -> str:
    """A fresh id for a replica's history: 32 hex digits."""
    return uuid.uuid4().hex
