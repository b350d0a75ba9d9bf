"""The uploader: seals what is new and sends it, in the background.

One scheduling thread per database and process, and a few threads for requests, so that several
segments may be in flight when the store is far away.  The logic is `Uploader.step`, which tests
call with a clock of their own; `Uploader.run` only steps and waits for the bell.

Of all processes that have the database open, the one that holds the record lock uploads (it
*leads*); the others tell it when there is something to send, and lead as soon as it is gone.

The bell is answered at once when the database was idle or much was written, and at most every sync
interval under load otherwise.  A TXID is given when a segment is frozen, its bytes are in the spool
before they are sent, and they stay as they are until the answer is known.  Acknowledgements count
in TXID order, whatever order the answers come in, and only under a lease that is proven (`fence`).
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import logging
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from .capture import Capture
from .clock import Clock
from .compaction import Levels
from .election import Locks
from .errors import ClosedError, ContinuityError, ObjectNotFound, ReplicaError, StoreError
from .fence import Fence
from .peers import Message, Peers
from .sender import Latecomer, Requests, Sender
from .spool import Sealed
from .sqlite import FencedError, RefusedError, SpoolError
from .waits import Waits

__all__ = ["MAX_IN_FLIGHT", "Uploader"]

log = logging.getLogger("walship.uploader")

#: Segments that may be in flight at once, where a hole that a dead writer leaves can be told from
#: a loss (`store.base.IN_FLIGHT_MAX`): that takes metadata, which a directory does not have.
MAX_IN_FLIGHT: Final = 4
#: How often the uploader looks without having been rung, seconds: a crash can come before a bell.
TICK_S: Final = 2.0
#: How often a process that does not lead looks whether it may, and repeats its questions, seconds.
FOLLOW_S: Final = 0.4
#: The same while the leader is just changing, seconds.
_CHANGE_S: Final = 0.02
#: Waits after failed requests double from the first to the second, in seconds, with jitter.
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_LONGEST_S: Final = 10.0
#: Waits after a refusal that needs a person (credentials, a missing bucket), in seconds.
BACKOFF_REFUSED_S: Final = 10.0
#: Pause before a full copy is tried again that writers were in the way of, seconds.
_COPY_RETRY_S: Final = 0.01
#: Pause before a WAL is looked at again that is about to come to the gate, seconds.
_GATE_RETRY_S: Final = 0.001
#: How long closing waits for the scheduling thread, seconds.
_JOIN_S: Final = 0.5
#: Pieces are merged while they cannot be sent, once there are more than this many.
MERGE_PIECES: Final = 64
#: While there is something to send, how often an older object is looked at: is it still ours?
_LOOK_BACK_S: Final = 45.0
#: Longest pause between two segments that somebody waits for, while one is in flight, seconds.
_LONGEST_STRIDE_S: Final = 0.05
#: In the place of a TXID: the merging and cleaning up of the replica.
_TENDING: Final = -2


class Reconcile(Protocol):
    """Compares the local record with the replica before the first TXID is given."""

    def __call__(self) -> None:
        """Raises ContinuityError or FencedError to refuse, StoreError to be tried again."""


@dataclass(slots=True)
class _Slot:
    """A segment in flight, or waiting to be sent again."""

    sealed: Sealed
    oldest: float  # monotonic time of the oldest commit in it
    in_flight: bool = False
    done: bool = False
    began: float | None = None  # when the request was begun that created it


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a request came to; ``txid`` 0 is about the fence, a negative one about old segments."""

    txid: int
    error: ReplicaError | None
    began: float | None = None


@dataclass(slots=True)
class _Progress:
    """What was done so far, and how it stands; written by the scheduling thread only."""

    uploads: int = 0
    upload_bytes: int = 0
    last_upload_ms: int | None = None
    last_error: str | None = None
    syncs: int = 0
    sync_errors: int = 0
    sync_s: float = 0.0
    disk_full: bool = False


