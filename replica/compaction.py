"""Carries out what `levels` plans: merges segments, takes snapshots, deletes what is not needed.

One `Levels` for each database, at work only in the process that uploads.  What it knows of the
replica is one listing, taken when there is first something to do and kept up to date from then on
with what this process does: nobody else writes there.  So a database at rest sends no requests.

Segments are merged in bounded memory (`merging`), large ones in a process of low priority, so that
the application does not feel it.  A single input is copied inside the store.  Segments are deleted
only by a later step, when the merged one is known to be there, and, like everything that changes
the replica, only under a lease that is proven.

A crash between any two requests leaves a replica that restores: what was merged lies there twice,
and the next listing shows it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from .child import ChildError
from .clock import Clock
from .config.levels import LevelSettings
from .errors import (
    ClosedError,
    FormatError,
    RestoreError,
    StoreError,
)
from .files import Files
from .format.ltx import PageEncoding
from .format.types import LEVEL_SNAPSHOT, format_segment_name
from .levels import (
    KEPT_L0,
    Compaction,
    L0Files,
    Listing,
    compactions,
    expired,
    expired_l0,
    full_snapshot,
    is_due,
    l0_files,
    next_due_ms,
    snapshot,
)
from .marks import KnownMarks, list_marks, pinned
from .merging import Apart, Input, Made, Merge, carry_out
from .sqlite import FencedError
from .store.base import ObjectStore, SegmentInfo, list_segments, segment_key

__all__ = ["Kept", "Levels"]

log = logging.getLogger("walship.levels")

#: Merges of so many bytes or more are made in another process: below, starting it costs more than
#: it does.
_APART_BYTES: Final = 2 * 1024 * 1024
#: Waits after failures double from the first to the second, seconds.
_BACKOFF_FIRST_S: Final = 1.0
_BACKOFF_LONGEST_S: Final = 300.0
#: The same after damage, for the level that it is in the way of.
_DAMAGE_FIRST_S: Final = 30.0
_DAMAGE_LONGEST_S: Final = 3600.0
#: Keys in one request to delete.
_DELETE_BATCH: Final = 1000

#: Of so many TXIDs one is cleaned up after at once.
_SHORT_LIVES: Final = 32
_NEVER: Final = float("inf")

_T = TypeVar("_T")

_SUFFIX: Final = ".kept"
_MERGING: Final = ".merging"


class Kept:
    """Segments on this disk that will be merged soon, so that no request is needed for them.

    Files in the state directory, bounded; nothing relies on them: what is not here is read from the
    replica.  They do not outlive the process, because another history may have been begun
    meanwhile.  Thread-safe.

    Args:
        directory: where they lie.
        max_bytes: of all together; the oldest go first.
    """

    def __init__(self, directory: Path, files: Files, max_bytes: int = 64 * 1024 * 1024) -> None:
        self._directory = directory
        self._files = files
        self._max_bytes = max_bytes
        # Guards what follows, not the files.
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._total = 0

    def clear(self) -> None:
        """Remove all of them, those of earlier processes and what these were merging too."""
        with self._lock:
            self._sizes.clear()
            self._total = 0
        with contextlib.suppress(OSError):
            for name in self._files.names(self._directory):
                if name.endswith((_SUFFIX, _MERGING)):
                    self._files.unlink(self._directory / name)

    def keep(self, level: int, min_txid: int, max_txid: int, body: bytes | Path) -> None:
        """Keep a segment's bytes: a copy of ``body``, or a second name for the file.

        Never raises; what cannot be kept is not.  Not twice at once for one segment.
        """
        name = f"{level}-{format_segment_name(min_txid, max_txid)}{_SUFFIX}"
        self._drop([name])
        with contextlib.suppress(OSError):
            size = len(body) if isinstance(body, bytes) else self._files.stat(body).st_size
            if size > self._max_bytes // 4:
                return
            self._write(self._directory / name, body)
            with self._lock:
                self._sizes[name] = size
                self._total += size
                excess, outdated = self._total - self._max_bytes, []
                for oldest, its_size in self._sizes.items():
                    if excess <= 0:
                        break
                    outdated.append(oldest)
                    excess -= its_size
            self._drop(outdated)

    def _write(self, path: Path, body: bytes | Path) -> None:
        if isinstance(body, Path):
            with contextlib.suppress(FileNotFoundError):
                self._files.unlink(path)
            os.link(body, path)
            return
        fd = self._files.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            self._files.write(fd, [body])
        finally:
            self._files.close(fd)

    def path(self, segment: SegmentInfo) -> Path | None:
        """Where a kept segment lies, or lay a moment ago; None if it is not here."""
        name = _kept_name(segment)
        with self._lock:
            is_here = self._sizes.get(name) == segment.size_bytes
        return self._directory / name if is_here else None

    def drop(self, segments: Sequence[SegmentInfo]) -> bool:
        """Let go of segments, and say whether any was here."""
        return self._drop([_kept_name(segment) for segment in segments])

    def _drop(self, names: Sequence[str]) -> bool:
        with self._lock:
            sizes = {name: self._sizes.pop(name) for name in names if name in self._sizes}
            self._total -= sum(sizes.values())
        for name in sizes:
            with contextlib.suppress(OSError):
                self._files.unlink(self._directory / name)
        return bool(sizes)


def _kept_name(segment: SegmentInfo) -> str:
    name = format_segment_name(segment.min_txid, segment.max_txid)
    return f"{segment.level}-{name}{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class _Damage:
    """What is in the way of a level: when to try again, how often it was tried, what it is."""

    retry_at: float
    failures: int
    text: str


class Levels:
    """Levels, snapshots and retention of one replica.

    `step` is for one thread at a time; the other methods may be called from any thread.

    Args:
        name: of the database, for the log.
        store: the replica; one attempt a call.
        settings: what is merged when, and how long it is kept.
        directory: for temporary files: the state directory.
        prove: returns while this process is the replica's writer, and raises otherwise.
        acked_txid: highest TXID known to be in the replica with all before it.
        full_txid: of the newest full copy, 0 without: nothing older is needed to restore that.
        encoding: how pages are stored in merged segments.
        is_stopping: true once nothing should be begun any more.
        kept: what need not be read from the replica.
        apart: carries out large merges; None if that is done in the thread that steps.
    """

    def __init__(
        self,
        name: str,
        store: ObjectStore,
        clock: Clock,
        settings: LevelSettings,
        *,
        directory: Path,
        files: Files,
        prove: Callable[[], None],
        acked_txid: Callable[[], int],
        full_txid: Callable[[], int] = lambda: 0,
        encoding: PageEncoding = PageEncoding.BLOCK,
        is_stopping: Callable[[], bool] = lambda: False,
        kept: Kept | None = None,
        apart: Apart | None = None,
    ) -> None:
        self._name = name
        self._store = store
        self._clock = clock
        self._settings = settings
        self._directory = directory
        self._files = files
        self._prove = prove
        self._acked_txid = acked_txid
        self._full_txid = full_txid
        self._encoding = encoding
        self._is_stopping = is_stopping
        self._kept = kept or Kept(directory, files)
        self._apart = apart
        self._apart_failed = False
        self._news: queue.SimpleQueue[SegmentInfo] = queue.SimpleQueue()
        self._demands: queue.SimpleQueue[tuple[bool, Future[int]]] = queue.SimpleQueue()
        # Guards changes of `due`, by `step` and by what is acknowledged meanwhile.
        self._due_lock = threading.Lock()
        #: When `step` wants to be called, by the monotonic clock; infinite while all is done.
        self.due = _NEVER
        #: The segments of level 0 as they were found last; None as long as nobody has looked.
        self.l0: L0Files | None = None
        #: How often something that was to be merged turned out to be damaged.
        self.n_damaged = 0
        # For the thread that steps.
        self._listing: Listing | None = None
        # TXID of the newest full copy that needs no snapshot made of it: the first one never does.
        self._full_held = 1
        self._last_ms: dict[int, int] = {}
        self._marks: KnownMarks = {}
        self._active = False
        self._resting = False
        self._failures = 0
        self._retry_at = -_NEVER
        self._told = ""
        self._damaged: dict[int, _Damage] = {}
        self._can_copy = True
        self._conditional = True

    # -- from the uploader --------------------------------------------------------------------

    def sent(self, txid: int, body: bytes | Path) -> None:
        """A level-0 segment was sent, acknowledged or not; its bytes will be wanted again."""
        if txid > 1 and self._settings.intervals_s:
            self._kept.keep(0, txid, txid, body)

    def acknowledged(self, txid: int, size_bytes: int, timestamp_ms: int) -> None:
        """A level-0 segment is in the replica, with all before it."""
        owes_snapshot = self._full_txid() > self._full_held
        if not self._is_on and not owes_snapshot:
            return
        key = segment_key(self._store, 0, txid, txid)
        self._resting = False
        self._news.put(SegmentInfo(0, txid, txid, size_bytes, timestamp_ms, key))
        if self._listing is None and txid <= KEPT_L0 and not owes_snapshot:
            return  # all of it stays in level 0, so nobody need look
        # A program that is opened for a moment at a time must clean up now and then.
        at_once = owes_snapshot or (self._listing is None and txid % _SHORT_LIVES == 0)
        wait_s = 0.0 if at_once else self._until_merge_s()
        self._want(max(wait_s, self._retry_at - self._clock.monotonic()))

    @property
    def _is_on(self) -> bool:
        """Whether anything is merged by itself."""
        return bool(self._settings.intervals_s or self._settings.snapshot_interval_s)

    def begin(self) -> None:
        """This process has become the one that uploads: forget what was known of the replica."""
        self._listing = self.l0 = None
        self._full_held = 1
        self._active = self._resting = False
        self._damaged.clear()
        self.due = _NEVER
        self._kept.clear()

    def rest(self) -> None:
        """The lease is about to be given up: change nothing more until something is acknowledged.

        Returns at once; a request that is under way may still take effect, and does no harm.
        """
        self._resting = True
        if self._apart is not None:
            self._apart.kill(wait=False)

    def stop(self) -> None:
        """The database is closed: there is no process that merges any more when this returns."""
        self._resting = True
        if self._apart is not None:
            self._apart.kill(wait=True)

    def leave_database(self) -> None:
        """It is about to be closed: no process of ours reads it any more when this returns."""
        if self._apart is not None:
            self._apart.leave_database()

    def enter_database(self) -> None:
        """It is being opened: snapshots may be made of its own pages again."""
        if self._apart is not None:
            self._apart.enter_database()

    def forget(self) -> None:
        """In a forked child, whose process that merges is its parent's."""
        if self._apart is not None:
            self._apart.forget()

    def demand(self, *, snapshot: bool) -> Future[int]:
        """Ask that what is due be done now: merging, removing what need not be kept any more.

        Args:
            snapshot: have one of the newest state that the replica has, whatever the interval.

        Returns:
            The TXID of the newest snapshot, which is that state unless it is damaged; ends with the
            error that was in the way, and is not tried again.
        """
        future: Future[int] = Future()
        self._demands.put((snapshot, future))
        self._want(0.0)
        return future

    def _want(self, wait_s: float) -> None:
        """Have `step` called in so many seconds, or earlier if somebody else wants that."""
        with self._due_lock:
            self.due = min(self.due, self._clock.monotonic() + wait_s)

    def _until_merge_s(self) -> float:
        """Until the next multiple of the shortest interval."""
        levels = self._settings.levels or (LEVEL_SNAPSHOT,)
        interval_ms = self._settings.interval_ms(levels[0])
        if not interval_ms:
            return _NEVER
        return (interval_ms - self._clock.now_ms() % interval_ms) / 1000

    # -- the work -----------------------------------------------------------------------------

    def step(self) -> None:
        """Do what is due, and set `due` anew: requests, merges, deletions; may take long.

        Raises:
            FencedError: another writer has the replica.
        """
        with self._due_lock:
            self.due = _NEVER
        demands = _all_of(self._demands)
        try:
            self._active = self._active or bool(demands)
            if not self._is_on:
                self._listing = None  # little was added to it
            wait_s = self._step(snapshot_demanded=any(snapshot for snapshot, _ in demands))
        except ClosedError as error:
            _end(demands, error)
            return
        except FencedError as error:
            _end(demands, error)
            raise
        except (StoreError, FormatError, RestoreError, OSError) as error:
            _end(demands, error)
            wait_s = self._failed(error)
            self._retry_at = self._clock.monotonic() + wait_s
        else:
            self._failures, self._told, self._retry_at = 0, "", -_NEVER
            snapshots = self._listing[LEVEL_SNAPSHOT] if self._listing is not None else ()
            _end(demands, snapshots[-1].max_txid if snapshots else 0)
        self._want(wait_s)

    def _step(self, *, snapshot_demanded: bool) -> float:
        now = self._clock.monotonic()
        if any(damage.retry_at <= now for damage in self._damaged.values()):
            self._listing = None  # somebody may have mended it
        listing = self._current()
        if listing is None:
            return _NEVER
        now_ms = self._clock.now_ms()
        self._begin_with_full_copy(listing)
        self._merge_all(listing, now_ms)
        if snapshot_demanded:
            made = snapshot(listing, self._settings, now_ms, demanded=True)
            if made is not None:
                self._carry_out(listing, made)
        self._delete_expired(listing, now_ms)
        self.l0 = l0_files(listing, self._settings, now_ms)
        due_ms = next_due_ms(listing, self._settings, now_ms)
        waits_s = [damage.retry_at - now for damage in self._damaged.values()]
        if due_ms is not None:
            waits_s.append((due_ms - self._clock.now_ms()) / 1000)
        return max(0.0, min(waits_s, default=_NEVER))

    def _may_go_on(self) -> None:
        """Raise if nothing should be changed any more."""
        self._look_up()
        self._prove()

    def _look_up(self) -> None:
        if self._resting or self._is_stopping():
            raise ClosedError(f"{self._name} was closed meanwhile")

    def _current(self) -> Listing | None:
        """The listing with what was acknowledged since; None while nothing ever was."""
        news = _all_of(self._news)
        self._active = self._active or bool(news)
        if self._listing is None:
            if not self._active:
                return None
            self._listing = self._list()
        for segment in news:
            self._listing.add(segment)
        return self._listing

    def _list(self) -> Listing:
        listing = Listing()
        acked_txid = self._acked_txid()
        for level in range(LEVEL_SNAPSHOT + 1):
            for segment in list_segments(self._store, level):
                # Empty objects are left of uploads whose client died after the headers.
                if segment.size_bytes and (level or segment.max_txid <= acked_txid):
                    listing.add(segment)
        return listing

    def _failed(self, error: Exception) -> float:
        """Say so once, and begin again later with a new listing."""
        self._listing = None
        self._failures += 1
        wait = min(_BACKOFF_LONGEST_S, _BACKOFF_FIRST_S * 2.0 ** min(self._failures - 1, 10))
        retryable = isinstance(error, StoreError) and error.retryable
        kind = type(error).__name__
        if kind != self._told and (self._failures >= 3 or not retryable):
            self._told = kind
            log.warning(
                "%s: cannot compact or clean up the replica: %s (trying again; nothing is lost)",
                self._name,
                error,
            )
        return wait

    # -- merging ------------------------------------------------------------------------------

    def _begin_with_full_copy(self, listing: Listing) -> None:
        """Have a snapshot of a full copy that came late, after a reset perhaps: whatever is wrong
        with what is older, this and all that follows can be restored."""
        full_txid = self._full_txid()
        if full_txid > self._acked_txid():
            return
        made = full_snapshot(listing, full_txid)
        if made is not None:
            self._carry_out(listing, made)
        if listing.reach(LEVEL_SNAPSHOT) >= full_txid:
            listing.start = max(1, full_txid)
            self._full_held = listing.start

    def _merge_all(self, listing: Listing, now_ms: int) -> None:
        """Merge what is due.  What is damaged is in nobody's way but its own level's, and then
        those above."""
        for level in (*self._settings.levels, LEVEL_SNAPSHOT):
            interval_ms = self._settings.interval_ms(level)
            if not interval_ms or not is_due(interval_ms, self._last_ms.get(level), now_ms):
                continue
            damage = self._damaged.get(level)
            if damage is not None and self._clock.monotonic() < damage.retry_at:
                continue
            try:
                for compaction in self._due_in(listing, level, now_ms):
                    self._carry_out(listing, compaction)
            except (FormatError, RestoreError) as error:
                self._note_damage(level, str(error))
            else:
                self._last_ms[level] = now_ms
                self._damaged.pop(level, None)

    def _note_damage(self, level: int, text: str) -> None:
        """Leave a level alone for a while; said once."""
        self.n_damaged += 1
        before = self._damaged.get(level)
        failures = 1 if before is None else before.failures + 1
        wait_s = min(_DAMAGE_LONGEST_S, _DAMAGE_FIRST_S * 2.0 ** min(failures - 1, 10))
        self._damaged[level] = _Damage(self._clock.monotonic() + wait_s, failures, text)
        if before is None or before.text != text:
            log.warning(
                "%s: what goes into level %d of the replica cannot be merged: %s (what is newer "
                "stays as it is; `walship reset` makes a full copy)",
                self._name,
                level,
                text,
            )

    def _due_in(self, listing: Listing, level: int, now_ms: int) -> Sequence[Compaction]:
        if level != LEVEL_SNAPSHOT:
            return compactions(listing, self._settings, level, now_ms)
        due = snapshot(listing, self._settings, now_ms)
        return () if due is None else (due,)

    def _carry_out(self, listing: Listing, compaction: Compaction) -> None:
        self._may_go_on()
        began = self._clock.monotonic()
        is_copy = len(compaction.inputs) == 1 and not compaction.is_full
        made = self._copy(compaction) if is_copy else None
        if made is None:
            made = self._merge(compaction)
        listing.add(made)
        if compaction.level != LEVEL_SNAPSHOT:
            self._kept.drop(compaction.inputs)
        log.debug(
            "%s: level %d: %d segments of %d bytes became %s of %d bytes in %.3f s",
            self._name,
            compaction.level,
            len(compaction.inputs),
            sum(segment.size_bytes for segment in compaction.inputs),
            made.key,
            made.size_bytes,
            self._clock.monotonic() - began,
        )

    def _key(self, compaction: Compaction) -> str:
        return segment_key(self._store, compaction.level, compaction.min_txid, compaction.max_txid)

    def _copy(self, compaction: Compaction) -> SegmentInfo | None:
        """Copy a single input inside the store; None where it cannot."""
        (source,) = compaction.inputs
        if not self._can_copy:
            return None
        key = self._key(compaction)
        try:
            info = self._store.copy(source.key, key)
        except StoreError as error:
            if error.code != "NotImplemented":
                raise
            log.info("%s: %s cannot copy objects", self._name, self._store.url)
            self._can_copy = False
            return None
        return SegmentInfo(
            compaction.level,
            compaction.min_txid,
            compaction.max_txid,
            info.size_bytes,
            compaction.timestamp_ms,
            key,
        )

    def _merge(self, compaction: Compaction) -> SegmentInfo:
        # No other process, nor an earlier one with the same id, has this name.
        path = self._directory / f"{os.getpid()}-{self._clock.now_ms()}{_MERGING}"
        inputs = [Input(each, self._kept.path(each)) for each in compaction.inputs]
        job = Merge(
            inputs=inputs,
            min_txid=compaction.min_txid,
            max_txid=compaction.max_txid,
            timestamp_ms=compaction.timestamp_ms,
            encoding=self._encoding,
            path=path,
            key=self._key(compaction),
            conditional=self._conditional,
            is_full=compaction.is_full,
            # Made of the database itself, where that is possible.
            is_newest=compaction.level == LEVEL_SNAPSHOT and not compaction.is_full,
        )
        try:
            try:
                made = self._run(job)
            except FormatError:
                # What is kept here may have been damaged by a crash of the system.
                if not self._kept.drop(compaction.inputs):
                    raise
                made = self._run(replace(job, inputs=[Input(each) for each in compaction.inputs]))
            self._conditional = made.conditional
            found = SegmentInfo(
                compaction.level,
                compaction.min_txid,
                made.max_txid,
                made.size_bytes,
                made.timestamp_ms,
                made.key,
            )
            if compaction.level in self._settings.levels[:-1]:
                self._kept.keep(found.level, found.min_txid, found.max_txid, path)
            return found
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._files.unlink(path)

    def _run(self, job: Merge) -> Made:
        """Carry a merge out: in another process if it is large."""
        n_bytes = sum(each.segment.size_bytes for each in job.inputs)
        if self._apart is not None and n_bytes >= _APART_BYTES:
            try:
                made = self._apart.run(job, look_up=self._look_up, may_put=self._may_go_on)
                self._apart_failed = False
                return made
            except ChildError as error:
                if not self._apart_failed:
                    self._apart_failed = True
                    log.warning(
                        "%s: segments cannot be merged in another process: %s (it is done in this "
                        "one, whose commits may feel it)",
                        self._name,
                        error,
                    )
        return carry_out(
            job, self._store, self._files, look_up=self._look_up, may_put=self._may_go_on
        )

    # -- deleting -----------------------------------------------------------------------------

    def _delete_expired(self, listing: Listing, now_ms: int) -> None:
        if not self._find_expired(listing, now_ms):
            return
        # Others make and remove marks.  One that is made from now on is of the newest state, and
        # what leads there is not removed.
        marks = list_marks(self._store, self._marks)
        listing.pinned = pinned(listing, (mark.txid for mark in marks))
        # Snapshots before what they stand on, so that no listing shows one that nothing leads to.
        doomed = self._find_expired(listing, now_ms)
        for kind in (
            [each for each in doomed if each.level == LEVEL_SNAPSHOT],
            [each for each in doomed if 0 < each.level < LEVEL_SNAPSHOT],
            [each for each in doomed if each.level == 0],
        ):
            self._delete(listing, kind)
        if self._is_l0_due(now_ms):
            self._last_ms[0] = now_ms

    def _find_expired(self, listing: Listing, now_ms: int) -> list[SegmentInfo]:
        doomed = expired(listing, self._settings, now_ms)
        if self._is_l0_due(now_ms):
            doomed += expired_l0(listing, self._settings, now_ms)
        return doomed

    def _is_l0_due(self, now_ms: int) -> bool:
        check_ms = round(self._settings.l0_retention_check_interval_s * 1000)
        return is_due(check_ms, self._last_ms.get(0), now_ms)

    def _delete(self, listing: Listing, doomed: Sequence[SegmentInfo]) -> None:
        for start in range(0, len(doomed), _DELETE_BATCH):
            batch = doomed[start : start + _DELETE_BATCH]
            self._may_go_on()
            try:
                self._store.delete([segment.key for segment in batch])
            except StoreError as error:
                if error.retryable:
                    raise
                # Asking for ever would keep an idle database busy.
                self._settings = replace(self._settings, retention=False)
                log.warning(
                    "%s: what is old cannot be removed from %s and stays there: %s (grant the "
                    "right to delete, or set retention: false)",
                    self._name,
                    self._store.url,
                    error,
                )
                return
            listing.remove(batch)


def _all_of(waiting: queue.SimpleQueue[_T]) -> list[_T]:
    """Take everything out of a queue."""
    found: list[_T] = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(waiting.get_nowait())
    return found


def _end(demands: Sequence[tuple[bool, Future[int]]], outcome: int | Exception) -> None:
    for _, future in demands:
        if not future.set_running_or_notify_cancel():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
