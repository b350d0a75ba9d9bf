"""Sends frozen segments: create-only, one attempt a call, and nobody else's bytes replaced.

What the uploader decides, this carries out, in threads of its own.  It also tells an answer that
got lost from a rival: by comparing bytes, never by the answer.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from .capture import Capture
from .clock import Clock
from .errors import FormatError, ObjectNotFound, PreconditionFailed, ReplicaError, StoreError
from .fence import Fence
from .format.ltx import HEADER_SIZE, Header
from .format.types import format_txid
from .listing import rests_on_another
from .spool import Sealed
from .sqlite import FencedError
from .store.base import (
    PREVIOUS_METADATA,
    SHA256_METADATA,
    ObjectInfo,
    ObjectStore,
    SegmentInfo,
    segment_key,
)

__all__ = ["Latecomer", "RequestThreads", "Requests", "Sender", "has_sha256", "same_bytes"]

log = logging.getLogger("walship.sender")

#: Objects up to this size are read to be compared where the store keeps no metadata, bytes.
_COMPARED_BYTES: Final = 1024 * 1024
#: Attempts at an object that changes between a look at it and its replacement.
_RACES: Final = 3


class Requests(Protocol):
    """Where requests are carried out, several at a time."""

    def submit(self, request: Callable[[], None]) -> None:
        """Have it carried out soon; ``request`` never raises."""

    def close(self) -> None:
        """Begin nothing more; what is under way goes on."""


class RequestThreads:
    """Requests in threads, which are started as they are needed and are daemons.

    Args:
        name: of the database, in the threads' names.
        most: requests at once.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        # Guards `_busy` and `_threads`.
        self._lock = threading.Lock()
        self._busy = 0
        self._threads = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, request: Callable[[], None]) -> None:
        with self._lock:
            self._busy += 1
            start = self._busy > self._threads and self._threads < self._most
            if start:
                self._threads += 1
        if start:
            threading.Thread(
                target=self._work, name=f"walship:{self._name}:request", daemon=True
            ).start()
        self._queue.put(request)

    def _work(self) -> None:
        while (request := self._queue.get()) is not None:
            try:
                request()
            except Exception:
                log.exception("%s: unexpected error in a request", self._name)
            with self._lock:
                self._busy -= 1

    def close(self) -> None:
        for _ in range(self._threads):
            self._queue.put(None)


class Latecomer(FencedError):
    """A former writer's segment has come late and lies under our next TXID.

    It was never acknowledged and never will be, and we have the lease: we can go on behind it.

    Attributes:
        segment: the object.
        sha256: of its content, hex.
        timestamp_ms: the time in it, ms since the epoch.
    """

    def __init__(self, text: str, segment: SegmentInfo, sha256: str, timestamp_ms: int) -> None:
        super().__init__(text)
        self.segment = segment
        self.sha256 = sha256
        self.timestamp_ms = timestamp_ms


