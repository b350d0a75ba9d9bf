"""The spool: what is sealed but not yet known to be in the replica, and the position.

One append-only journal per database, in ``.<database name>-walship/`` beside it (mode 0700)::

    lock       held by the process that replicates (fcntl record lock)
    journal    the records below, one after the other; zeros behind the last
    <n>.ltx    sealed segments too large for the journal; named by a record before they count

A record is ``magic, type, length of the JSON part, length of the payload, xxh3_64`` (24 bytes, big
endian) followed by both parts.  The checksum covers all of it, so a torn tail is recognised and
cut off.  One append and one ``fdatasync`` make a gate or a segment durable, where a file with
rename and directory sync takes three: that is what the application's thread pays at the gate.

What the records say, applied in order, is the `State`: the position in the WAL, the pieces that a
gate had to seal (no TXID yet), and the segments whose bytes are frozen because they may have been
sent.  The same function applies a record when it is written and when it is read back.

Nothing here knows SQLite, the store or time.  The spool is not thread-safe: its owner serialises
(see ``engine``'s drain mutex).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from .errors import FormatError, ReplicaError
from .format.types import WalSalts
from .sqlite import SpoolError
from .store.local import fsync_directory, sync_data

__all__ = [
    "Fingerprint",
    "InUseError",
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


_open_lock = threading.Lock()
_open_directories: set[str] = set()


class InUseError(ReplicaError):
    """Another process replicates this database."""


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
    def of(cls, path: str | os.PathLike[str]) -> Fingerprint:
        status = os.stat(path)
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
    """

    txid: int
    size_bytes: int
    sha256: str = ""
    file: str | None = None
    offset: int = 0
    timestamp_ms: int = 0
    header_txid: int = 0

    def to_json(self, file: str | None) -> dict[str, Any]:
        return {
            "txid": self.txid,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "timestamp_ms": self.timestamp_ms,
            "header_txid": self.header_txid,
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
        position: up to where the WAL is sealed; None: only a full copy can come next.
        previous: where the WAL was drained when the last gate let it go, until the new one shows.
        commit: size of the database in pages at the position; 0 if unknown.
        page_size: bytes; 0 if unknown.
        fingerprint: of the main file while there is no WAL, or None.
        copying: a full copy was begun at the position and is not a segment yet.
        pieces: sealed by a gate and not in a segment yet, oldest first.
        segments: frozen and not acknowledged yet, ascending TXIDs.
    """

    lineage: str = ""
    replica: str = ""
    txid: int = 0
    sha256: str = ""
    acked_txid: int = 0
    position: WalPosition | None = None
    previous: WalPosition | None = None
    commit: int = 0
    page_size: int = 0
    fingerprint: Fingerprint | None = None
    copying: bool = False
    pieces: tuple[Sealed, ...] = ()
    segments: tuple[Sealed, ...] = ()

    @property
    def files(self) -> set[str]:
        """Names of the files that hold large pieces and segments."""
        return {s.file for s in (*self.pieces, *self.segments) if s.file is not None}

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
    return Path(directory, f".{name}-walship")


def _scalars(state: State) -> dict[str, Any]:
    return {
        "lineage": state.lineage,
        "replica": state.replica,
        "txid": state.txid,
        "sha256": state.sha256,
        "acked_txid": state.acked_txid,
        "position": state.position and state.position.to_json(),
        "previous": state.previous and state.previous.to_json(),
        "commit": state.commit,
        "page_size": state.page_size,
        "fingerprint": state.fingerprint and list(state.fingerprint),
        "copying": state.copying,
    }


def _with_scalars(state: State, meta: dict[str, Any]) -> State:
    position, previous, fingerprint = meta["position"], meta["previous"], meta["fingerprint"]
    return replace(
        state,
        lineage=meta["lineage"],
        replica=meta["replica"],
        txid=meta["txid"],
        sha256=meta["sha256"],
        acked_txid=meta["acked_txid"],
        position=WalPosition.from_json(position) if position else None,
        previous=WalPosition.from_json(previous) if previous else None,
        commit=meta["commit"],
        page_size=meta["page_size"],
        fingerprint=Fingerprint(*fingerprint) if fingerprint else None,
        copying=meta["copying"],
    )


def _apply(state: State, kind: int, meta: dict[str, Any], offset: int, length: int) -> State:
    """The state after one record; ``offset`` and ``length`` say where its payload lies."""
    if kind == _Kind.STATE:
        state = _with_scalars(state, meta)
        if meta.get("drop_pieces"):
            state = replace(state, pieces=())
        if meta.get("drop_segments"):
            state = replace(state, segments=())
        return state
    if kind == _Kind.ACK:
        txid = meta["txid"]
        left = tuple(s for s in state.segments if s.txid > txid)
        return replace(state, acked_txid=max(txid, state.acked_txid), segments=left)
    sealed = Sealed(**meta["seal"], offset=0 if meta["seal"]["file"] else offset)
    if sealed.file is None and length != sealed.size_bytes:
        raise FormatError("spool journal: a payload has the wrong length")
    state = _with_scalars(state, meta)
    if kind == _Kind.PIECE:
        start = meta.get("start", len(state.pieces))
        end = start + meta.get("count", 0)
        return replace(state, pieces=(*state.pieces[:start], sealed, *state.pieces[end:]))
    if kind == _Kind.SEGMENT:
        # `keep` pieces were sealed after the mark that a long first copy was taken under.
        keep = meta.get("keep", 0)
        pieces = state.pieces[len(state.pieces) - keep :] if keep else ()
        return replace(state, pieces=pieces, segments=(*state.segments, sealed))
    raise FormatError(f"spool journal: unknown record type {kind}")


@dataclass(slots=True)
class _Journal:
    """An open journal file and where its next record goes."""

    fd: int
    end: int
    size: int


class Spool:
    """The journal of one database, open for writing by this process alone.

    Raises from every writing method:
        SpoolError: disk full, I/O error.  What was durable before still is, and the state in memory
            is what the journal says.
    """

    def __init__(self, directory: Path, lock_fd: int) -> None:
        self.directory = directory
        #: Sealed bytes from which on the spool counts as full; 0 for no limit.
        self.max_bytes = 0
        self._lock_fd = lock_fd
        self._key = ""
        self._state = State()
        self._journal: _Journal | None = None
        self._next_file = 1
        #: When an earlier process wrote its last record, ns since the epoch; 0 without one.
        self.found_mtime_ns = 0

    @classmethod
    def open(cls, directory: Path) -> Spool:
        """Lock the state directory (made if missing) and read the journal back.

        Raises:
            InUseError: another process holds the lock.
            SpoolError: the directory or journal cannot be written.
            FormatError: the journal is not one of ours.
        """
        # A record lock is the process's: asked for twice it is given twice, and closing the second
        # descriptor would drop it.
        key = os.path.realpath(directory)
        with _open_lock:
            if key in _open_directories:
                raise InUseError("this process replicates this database already")
            _open_directories.add(key)
        try:
            return cls._open(directory, key)
        except BaseException:
            with _open_lock:
                _open_directories.discard(key)
            raise

    @classmethod
    def _open(cls, directory: Path, key: str) -> Spool:
        with _local_errors(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = os.pread(lock_fd, 32, 0).decode("ascii", "replace").strip("\0\n ")
                    raise InUseError(
                        f"another process{f' (pid {holder})' if holder else ''} already replicates "
                        "this database; several processes on one database are not supported yet"
                    ) from None
                raise
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
            spool = cls(directory, lock_fd)
            spool._key = key
            with _local_errors(directory):
                spool._load()
        except BaseException:
            os.close(lock_fd)
            raise
        return spool

    @property
    def state(self) -> State:
        """What the journal says; immutable, so any thread may keep it."""
        return self._state

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
        self._seal(_Kind.PIECE, _scalars(state), sealed, body)

    def replace_pieces(
        self, start: int, count: int, body: Sequence[Any] | str, size_bytes: int
    ) -> None:
        """Put the merge of ``count`` pieces from index ``start`` on in their place."""
        meta = _scalars(self._state)
        meta["start"], meta["count"] = start, count
        self._seal(_Kind.PIECE, meta, Sealed(txid=0, size_bytes=size_bytes), body)

    def add_segment(
        self, state: State, sealed: Sealed, body: Sequence[Any] | str, *, keep: int = 0
    ) -> Sealed:
        """Freeze a segment under its TXID: durable when this returns, so it may be sent.

        Args:
            state: scalar fields after the segment.
            sealed: txid, size, sha256 and timestamp; where the bytes lie is filled in.
            keep: how many of the newest pieces are *not* in the segment.
        """
        meta = _scalars(state)
        meta["keep"] = keep
        self._seal(_Kind.SEGMENT, meta, sealed, body)
        return self._state.segments[-1]

    def acknowledge(self, txid: int) -> None:
        """The replica has every TXID up to ``txid``.  Not durable: bytes in the spool prove it."""
        done = [s for s in self._state.segments if s.txid <= txid]
        self._append(_Kind.ACK, {"txid": txid}, (), durable=False)
        for sealed in done:
            if sealed.file is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.directory / sealed.file)
        self.tidy()

    def create_file(self) -> tuple[int, str]:
        """``(fd, name)`` of a new file for a large body; sync it before it is named in a record."""
        with _local_errors(self.directory):
            while True:
                name = f"{self._next_file:016x}.ltx"
                self._next_file += 1
                with contextlib.suppress(FileExistsError):
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    return os.open(self.directory / name, flags, 0o600), name

    def _seal(
        self, kind: _Kind, meta: dict[str, Any], sealed: Sealed, body: Sequence[Any] | str
    ) -> None:
        file: str | None = None
        pieces: Sequence[Any] = ()
        if kind is _Kind.PIECE and 0 < self.max_bytes < self._state.pending_bytes:
            raise SpoolError(f"the spool in {self.directory} is full (max-spool-bytes)")
        if isinstance(body, str):
            file = body
            with _local_errors(self.directory):
                fsync_directory(self.directory)
        elif sealed.size_bytes > INLINE_BYTES:
            with _local_errors(self.directory):
                fd, file = self.create_file()
                try:
                    write_all(fd, body)
                    sync_data(fd)
                except BaseException:
                    os.unlink(self.directory / file)
                    raise
                finally:
                    os.close(fd)
                fsync_directory(self.directory)
        else:
            pieces = body
        meta["seal"] = sealed.to_json(file)
        before = self._state.pieces
        self._append(kind, meta, pieces, durable=True)
        named = self._state.files
        for piece in before:
            if piece.file is not None and piece.file not in named:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.directory / piece.file)

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
            data = os.pread(journal.fd, sealed.size_bytes, sealed.offset)
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
                _allocate(journal.fd, journal.size, grown - journal.size)
                journal.size = grown
            write_all(journal.fd, [header, text, *payload], journal.end)
            if durable:
                sync_data(journal.fd)
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
        path = self.directory / "journal"
        temporary = self.directory / "journal.tmp"
        with _local_errors(self.directory):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600)
            try:
                fresh = _Journal(fd, 0, 0)
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
                os.fsync(fd)
                os.rename(temporary, path)
                fsync_directory(self.directory)
            except BaseException:
                self._journal, self._state = old, state
                os.close(fd)
                raise
        if old is not None:
            os.close(old.fd)

    def _load(self) -> None:
        path = self.directory / "journal"
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        if path.exists():
            self.found_mtime_ns = path.stat().st_mtime_ns
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                state, end = _replay(fd)
            except FormatError as error:
                os.close(fd)
                aside = path.with_name("journal.damaged")
                log.error("%s; it is kept as %s, and a full copy is needed", error, aside)
                os.replace(path, aside)
            else:
                self._state = state
                self._journal = _Journal(fd, end, os.fstat(fd).st_size)
                _clear_tail(self._journal)
        if self._journal is None:
            self._rewrite()
        for file in self.directory.glob("*.ltx"):
            if file.name not in self._state.files:
                file.unlink()

    def close(self) -> None:
        """Close the journal and release the lock.  Safe to call twice."""
        if self._journal is not None:
            os.close(self._journal.fd)
            self._journal = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
            with _open_lock:
                _open_directories.discard(self._key)


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
            write_all(self._fd, pending)

    def finish(self) -> Sequence[Any] | str:
        """The body for `Spool.add_piece` or `Spool.add_segment`; a file is on disk then."""
        if self.file is None:
            return self._parts
        with _local_errors(self._spool.directory):
            sync_data(self._fd)
        os.close(self._fd)
        self._fd = -1
        return self.file

    def abandon(self) -> None:
        """Remove what was written.  Safe to call at any time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._spool.directory / self.file)
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
        return _replay(fd)[0]
    finally:
        os.close(fd)


