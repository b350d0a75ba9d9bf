"""The uploader: seals what is new and sends it, in the background.

One scheduling thread per database and a few threads for requests, so that several segments may be
in flight when the store is far away.  The logic is `Uploader.step`, which tests call with a clock
of their own; `Uploader.run` only steps and waits for the bell.

The bell is answered at once when the database was idle or much was written, and at most every sync
interval under load otherwise.
A TXID is given when a segment is frozen, its bytes are in the spool before they are sent, and they
stay as they are until the answer is known.  Acknowledgements count in TXID order, whatever order
the answers come in.
"""

from __future__ import annotations

import _thread
import contextlib
import hashlib
import logging
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from .capture import Capture
from .clock import Clock
from .errors import (
    ClosedError,
    ContinuityError,
    ObjectNotFound,
    PreconditionFailed,
    ReplicaError,
    StoreError,
)
from .format.types import format_txid
from .spool import Sealed
from .sqlite import FencedError
from .store.base import SHA256_METADATA, ObjectInfo, ObjectStore, segment_key

__all__ = ["Outcome", "Uploader"]

log = logging.getLogger("walship.uploader")

#: Segments that may be in flight at once, where a hole that a dead writer leaves can be told from
#: a loss (`store.base.IN_FLIGHT_MAX`): that takes metadata, which a directory does not have.
MAX_IN_FLIGHT: Final = 4
#: How often the uploader looks without having been rung, seconds: a crash can come before a bell.
TICK_S: Final = 2.0
#: Waits after failed requests double from the first to the second, in seconds, with jitter.
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_LONGEST_S: Final = 30.0
#: Waits after a refusal that needs a person (credentials, a missing bucket), in seconds.
BACKOFF_REFUSED_S: Final = 10.0
#: Pause before a full copy is tried again that writers were in the way of, seconds.
_COPY_RETRY_S: Final = 0.01
#: How long closing waits for the scheduling thread, seconds.
_JOIN_S: Final = 0.5
#: Pieces are merged while they cannot be sent, once there are more than this many.
MERGE_PIECES: Final = 64


class Reconcile(Protocol):
    """Compares the local record with the replica before the first TXID is given."""

    def __call__(self) -> None:
        """Raises ContinuityError to refuse, StoreError to be tried again."""


@dataclass(slots=True)
class _Slot:
    """A segment in flight, or waiting to be sent again."""

    sealed: Sealed
    oldest: float  # monotonic time of the oldest commit in it
    in_flight: bool = False
    done: bool = False