class Sender:
    """Puts segments of one database into its replica.  Thread-safe.

    Args:
        name: of the database, for the log.
        capture: has the frozen bytes.
        store: where they go; one attempt a call.
        fence: whose lease they are sent under.
        sent: called with the TXID and the bytes of a segment that the replica has.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        store: ObjectStore,
        fence: Fence,
        clock: Clock,
        sent: Callable[[int, bytes | Path], None] = lambda txid, body: None,
    ) -> None:
        self._name = name
        self._capture = capture
        self._store = store
        self._fence = fence
        self._clock = clock
        self._sent = sent
        self._conditional = True

    def send(self, sealed: Sealed) -> float | None:
        """Put one frozen segment into the replica, create-only; returns when it is there.

        Returns:
            When the request was begun that created it, by the monotonic clock; None if it was there
            already.

        Raises:
            Latecomer: a former writer's bytes lie under this TXID, and this is the writer.
            FencedError: another writer's bytes do.
            StoreError: anything else.
        """
        body = self._capture.record.body(sealed)
        if isinstance(body, bytes) and hashlib.sha256(body).hexdigest() != sealed.sha256:
            raise ReplicaError(
                f"the spool holds other bytes than were sealed as {sealed.txid:016x}"
            )
        self._fence.ensure()
        began = self._create(sealed, body)
        self._sent(sealed.txid, body)
        return began

    def _create(self, sealed: Sealed, body: bytes | Path) -> float | None:
        found: ObjectInfo | None = None
        for _ in range(_RACES):
            try:
                return self._put(sealed, body, instead_of=found)
            except PreconditionFailed as error:
                found = self._find(sealed.txid)
                if found is None:
                    continue
                if same_bytes(self._store, found, sealed):
                    return None
                if not self._is_dead(found, sealed):
                    raise self._latecomer(found, sealed) or self._fenced(sealed.txid) from error
        raise StoreError(
            f"txid {format_txid(sealed.txid)} in {self._store.url} changes all the time",
            retryable=True,
        )

    def check_still_ours(self, sealed: Sealed) -> None:
        """Raise if somebody has replaced an acknowledged segment: Litestream puts without asking.

        Raises:
            FencedError: it holds other bytes now.
            StoreError: not known.
        """
        found = self._find(sealed.txid)
        if found is None:
            return  # compacted away
        if SHA256_METADATA not in found.metadata and sealed.size_bytes > _COMPARED_BYTES:
            same = found.size_bytes == sealed.size_bytes
        else:
            same = same_bytes(self._store, found, sealed)
        if not same:
            raise self._fenced(sealed.txid)

    def _is_dead(self, found: ObjectInfo, sealed: Sealed) -> bool:
        """Whether nobody was ever told, nor ever will be, that this object arrived (`listing`).

        Only such a one may be replaced, by whomever and however late.  One that rests on what the
        replica holds never is, whoever put it there: somebody may have gone on from it.

        Raises:
            StoreError: that cannot be told before the segment before this one has arrived.
        """
        if not found.size_bytes:
            return True
        if PREVIOUS_METADATA not in found.metadata:
            return False
        before = self._find(sealed.txid - 1)
        # Where it is gone it was compacted.
        metadata = {SHA256_METADATA: sealed.previous} if before is None else before.metadata
        if sealed.txid - 1 > self._capture.state.acked_txid and (
            before is None or metadata.get(SHA256_METADATA) != sealed.previous
        ):
            raise StoreError(
                f"txid {format_txid(sealed.txid)} waits for the one before it", retryable=True
            )
        return rests_on_another(found.metadata, metadata)

    def _latecomer(self, found: ObjectInfo, sealed: Sealed) -> Latecomer | None:
        """Whether this object of another writer's only came late; None if it fences us.

        Raises:
            FencedError: the lease is somebody else's.
            StoreError: not known; or the segment before this one must come first.
        """
        txid, sha256 = sealed.txid, found.metadata.get(SHA256_METADATA)
        if not sha256 or PREVIOUS_METADATA not in found.metadata:
            return None  # not by walship
        if not self._fence.has_outlasted():
            return None
        if txid != self._capture.state.acked_txid + 1:
            raise StoreError(f"txid {format_txid(txid)} waits for those before it", retryable=True)
        try:
            header = Header.unpack(self._store.get(found.key, 0, HEADER_SIZE))
        except (ObjectNotFound, FormatError):
            return None
        return Latecomer(
            f"a former writer's upload has come late, as txid {format_txid(txid)}",
            SegmentInfo(0, txid, txid, found.size_bytes, found.modified_ms, found.key),
            sha256,
            header.timestamp_ms,
        )

    def _fenced(self, txid: int) -> FencedError:
        try:
            rival = self._fence.rival()
        except StoreError:
            rival = None
        owner = f"the writer is now {rival}" if rival else "it gives no name: Litestream, perhaps"
        return FencedError(
            f"another writer has put txid {format_txid(txid)} into {self._store.url} ({owner}): "
            "this database is not shipped any more; stop one of the two writers, then restore this "
            "side, or `walship reset` it to make it the replica's next state"
        )

    def _put(self, sealed: Sealed, body: bytes | Path, *, instead_of: ObjectInfo | None) -> float:
        key = self._key(sealed.txid)
        metadata = {SHA256_METADATA: sealed.sha256}
        if sealed.previous:
            metadata[PREVIOUS_METADATA] = sealed.previous
        if_match = instead_of.etag if instead_of is not None else None
        conditional = self._conditional  # another thread may learn meanwhile that it cannot be
        began = self._clock.monotonic()
        try:
            self._store.put(
                key,
                body,
                timestamp_ms=sealed.timestamp_ms,
                metadata=metadata,
                if_absent=conditional and instead_of is None,
                if_match=if_match if conditional else None,
            )
        except StoreError as error:
            if not conditional or error.code != "NotImplemented":
                raise
            if self._conditional:
                self._conditional = False
                log.warning("%s: %s has no conditional writes", self._name, self._store.url)
            self._store.put(key, body, timestamp_ms=sealed.timestamp_ms, metadata=metadata)
        return began

    def _key(self, txid: int) -> str:
        return segment_key(self._store, 0, txid, txid)

    def _find(self, txid: int) -> ObjectInfo | None:
        try:
            return self._store.head(self._key(txid))
        except ObjectNotFound:
            return None


def same_bytes(store: ObjectStore, info: ObjectInfo, sealed: Sealed) -> bool:
    """Whether an object is the segment that was frozen here; ``info`` is from a HEAD."""
    return info.size_bytes == sealed.size_bytes and has_sha256(store, info, sealed.sha256)


def has_sha256(store: ObjectStore, info: ObjectInfo, sha256: str) -> bool:
    """Whether an object's content has this digest (hex); ``info`` is from a HEAD.

    The one in the object's metadata decides; without it (a directory, another writer's object) the
    content is read.
    """
    recorded = info.metadata.get(SHA256_METADATA)
    if recorded is not None:
        return recorded == sha256
    return sha256_of(lambda offset, length: store.get(info.key, offset, length)) == sha256


def sha256_of(read: Callable[[int, int], bytes]) -> str:
    """Hex digest of everything that ``read(offset, length)`` gives, in pieces of 8 MiB."""
    digest = hashlib.sha256()
    offset, length = 0, 8 * 1024 * 1024
    while data := read(offset, length):
        digest.update(data)
        offset += len(data)
        if len(data) < length:
            break
    return digest.hexdigest()