class Uploader:
    """Ships one database.  Public methods may be called from any thread.

    Args:
        name: of the database, for the log.
        capture: where segments come from.
        locks: say who leads.
        peers: the other processes.
        sender: puts segments; one attempt a call.
        requests: where it does so.
        fence: whether what was sent may be acknowledged.
        levels: merges and cleans up what was acknowledged, where requests are carried out.
        reconcile: run before the first segment is frozen, until it passes; takes the lease too.
        is_reconciled: whether some process has done so, for those that do not lead.
        sync_interval_s: least time between the starts of two uploads under load, seconds.
        max_in_flight: segments sent at once; 1 for stores without metadata.
        give_up: called with the reason why this process may commit no more, and whether that holds
            for all processes.
        refused: why all may commit no more, as some process has found; None if they may.
        watch: called at each tick; raises a `ReplicaError` when this process must not go on.
    """

    def __init__(
        self,
        name: str,
        capture: Capture,
        clock: Clock,
        *,
        locks: Locks,
        peers: Peers,
        sender: Sender,
        requests: Requests,
        fence: Fence,
        levels: Levels,
        reconcile: Reconcile,
        is_reconciled: Callable[[], bool],
        sync_interval_s: float,
        max_in_flight: int = MAX_IN_FLIGHT,
        give_up: Callable[[ReplicaError, bool], None] = lambda error, everywhere: None,
        refused: Callable[[], ReplicaError | None] = lambda: None,
        watch: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self._name = name
        self._capture = capture
        self._clock = clock
        self._locks = locks
        self._peers = peers
        self._sender = sender
        self._requests = requests
        self._fence = fence
        self._levels = levels
        self._reconcile = reconcile
        self._is_reconciled = is_reconciled
        self._sync_interval_s = sync_interval_s
        self._max_in_flight = max_in_flight
        self._on_give_up = give_up
        self._refused = refused
        self._watch = watch
        self._rng = rng or random.Random()
        # The doorbell: set by commits without a lock, cleared before the WAL is looked at.
        self.dirty = False
        self._interrupted = False
        # Somebody waits for what was committed since: as `dirty`, for those that ask.
        self._asked = False
        self._wake = threading.Lock()
        self._wake.acquire()
        self._waits = Waits()
        # Guards `_reconciled` and `_fatal`, for those that wait for them.
        self._changed = threading.Condition(threading.Lock())
        self._reconciled = False
        self._fatal: ReplicaError | None = None
        self._stopping = False
        self._acked_txid = capture.state.acked_txid
        # Scheduling thread only.
        self._leading = False
        self._vanished = False  # bucket or lease were not found
        self._next_watch = float("-inf")
        self._slots: dict[int, _Slot] = {}
        # Whose segment is under the TXID of our first slot.
        self._latecomer: Latecomer | None = None
        self._covered_ticket = 0
        self._stride_s = 0.0
        self._dirty_since: float | None = None
        self._last_send = float("-inf")
        self._failures = 0
        self._retry_at = float("-inf")
        self._down_since: float | None = None
        self._told: str | None = None
        self._renewing = False
        self._tending = False
        self._last_look = float("-inf")
        self._newest_acked: Sealed | None = None
        self._asked_ticket = 0
        self._asked_at = float("-inf")
        self._progress = _Progress()
        # From the request threads.
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
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

    def merge_soon(self) -> None:
        """The spool has grown larger than it need be: do not wait for the next tick."""
        self._poke()

    def retry_now(self) -> None:
        """What was in the way is gone: do not sit out the pause."""
        self._retry_at = float("-inf")
        self.ring()

    def request_sync(self) -> Future[int]:
        """Ask that everything committed so far be sent at once.

        Returns:
            The TXID that holds it, once the replica has it and all before it.  Ends with a
            `ReplicaError` if it can never get there (fenced, refused, closed).  Resolved from a
            thread of the engine; whoever loses interest cancels it.
        """
        future = self._waits.draw()
        self.dirty = True
        if not self._asked:
            self._asked = True
            self._poke()
        return future

    def release_lease(self) -> Future[None]:
        """Give the lease up, after everything was shipped; done when the store has answered."""
        future: Future[None] = Future()
        self._levels.rest()

        def release() -> None:
            self._fence.release()
            if future.set_running_or_notify_cancel():
                future.set_result(None)

        self._requests.submit(release)
        return future

    def answered(self, message: Message) -> None:
        """The leader has answered what this process asked."""
        ticket, txid = message.get("id"), message.get("txid")
        if isinstance(ticket, int) and isinstance(txid, int):
            self._waits.cover(ticket, txid)
            self._waits.acknowledge(txid)

    def wait_reconciled(self, timeout: float) -> bool:
        """Wait until local record and replica were compared; False after ``timeout`` seconds.

        Raises:
            ReplicaError: they do not continue each other, or another writer owns the replica.
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
    def leads(self) -> bool:
        """Whether this process is the one that uploads."""
        return self._leading

    @property
    def replicated_txid(self) -> int:
        """Highest TXID known to be in the replica, with all before it."""
        return max(self._acked_txid, self._capture.state.acked_txid)

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
        times = [slot.oldest for slot in list(self._slots.values())]
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
        while not self._stopping:
            delay = self.turn()
            if delay > 0 and not self._stopping:
                self._wake.acquire(timeout=delay)

    def turn(self) -> float:
        """One step; what goes wrong in it is noted.  Returns seconds until the next is due."""
        try:
            return self.step(self._clock.monotonic())
        except ReplicaError as error:
            # What it worked on may have been closed under it.
            return 0.0 if self._stopping else self._failed(error)
        except Exception:
            if self._stopping:
                return 0.0
            log.exception("%s: unexpected error in the uploader", self._name)
            return self._failed(ReplicaError("unexpected error, see the log"))

    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def stop(self) -> None:
        """End the threads without waiting for requests; what is frozen stays in the spool."""
        self._stopping = True
        self._waits.end(
            ClosedError(
                f"replication of {self._name} was closed first; what is left goes out after the "
                "next open"
            )
        )
        with self._changed:
            self._changed.notify_all()
        self._poke()
        self._requests.close()
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
        self._collect_outcomes()
        if self._fatal is not None:
            return TICK_S
        if now >= self._next_watch:
            self._next_watch = now + TICK_S
            self._watch_or_give_up()
        if self.dirty and self._dirty_since is None:
            self._dirty_since = now
        if not self._locks.lead():
            return self._follow(now)
        if self._vanished:
            if self._is_sending():
                return TICK_S
            self._start_over()
        if not self._leading and not self._begin_to_lead():
            return TICK_S
        if now < self._retry_at:
            self._merge_if_many()
            return min(TICK_S, self._retry_at - now)
        if not self._reconciled:
            self._do_reconcile()
            now = self._clock.monotonic()
        self._acknowledge()
        if self._latecomer is not None:
            self._go_on_behind(self._latecomer)
        self._send_waiting()
        self._tend(now)
        if len(self._slots) >= self._max_in_flight:
            self._merge_if_many()
            return TICK_S
        if self._asked and self._slots and now < self._last_send + self._stride_s:
            return self._last_send + self._stride_s - now
        self._asked = False
        ticket = self._waits.ticket
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
            self._give_up(error, everywhere=False)
            self._locks.resign()
            raise

    # -- one that does not lead ---------------------------------------------------------------

    def _follow(self, now: float) -> float:
        """Tell the leader what there is to do."""
        self._asked = False
        error = self._refused()
        if error is not None:
            self._give_up(error, everywhere=False)
            return TICK_S
        if not self._reconciled and self._is_reconciled():
            self._set_reconciled()
        reached = True
        if self.dirty:
            self.dirty, self._dirty_since = False, None
            if self._capture.in_wal_mode:
                reached = self._peers.tell_leader({"op": "bell"})
        ticket = self._waits.ticket
        if ticket != self._asked_ticket or (
            self._waits.pending and now >= self._asked_at + FOLLOW_S
        ):
            reached = self._peers.tell_leader(
                {"op": "sync", "from": self._peers.name, "id": ticket}
            )
            self._asked_ticket, self._asked_at = ticket, now
        if reached:
            return FOLLOW_S
        # It has died, or is just beginning; once somebody leads everything is looked at anyway.
        self._asked_at = float("-inf")
        return _CHANGE_S

    def _begin_to_lead(self) -> bool:
        """The lock is ours: from the journal on, everything is as after a restart.

        Returns:
            False if nobody may commit any more.
        """
        with self._capture.mutex:
            error = self._refused()
            if error is None:
                self._peers.lead()
        if error is not None:
            self._give_up(error, everywhere=False)
            return False
        self._slots.clear()
        self._latecomer = None
        if not self._tending:
            self._levels.begin()
        self._covered_ticket = -1
        self._leading = True
        with self._changed:
            self._reconciled = False
        self.dirty = True
        self._retry_at = float("-inf")
        return True

    def _is_sending(self) -> bool:
        """Whether any segment is on its way."""
        return any(slot.in_flight for slot in self._slots.values())

    def _start_over(self) -> None:
        """Bucket or lease are gone: what comes back in their place may be empty, so the replica is
        compared with the record before anything more of it counts."""
        retry_at = self._retry_at
        self._vanished, self._leading = False, False
        self._newest_acked = None
        self._waits.uncover()
        if self._begin_to_lead():
            self._retry_at = retry_at

    # -- the one that leads -------------------------------------------------------------------

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
        elif self._capture.full_copy_reason is not None and self._capture.record.has_content():
            self._dirty_since = since if since is not None else now
            if not self._capture.in_wal_mode:
                self._progress.last_error = "not in WAL mode: run PRAGMA journal_mode=WAL"
                return TICK_S
            if now - self._dirty_since > 1.0:
                self._progress.last_error = "an open write transaction holds up the full copy"
            return _COPY_RETRY_S
        elif self._capture.full_copy_reason is None and self._capture.more:
            self._dirty_since = since if since is not None else now
            return _GATE_RETRY_S
        self._covered_ticket = ticket
        self._waits.cover(ticket, self._capture.state.txid)
        self._waits.acknowledge(self._acked_txid)
        return 0.0 if self.dirty and self._sync_interval_s <= 0 else TICK_S

    def _next_segment(self) -> Sealed | None:
        """Freeze what is new; None if nothing is."""
        progress, began = self._progress, self._clock.monotonic()
        progress.syncs += 1
        try:
            sealed = self._frozen()
            progress.disk_full = False
            return sealed
        except BaseException as error:
            progress.sync_errors += 1
            progress.disk_full = is_disk_full(error)
            raise
        finally:
            progress.sync_s += self._clock.monotonic() - began

    def _frozen(self) -> Sealed | None:
        if self._capture.full_copy_reason is None:
            sealed = self._capture.take()
            if sealed is None:
                self._watch_or_give_up()  # before a file that is gone is taken for an empty one
            return sealed
        self._watch_or_give_up()
        if not self._capture.record.has_content() or not self._capture.in_wal_mode:
            return None
        return self._capture.resync.take()

    def _merge_if_many(self) -> None:
        """Merge pieces that may not be sent yet; what stays as it is does no harm.

        In particular a disk that is full must not put off what would make room on it.
        """
        outgrown = self._capture.outgrows_database()
        if outgrown or len(self._capture.state.pieces) > MERGE_PIECES:
            try:
                self._capture.sealer.merge_pieces(everything=outgrown)
            except SpoolError as error:
                self._progress.last_error = str(error)

    def _do_reconcile(self) -> None:
        try:
            self._reconcile()
        except (ContinuityError, FencedError, RefusedError) as error:
            self._give_up(error, everywhere=True)
            self._fence.release()  # for somebody who may go on
            raise
        state = self._capture.state
        for sealed in state.segments:
            self._slots[sealed.txid] = _Slot(sealed, self._clock.monotonic())
        self._acked_txid = state.acked_txid
        self._set_reconciled()
        self._recovered()

    def _set_reconciled(self) -> None:
        with self._changed:
            self._reconciled = True
            self._changed.notify_all()

    def _give_up(self, error: ReplicaError, *, everywhere: bool) -> None:
        with self._changed:
            if self._fatal is not None:
                return
            self._fatal = error
            self._changed.notify_all()
        self._waits.end(error)
        self._on_give_up(error, everywhere)
        log.error("%s: %s", self._name, error)

    def _send_waiting(self) -> None:
        """Hand frozen segments to the request threads, oldest first."""
        if self._clock.monotonic() < self._retry_at or self._latecomer is not None:
            return
        # While there is trouble one request at a time finds out whether it is over.
        limit = 1 if self._failures else self._max_in_flight
        for slot in list(self._slots.values())[:limit]:
            if slot.in_flight or slot.done:
                continue
            slot.in_flight = True
            if self._fence.wants_renewal():
                self._renew()  # beside it, so that the acknowledgement need not wait
            self._request(slot.sealed.txid, partial(self._sender.send, slot.sealed))

    def _request(self, txid: int, action: Callable[[], float | None]) -> None:
        def carry_out() -> None:
            error: ReplicaError | None = None
            began: float | None = None
            try:
                began = action()
            except ReplicaError as caught:
                error = caught
            except Exception as caught:
                log.exception("%s: unexpected error in a request", self._name)
                error = ReplicaError(f"unexpected error in a request: {caught!r}")
            self._outcomes.put(_Outcome(txid, error, began))
            self._poke()

        self._requests.submit(carry_out)

    def _go_on_behind(self, latecomer: Latecomer) -> None:
        """Leave the TXID of our first slot to a former writer's segment, and begin anew behind it.

        What was frozen may be under way still, and must not meet what takes its TXIDs: it is waited
        for.  Where some of it has arrived it rests on a segment that has not, and gives way.
        """
        if self._is_sending():
            return
        segment = latecomer.segment
        self._capture.record.go_on_behind(
            segment.max_txid, latecomer.sha256, latecomer.timestamp_ms
        )
        self._latecomer = None
        self._slots.clear()
        self._acked_txid = segment.max_txid
        self._levels.acknowledged(segment.max_txid, segment.size_bytes, segment.created_ms)
        self._waits.uncover()
        self._covered_ticket = -1
        self.dirty = True

    def _renew(self) -> None:
        if not self._renewing:
            self._renewing = True
            self._request(0, self._fence.renew)

    def _tend(self, now: float) -> None:
        """Have merged and cleaned up what is due."""
        if not self._tending and now >= self._levels.due:
            self._tending = True
            self._request(_TENDING, self._levels.step)

    def _look_back(self) -> None:
        """While there is traffic: is what was acknowledged a while ago still what we put there?"""
        now = self._clock.monotonic()
        if now < self._last_look + _LOOK_BACK_S or not self._fence.works:
            return
        older, self._last_look = self._newest_acked, now
        if older is not None:
            self._request(-1, lambda: self._sender.check_still_ours(older))

    def _collect_outcomes(self) -> None:
        failed: ReplicaError | None = None
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except queue.Empty:
                break
            if outcome.txid == 0:
                self._renewing = False
            elif outcome.txid == _TENDING:
                self._tending = False
            slot = self._slots.get(outcome.txid)
            if slot is not None:
                slot.in_flight = False
            if isinstance(outcome.error, Latecomer):
                self._latecomer = outcome.error if slot is not None else None
            elif isinstance(outcome.error, FencedError | RefusedError):
                self._give_up(outcome.error, everywhere=True)
            elif outcome.error is not None:
                if outcome.txid >= 0:
                    failed = outcome.error
                    self._vanished = self._vanished or _has_vanished(failed)
            elif slot is not None:
                slot.done = True
                slot.began = outcome.began
                if outcome.began is not None:
                    self._note_duration(self._clock.monotonic() - outcome.began)
                self._progress.uploads += 1
                self._progress.upload_bytes += slot.sealed.size_bytes
                self._progress.last_upload_ms = self._clock.now_ms()
        if self._fatal is None and self._reconciled and not self._vanished:
            self._acknowledge()
        if failed is not None:
            self._failed(failed)

    def _note_duration(self, seconds: float) -> None:
        """Spread the segments in flight evenly over the time that one takes."""
        stride_s = min(seconds / self._max_in_flight, _LONGEST_STRIDE_S)
        self._stride_s += (stride_s - self._stride_s) / 8

    def _acknowledge(self) -> None:
        """Count finished segments, in TXID order, without a gap, and under a proven lease."""
        acked: Sealed | None = None
        for txid, slot in list(self._slots.items()):
            if not slot.done:
                break
            if not self._fence.holds():
                if self._clock.monotonic() >= self._retry_at:
                    self._renew()
                break
            if slot.began is not None:
                self._fence.created(slot.began)
            acked = slot.sealed
            self._levels.acknowledged(txid, acked.size_bytes, acked.timestamp_ms)
            del self._slots[txid]
        if acked is None:
            return
        self._recovered()  # before it is let go of: what was waiting is said there
        self._capture.acknowledge(acked.txid)
        self._acked_txid = acked.txid
        self._waits.acknowledge(acked.txid)
        self._look_back()
        self._newest_acked = acked

    def _failed(self, error: ReplicaError) -> float:
        """Note a failure and back off.  One line in the log for each kind of trouble, not for each
        attempt; a hiccup that the second attempt mends is not worth one."""
        now = self._clock.monotonic()
        self._progress.last_error = str(error)
        if self._fatal is not None:
            return TICK_S  # that was said, and nothing is tried again
        if now < self._retry_at:
            return self._retry_at - now  # one of several that were under way: it counts once
        self._failures += 1
        retryable = isinstance(error, StoreError) and error.retryable
        first = BACKOFF_FIRST_S if retryable else BACKOFF_REFUSED_S
        wait = min(BACKOFF_LONGEST_S, first * float(1 << min(self._failures - 1, 10)))
        wait *= 0.5 + self._rng.random() / 2
        self._retry_at = now + wait
        if self._down_since is None:
            self._down_since = now
        kind = _kind_of(error)
        if kind != self._told and (not retryable or self._failures >= 3):
            self._told = kind
            log.warning("%s: cannot replicate: %s (trying again)", self._name, error)
        return wait

    def _recovered(self) -> None:
        if self._failures and self._told is not None:
            down = self._clock.monotonic() - (self._down_since or 0.0)
            log.warning(
                "%s: replicating again after %.1f s; %s of changes were waiting",
                self._name,
                down,
                _in_words(self._capture.waiting_bytes()),
            )
        self._failures = 0
        self._retry_at = float("-inf")
        self._down_since = None
        self._told = None
        self._progress.last_error = None


def error_of(kind: str, text: str) -> ReplicaError:
    """The error that another process has recorded, by its class name and message."""
    for known in (FencedError, RefusedError, ClosedError):
        if kind == known.__name__:
            return known(text)
    return ContinuityError(text) if kind == ContinuityError.__name__ else ReplicaError(text)


def _has_vanished(error: ReplicaError) -> bool:
    """Whether an upload or a renewal found no bucket, or no lease."""
    if isinstance(error, StoreError):
        return isinstance(error, ObjectNotFound) or error.code == "NoSuchBucket"
    return False


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that there is no room on the disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__
    return False


def _kind_of(error: ReplicaError) -> str:
    """What makes two failures the same trouble to whoever reads the log."""
    code = error.code if isinstance(error, StoreError) else None
    return f"{type(error).__name__} {code or ''}"


def _in_words(n_bytes: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes = n_bytes / 1000  # type: ignore[assignment]
    return f"{n_bytes:.3g} GB"