@dataclass(slots=True)
class _Wait:
    """Somebody waits for what was committed before the ticket was drawn."""

    ticket: int
    future: Future[int]
    txid: int | None = None  # which holds it, once it is frozen


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request thread found out about one segment."""

    txid: int
    error: ReplicaError | None


@dataclass(slots=True)
class _Progress:
    """Counters for `status`; written by the scheduling thread only."""

    uploads: int = 0
    upload_bytes: int = 0
    last_upload_ms: int | None = None
    last_error: str | None = None


class Uploader:
    """Ships one database.  Public methods may be called from any thread.

    Args:
        name: of the database, for the log.
        capture: where segments come from.
        store: where they go; one attempt a call.
        reconcile: run before the first segment is frozen, until it passes.
        sync_interval_s: least time between the starts of two uploads under load, seconds.
        max_in_flight: segments sent at once; 1 for stores without metadata.
        give_up: called once with the reason why this database may not be shipped any more.
        watch: called at each tick; raises a `ReplicaError` when nothing may be shipped any more.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        store: ObjectStore,
        clock: Clock,
        *,
        reconcile: Reconcile,
        sync_interval_s: float,
        max_in_flight: int = MAX_IN_FLIGHT,
        give_up: Callable[[ReplicaError], None] = lambda error: None,
        watch: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self._watch = watch
        self._next_watch = float("-inf")
        self._name = name
        self._capture = capture
        self._store = store
        self._clock = clock
        self._reconcile = reconcile
        self._sync_interval_s = sync_interval_s
        self._max_in_flight = max_in_flight
        self._on_give_up = give_up
        self._rng = rng or random.Random()
        # The doorbell: set by commits without a lock, cleared before the WAL is looked at.
        self.dirty = False
        self._interrupted = False
        self._wake = threading.Lock()
        self._wake.acquire()
        # Guards the fields that waiting threads look at.
        self._changed = threading.Condition(threading.Lock())
        self._tickets = 0
        self._covered_ticket = 0
        self._covered_txid = 0
        self._acked_txid = capture.state.acked_txid
        self._waiting: list[_Wait] = []
        self._fatal: ReplicaError | None = None
        self._stopping = False
        # Scheduling thread only.
        self._slots: dict[int, _Slot] = {}
        self._reconciled = False
        self._dirty_since: float | None = None
        self._last_send = float("-inf")
        self._failures = 0
        self._retry_at = float("-inf")
        self._down_since: float | None = None
        self._refusal_logged: str | None = None
        self._conditional = True
        self._progress = _Progress()
        # Request threads.
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Sealed | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._thread: threading.Thread | None = None

    # -- from the application's threads -------------------------------------------------------

    def ring(self) -> None:
        """Something was committed.  Never raises, never blocks; costs nanoseconds."""
        if not self.dirty:
            self.dirty = True
            self._poke()

    def ring_later(self, interrupted: bool) -> None:
        """A signal handler raised inside the bell, where nothing may be raised.

        Args:
            interrupted: whether it was Ctrl-C; it is delivered again a moment later.
        """
        self.dirty = True
        self._interrupted = self._interrupted or interrupted

    def _poke(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._wake.release()

    def retry_now(self) -> None:
        """What was in the way is gone: do not sit out the pause."""
        self._retry_at = float("-inf")
        self.ring()

    def request_sync(self) -> Future[int]:
        """Ask that everything committed so far be sent at once.

        Returns:
            The TXID that holds it, once the replica has it and all before it.  Ends with a
            `ReplicaError` if it can never get there (fenced, refused, closed).  Resolved from the
            uploader's thread; whoever loses interest cancels it.
        """
        future: Future[int] = Future()
        with self._changed:
            if self._fatal is not None:
                future.set_exception(self._fatal)
            elif self._stopping:
                future.set_exception(ClosedError(f"replication of {self._name} is closed"))
            else:
                self._tickets += 1
                self._waiting.append(_Wait(self._tickets, future))
        self.dirty = True
        self._poke()
        return future

    def _settle(self) -> None:
        """Resolve what is waited for and done.  Call with `_changed` held."""
        end: ReplicaError | None = self._fatal
        if end is None and self._stopping:
            end = ClosedError(
                f"replication of {self._name} was closed first; what is left goes out after the "
                "next open"
            )
        left: list[_Wait] = []
        for wait in self._waiting:
            if wait.txid is None and wait.ticket <= self._covered_ticket:
                wait.txid = self._covered_txid
            done = wait.txid is not None and wait.txid <= self._acked_txid
            if not done and end is None:
                left.append(wait)
            elif wait.future.set_running_or_notify_cancel():
                if done:
                    wait.future.set_result(wait.txid or 0)
                else:
                    wait.future.set_exception(end)
        self._waiting = left

    def wait_reconciled(self, timeout: float) -> bool:
        """Wait until local record and replica were compared; False after ``timeout`` seconds.

        Raises:
            ReplicaError: they do not continue each other.
        """
        deadline = self._clock.monotonic() + timeout
        with self._changed:
            while not self._reconciled:
                if self._fatal is not None:
                    raise self._fatal
                left = deadline - self._clock.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    @property
    def replicated_txid(self) -> int:
        """Highest TXID known to be in the replica, with all before it."""
        return self._acked_txid

    @property
    def fatal(self) -> ReplicaError | None:
        """Why this database may not be shipped any more, or None."""
        return self._fatal

    @property
    def reconciled(self) -> bool:
        """Whether local record and replica have been compared and continue each other."""
        return self._reconciled

    @property
    def progress(self) -> _Progress:
        """A copy of the counters."""
        return replace(self._progress)

    def lag_s(self) -> float:
        """Age of the oldest commit that is not known to be in the replica, seconds; 0 without."""
        times = [slot.oldest for slot in list(self._slots.values()) if not slot.done]
        if self._dirty_since is not None:
            times.append(self._dirty_since)
        return max(0.0, self._clock.monotonic() - min(times)) if times else 0.0

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the scheduling thread (a daemon: `close` and an exit handler drain)."""
        self.dirty = True
        self._thread = threading.Thread(target=self.run, name=f"walship:{self._name}", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Step and wait for the bell until `stop`."""
        while not self._ends():
            try:
                delay = self.step(self._clock.monotonic())
            except ReplicaError as error:
                if self._ends():
                    return  # what it worked on was closed under it
                delay = self._failed(error)
            except Exception:
                if self._ends():
                    return
                log.exception("%s: unexpected error in the uploader", self._name)
                delay = self._failed(ReplicaError("unexpected error, see the log"))
            if delay > 0:
                self._wake.acquire(timeout=delay)

    def _ends(self) -> bool:
        return self._stopping

    def stop(self) -> None:
        """End the threads without waiting for requests; what is frozen stays in the spool."""
        with self._changed:
            self._stopping = True
            self._settle()
            self._changed.notify_all()
        self._poke()
        for _ in self._workers:
            self._requests.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            # It may be waiting for the store's answer; what it then finds closed ends it.
            self._thread.join(timeout=_JOIN_S)

    # -- the scheduling thread ----------------------------------------------------------------

    def step(self, now: float) -> float:
        """Do what is due and return the seconds until there may be more; never blocks on a PUT.

        Raises:
            ReplicaError: what went wrong; the caller backs off.
        """
        if self._interrupted:
            self._interrupted = False
            _thread.interrupt_main()
        self._collect_outcomes(now)
        if self._fatal is not None:
            return TICK_S
        if now >= self._next_watch:
            self._next_watch = now + TICK_S
            self._watch_or_give_up()
        if self.dirty and self._dirty_since is None:
            self._dirty_since = now
        if now < self._retry_at:
            self._merge_if_many()
            return min(TICK_S, self._retry_at - now)
        if not self._reconciled:
            self._do_reconcile()
            now = self._clock.monotonic()
        self._send_waiting()
        if len(self._slots) >= self._max_in_flight:
            self._merge_if_many()
            return TICK_S
        with self._changed:
            ticket = self._tickets
        due = self._last_send + self._sync_interval_s
        wanted = ticket != self._covered_ticket or self._capture.more
        if now < due and not wanted and not (self.dirty and self._capture.has_much()):
            self._merge_if_many()
            return min(TICK_S, due - now) if self._dirty_since is not None else TICK_S
        return self._take_and_send(now, ticket)

    def _watch_or_give_up(self) -> None:
        try:
            self._watch()
        except ReplicaError as error:
            self._give_up(error)
            raise

    def _take_and_send(self, now: float, ticket: int) -> float:
        self.dirty = False
        since, self._dirty_since = self._dirty_since, None
        try:
            sealed = self._next_segment()
        except BaseException:
            self._dirty_since = since if since is not None else now
            raise
        if sealed is not None:
            if not self._failures:
                self._progress.last_error = None
            self._slots[sealed.txid] = _Slot(sealed, since if since is not None else now)
            self._last_send = now
            self._send_waiting()
            if self._capture.more:
                self.dirty = True
                return 0.0
        elif self._capture.full_copy_reason is not None and self._capture.has_content():
            self._dirty_since = since if since is not None else now
            if not self._capture.in_wal_mode:
                self._progress.last_error = "not in WAL mode: run PRAGMA journal_mode=WAL"
                return TICK_S
            if now - self._dirty_since > 1.0:
                self._progress.last_error = "an open write transaction holds up the full copy"
            return _COPY_RETRY_S
        with self._changed:
            self._covered_ticket = ticket
            self._covered_txid = self._capture.state.txid
            self._settle()
        return 0.0 if self.dirty and self._sync_interval_s <= 0 else TICK_S

    def _next_segment(self) -> Sealed | None:
        if self._capture.full_copy_reason is None:
            return self._capture.take()
        if not self._capture.has_content() or not self._capture.in_wal_mode:
            return None
        reason = self._capture.full_copy_reason
        sealed = self._capture.copy()
        if sealed is not None:
            log.info(
                "%s: full copy as txid %s, %d bytes (%s)",
                self._name,
                format_txid(sealed.txid),
                sealed.size_bytes,
                reason,
            )
        return sealed

    def _merge_if_many(self) -> None:
        if len(self._capture.state.pieces) > MERGE_PIECES:
            self._capture.merge_pieces()

    def _do_reconcile(self) -> None:
        try:
            self._reconcile()
        except ContinuityError as error:
            self._give_up(error)
            raise
        state = self._capture.state
        for sealed in state.segments:
            self._slots[sealed.txid] = _Slot(sealed, self._clock.monotonic())
        with self._changed:
            self._acked_txid = state.acked_txid
            self._reconciled = True
            self._settle()
            self._changed.notify_all()
        self._recovered()

    def _give_up(self, error: ReplicaError) -> None:
        with self._changed:
            self._fatal = error
            self._settle()
            self._changed.notify_all()
        self._on_give_up(error)
        log.error("%s: %s", self._name, error)

    def _send_waiting(self) -> None:
        """Hand frozen segments to the request threads, oldest first."""
        if self._clock.monotonic() < self._retry_at:
            return
        for slot in list(self._slots.values())[: self._max_in_flight]:
            if slot.in_flight or slot.done:
                continue
            slot.in_flight = True
            busy = sum(1 for s in self._slots.values() if s.in_flight and not s.done)
            if busy > len(self._workers) and len(self._workers) < self._max_in_flight:
                self._start_worker()
            self._requests.put(slot.sealed)

    def _collect_outcomes(self, now: float) -> None:
        failed: ReplicaError | None = None
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except queue.Empty:
                break
            slot = self._slots.get(outcome.txid)
            if slot is None:
                continue
            slot.in_flight = False
            if outcome.error is None:
                slot.done = True
                self._progress.uploads += 1
                self._progress.upload_bytes += slot.sealed.size_bytes
                self._progress.last_upload_ms = self._clock.now_ms()
            elif isinstance(outcome.error, FencedError):
                self._give_up(outcome.error)
            else:
                failed = outcome.error
        self._acknowledge()
        if failed is not None:
            self._failed(failed)

    def _acknowledge(self) -> None:
        """Count finished segments, in TXID order and without a gap."""
        acked = 0
        for txid, slot in list(self._slots.items()):
            if not slot.done:
                break
            acked = txid
            del self._slots[txid]
        if not acked:
            return
        self._capture.acknowledge(acked)
        with self._changed:
            self._acked_txid = acked
            self._settle()
        self._recovered()

    def _failed(self, error: ReplicaError) -> float:
        """Note a failure and back off; one log line when trouble begins, one when it ends."""
        now = self._clock.monotonic()
        self._failures += 1
        self._progress.last_error = str(error)
        retryable = isinstance(error, StoreError) and error.retryable
        first = BACKOFF_FIRST_S if retryable else BACKOFF_REFUSED_S
        wait = min(BACKOFF_LONGEST_S, first * float(1 << min(self._failures - 1, 10)))
        wait *= 0.5 + self._rng.random() / 2
        self._retry_at = now + wait
        if self._down_since is None:
            self._down_since = now
        if self._refusal_logged != str(error) and (not retryable or self._failures == 3):
            self._refusal_logged = str(error)
            log.warning("%s: cannot replicate: %s (trying again)", self._name, error)
        return wait

    def _recovered(self) -> None:
        if self._failures and self._refusal_logged is not None:
            down = self._clock.monotonic() - (self._down_since or 0.0)
            log.warning("%s: replicating again after %.1f s", self._name, down)
        self._failures = 0
        self._retry_at = float("-inf")
        self._down_since = None
        self._refusal_logged = None
        self._progress.last_error = None

    # -- request threads ----------------------------------------------------------------------

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"walship:{self._name}:put", daemon=True)
        self._workers.append(worker)
        worker.start()

    def _work(self) -> None:
        while (sealed := self._requests.get()) is not None:
            error: ReplicaError | None = None
            try:
                self.send(sealed)
            except ReplicaError as caught:
                error = caught
            except Exception as caught:
                log.exception("%s: unexpected error in an upload", self._name)
                error = ReplicaError(f"unexpected error in an upload: {caught!r}")
            self._outcomes.put(Outcome(sealed.txid, error))
            self._poke()

    def send(self, sealed: Sealed) -> None:
        """Put one frozen segment into the replica, create-only; returns when it is there.

        Raises:
            FencedError: another writer's bytes lie under this TXID.
            StoreError: anything else.
        """
        body = self._capture.body(sealed)
        if isinstance(body, bytes) and hashlib.sha256(body).hexdigest() != sealed.sha256:
            raise ReplicaError(
                f"the spool holds other bytes than were sealed as {sealed.txid:016x}"
            )
        key = segment_key(self._store, 0, sealed.txid, sealed.txid)
        try:
            self._put(key, body, sealed)
        except PreconditionFailed as error:
            found = self._find(key)
            if found is not None and same_bytes(self._store, found, sealed):
                return
            if found is not None and not found.size_bytes:
                # What a server keeps of an upload whose client died after its headers.
                self._put(key, body, sealed, replace_it=True)
                return
            raise FencedError(
                f"another writer has put txid {format_txid(sealed.txid)} into {self._store.url}: "
                "this database is not shipped any more; stop one of the two writers, then restore "
                "or reset this side"
            ) from error

    def _put(
        self, key: str, body: bytes | Path, sealed: Sealed, *, replace_it: bool = False
    ) -> None:
        metadata = {SHA256_METADATA: sealed.sha256}
        try:
            self._store.put(
                key,
                body,
                timestamp_ms=sealed.timestamp_ms,
                metadata=metadata,
                if_absent=self._conditional and not replace_it,
            )
        except StoreError as error:
            if not self._conditional or error.code != "NotImplemented":
                raise
            log.warning("%s: %s has no conditional writes", self._name, self._store.url)
            self._conditional = False
            self._store.put(key, body, timestamp_ms=sealed.timestamp_ms, metadata=metadata)

    def _find(self, key: str) -> ObjectInfo | None:
        try:
            return self._store.head(key)
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