def _replay(fd: int) -> tuple[State, int]:
    """``(state, end)`` after all whole records of a journal."""
    state = State()
    offset = 0
    for kind, meta, payload_offset, length, end in _records(fd):
        state = _apply(state, kind, meta, payload_offset, length)
        offset = end
    if offset == 0 and os.fstat(fd).st_size:
        raise FormatError("the spool's journal does not begin with one of its records")
    return state, offset


def _records(fd: int) -> Iterator[tuple[int, dict[str, Any], int, int, int]]:
    offset = 0
    while True:
        header = os.pread(fd, _RECORD.size, offset)
        if len(header) < _RECORD.size:
            return
        magic, kind, text_length, length, checksum = _RECORD.unpack(header)
        if magic != _MAGIC:
            return
        start = offset + _RECORD.size
        body = os.pread(fd, text_length + length, start)
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


def _clear_tail(journal: _Journal) -> None:
    """Cut a torn tail off, so that its bytes can never look like a record again."""
    if journal.size > journal.end:
        os.ftruncate(journal.fd, journal.end)
        os.fsync(journal.fd)
        journal.size = journal.end


def _allocate(fd: int, offset: int, length: int) -> None:
    try:
        os.posix_fallocate(fd, offset, length)
    except AttributeError:  # macOS
        os.ftruncate(fd, offset + length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, offset + length)


def write_all(fd: int, parts: Sequence[Any], offset: int | None = None) -> int:
    """Write every buffer, in order, at ``offset`` or at the file's position; bytes written."""
    written = 0
    batch: list[memoryview] = [memoryview(part).cast("B") for part in parts if len(part)]
    while batch:
        head = batch[:512]
        if offset is None:
            n = os.writev(fd, head)
        else:
            n = os.pwritev(fd, head, offset + written)
        written += n
        while batch and n >= len(batch[0]):
            n -= len(batch[0])
            del batch[0]
        if n:
            batch[0] = batch[0][n:]
    return written


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
