"""Keeps a local copy of a database at the newest state of its replica: once, or continuously.

It sits on `replica.restore` (the first copy), `replica.listing` and `replica.plan` (what is new),
and `replica.local_copy` (transactions that readers see whole).  A look costs one LIST request: of
level 0, from the segment that was applied last.  That segment is in the answer, because the newest
one is never deleted, and shows that the replica still has the same history.  Only when it is gone,
or a gap follows it, are the other levels listed; and where those do not lead on either, a snapshot
is read and the pages that differ are written.

What the copy holds is noted in ``<output>-txid``: the TXID in the first line, as Litestream writes
it, and in the second what proves that nobody else wrote to the file.  The note is written before
and after each transaction.  One that was under way when the process ended may have happened or not:
where the log does not tell, the next transaction must reach its TXID at least, because applied on
top of it anything less would make a database that never was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from .catchup import fetched
from .check import IntegrityMode
from .clock import Clock
from .errors import (
    ConfigError,
    ContinuityError,
    FormatError,
    ObjectNotFound,
    OutputExistsError,
    RestoreError,
    StoreError,
)
from .format.ltx import Decoder
from .format.types import LEVEL_SNAPSHOT, WalSalts, format_txid, parse_txid
from .listing import Live, list_replica, live_segments
from .local_copy import FileMark, LocalCopy, LogEnd, Transaction, put_into_wal_mode
from .plan import plan, plan_from
from .restore import Progress, RestoreResult, output_file, restore, with_metadata_times
from .store.base import PREVIOUS_METADATA, ObjectStore, SegmentInfo, list_segments
from .store.local import write_durably

__all__ = ["Follower", "Step", "follow", "note_path", "update"]

_log = logging.getLogger(__name__)

#: Segments are applied together up to this size: fewer syncs while catching up, and a log that
#: does not outgrow this by more than one segment.
_BATCH_BYTES: Final = 64 << 20
#: Plans in a row that fail because their objects are gone, before that is an error.
_REPLANS: Final = 5
#: Requests at once while catching up.
_AT_ONCE: Final = 8
_RANGE_BYTES: Final = 8 << 20
#: While the store is away there is a look at least this often, seconds.
_PAUSE_MAX_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Step:
    """What brought a copy forward.

    Attributes:
        txid: the state it holds now.
        n_segments, size_bytes: what was fetched for it.
        n_pages: pages that were written.
        commit: size of the database in pages.
    """

    txid: int
    n_segments: int = 0
    size_bytes: int = 0
    n_pages: int = 0
    commit: int = 0


@dataclass(frozen=True, slots=True)
class _Note:
    """What is known about a copy.

    Attributes:
        txid: the state it holds.
        to: TXID of a transaction that was about to be committed; 0 without.
        ends: where its log may end.  Empty: nobody knows.
        mark: of the file, if everything was in it when it was closed.
        segment: the segment of level 0 that ends at ``txid``, by what the listing shows of it;
            empty if nobody knows.
        sha256: digest of that segment; empty if nobody knows.
    """

    txid: int
    to: int = 0
    ends: tuple[LogEnd, ...] = ()
    mark: FileMark | None = None
    segment: str = ""
    sha256: str = ""

    def pack(self) -> bytes:
        facts = {
            "to": self.to,
            "ends": self.ends,
            "mark": self.mark,
            "segment": self.segment,
            "sha256": self.sha256,
        }
        return f"{format_txid(self.txid)}\n{json.dumps(facts)}\n".encode()

    @classmethod
    def parse(cls, text: bytes) -> _Note:
        """Read a note; one that holds nothing but a TXID is Litestream's.

        Raises:
            FormatError: it is damaged.
        """
        first, _, rest = text.decode("ascii", "replace").strip().partition("\n")
        txid = parse_txid(first.strip())
        if not rest:
            return cls(txid)
        try:
            facts = json.loads(rest)
            ends = tuple(
                LogEnd(WalSalts(*salts), int(n_frames), (int(checksum[0]), int(checksum[1])))
                for salts, n_frames, checksum in facts["ends"]
            )
            mark = None if facts["mark"] is None else FileMark(*map(int, facts["mark"]))
            return cls(
                txid, int(facts["to"]), ends, mark, str(facts["segment"]), str(facts["sha256"])
            )
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise FormatError(f"not a note of walship's: {error}") from None


def note_path(output: Path) -> Path:
    """Where it is noted which TXID a copy holds."""
    return Path(f"{output}-txid")


@dataclass(slots=True)
class Follower:
    """An open copy that is taken forward by `step`.  Use from one thread, and `close` it.

    Make one with `Follower.open`.

    Attributes:
        txid: the state the copy holds.
    """

    store: ObjectStore
    output: Path
    copy: LocalCopy
    note: _Note
    # After a transaction of which nobody knows whether it happened: the next must reach this TXID.
    _at_least: int = 0
    _end: LogEnd = field(init=False)
    _warned: bool = False

    def __post_init__(self) -> None:
        self._end = self.copy.end()

    @property
    def txid(self) -> int:
        return self.note.txid

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        output: str | os.PathLike[str],
        *,
        clock: Clock,
        overwrite: bool = False,
        txid: int | None = None,
        timestamp_ms: int | None = None,
        parallelism: int = 8,
        integrity_check: IntegrityMode = "none",
        verify: Literal["auto", "full"] = "auto",
        progress: Progress | None = None,
    ) -> tuple[Follower, RestoreResult | None]:
        """Open a copy, or make it by a restore if there is none (or ``overwrite``).

        Returns:
            The follower, and what the restore did if there was one.

        Raises:
            OutputExistsError: a file is there and nobody knows which TXID it holds.
            ContinuityError: somebody else has written to the copy.
            ReplicaError: as `replica.restore.restore`.
        """
        # SQLite keeps a log beside the file that a link leads to.
        target = Path(os.path.realpath(output_file(output)))
        made: RestoreResult | None = None
        if overwrite or not _size_of(target):
            made = restore(
                store,
                target,
                clock=clock,
                txid=txid,
                timestamp_ms=timestamp_ms,
                parallelism=parallelism,
                integrity_check=integrity_check,
                verify=verify,
                progress=progress,
                overwrite=overwrite,
                # Noted before the file has its name: a file without a note could not be continued.
                inspect=lambda result: _write_note(target, _first_note(store, result)),
            )
        note = _read_note(target)
        _check_mark(target, note)
        copy = LocalCopy(target)
        try:
            resolved, at_least = _resolved(target, note, copy.end())
            if resolved != note:
                _write_note(target, resolved)
            note = resolved
            return cls(store, target, copy, note, at_least), made
        except BaseException:
            copy.close()
            raise

    def step(self) -> Step | None:
        """Bring the copy to the newest state that can be reached; None if it holds that already.

        Raises:
            ContinuityError: the replica is not the one that was followed, or somebody else has
                written to the copy.  The copy holds a state of the replica as it was.
            FormatError: a segment is damaged; the copy was not changed by it.
            StoreError: from the store.
            RestoreError: the copy cannot be written, or the replica is listed and cannot be read.
        """
        return self._replanning(self._newest)

    def reach(self, *, txid: int | None, timestamp_ms: int | None) -> Step | None:
        """Bring the copy to a later state; without a target to the newest.

        Raises:
            RestoreError: the copy is newer.
            NoBackupError: the state cannot be restored.
            ReplicaError: as `step`.
        """
        if txid is None and timestamp_ms is None:
            return self.step()
        return self._replanning(lambda: self._towards(txid, timestamp_ms))

    def close(self) -> None:
        """Leave a file that is complete by itself, if nobody else has it open, and note that."""
        end, mark = self.copy.end(), self.copy.close()
        if not self._at_least and not self.note.to:
            known = () if mark else (end,)
            _write_note(self.output, replace(self.note, to=0, ends=known, mark=mark))

    def _replanning(self, find: Callable[[], tuple[list[SegmentInfo], Live]]) -> Step | None:
        for attempt in range(1, _REPLANS + 1):
            segments, live = find()
            if not segments:
                return None
            try:
                return self._apply(segments, live)
            except ObjectNotFound as error:
                # Compaction or retention came first.  What replaces it is listed by now.
                _log.info("an object disappeared, planning again: %s", error)
                if attempt == _REPLANS:
                    raise RestoreError(
                        f"the replica is listed but cannot be read, {attempt} times in a row:"
                        f" {error}"
                    ) from error
        raise AssertionError

    def _newest(self) -> tuple[list[SegmentInfo], Live]:
        """What leads to the newest state; nothing if there is nothing new."""
        store, txid = self.store, self.txid
        listing = list(list_segments(store, 0, after_txid=txid - 1))
        own = next((each for each in listing if each.max_txid == txid), None)
        if own is not None:
            self._recognise(own)
        if own is not None and len(listing) == 1 and not self._at_least:
            return [], Live([], "", {})
        live = live_segments(store, listing, covered=txid)
        segments = plan_from(live.segments, txid)
        reached = segments[-1].max_txid if segments else txid
        newest = max((each.max_txid for each in live.segments), default=0)
        if own is None or reached < newest or reached < self._at_least:
            live = live_segments(store, list_replica(store))
            newest = max((each.max_txid for each in live.segments), default=0)
            if newest < max(txid, self._at_least):
                raise self._was_reset(newest)
            segments = self._through_levels(live, newest)
        self._check_chain(segments, live)
        return segments, live

    def _through_levels(self, live: Live, newest: int) -> list[SegmentInfo]:
        segments = plan_from(live.segments, self.txid)
        reached = segments[-1].max_txid if segments else self.txid
        if reached < newest:
            # A snapshot may be all that is left of what comes next.
            snapshots = [each for each in live.segments if each.level == LEVEL_SNAPSHOT]
            if snapshots and snapshots[-1].max_txid > reached:
                segments = [snapshots[-1], *plan_from(live.segments, snapshots[-1].max_txid)]
                reached = segments[-1].max_txid
        if reached < newest and not self._warned:
            self._warned = True
            _log.warning(
                "follow-gap %s: TXID %s is missing in the replica; waiting for it",
                self.output,
                format_txid(reached + 1),
            )
        return segments if reached >= self._at_least else []

    def _towards(
        self, txid: int | None, timestamp_ms: int | None
    ) -> tuple[list[SegmentInfo], Live]:
        """What leads to an earlier state than the newest; nothing if the copy holds it."""
        live = live_segments(self.store, list_replica(self.store))
        segments = live.segments
        if timestamp_ms is not None:
            segments = with_metadata_times(self.store, segments)
        # Whatever else is wrong with the target, this says so and names the nearest.
        whole = plan(segments, txid=txid, before_ms=timestamp_ms)
        target = whole.max_txid
        if target < max(self.txid, self._at_least):
            raise RestoreError(
                f"{self.output} holds TXID {format_txid(max(self.txid, self._at_least))} already,"
                f" which is newer than {format_txid(target)}: restore that to another output, or"
                " replace this one with -force"
            )
        if target == self.txid and not self._at_least:
            return [], live
        eligible = [each for each in segments if each.max_txid <= target]
        found = plan_from(eligible, self.txid)
        if not found or found[-1].max_txid != target:
            found = list(whole.segments)
        self._check_chain(found, live)
        return found, live

    def _recognise(self, own: SegmentInfo) -> None:
        """Compare the segment that was applied last with the one that is listed now."""
        listed = _identity(self.store, own)
        if not self.note.segment:
            self.note = replace(self.note, segment=listed)
        elif self.note.segment != listed:
            raise self._was_reset(own.max_txid)

    def _check_chain(self, segments: Sequence[SegmentInfo], live: Live) -> None:
        """Where the next segment names its predecessor, that must be the one that was applied."""
        if not segments or segments[0].level or segments[0].min_txid != self.txid + 1:
            return
        found = live.tail.get(segments[0].key)
        previous = None if found is None else found.metadata.get(PREVIOUS_METADATA)
        if previous and self.note.sha256 and previous != self.note.sha256:
            raise self._was_reset(segments[0].max_txid)

    def _was_reset(self, newest: int) -> ContinuityError:
        txid = max(self.txid, self._at_least)
        now = f"its newest TXID is {format_txid(newest)}" if newest else "it is empty"
        return ContinuityError(
            f"the replica at {self.store.url} is not the one that {self.output} was restored from"
            f" any more: TXID {format_txid(txid)} is not there as it was, {now}. The copy was left"
            " as it is; replace it with -force, or choose another output",
            local_txid=txid,
            replica_txid=newest or None,
        )

    def _apply(self, segments: list[SegmentInfo], live: Live) -> Step:
        step = Step(self.txid)
        for batch in _batches(segments, self._at_least):
            done = self._transaction(batch, live)
            step = Step(
                done.txid,
                step.n_segments + done.n_segments,
                step.size_bytes + done.size_bytes,
                step.n_pages + done.n_pages,
                done.commit,
            )
        self._warned = False
        return step

    def _transaction(self, segments: Sequence[SegmentInfo], live: Live) -> Step:
        """Apply segments as one transaction."""
        last = segments[-1]
        compare = segments[0].level == LEVEL_SNAPSHOT and self.copy.is_main_complete()
        with self.copy.transaction() as transaction, _pool() as pool:
            self._check_alone(transaction)
            n_pages = 0
            for segment, source in fetched(pool, self.store, segments):
                decoder = Decoder(source, name=segment.key, chunk_bytes=_RANGE_BYTES)
                self._check_header(segment, decoder)
                # Of a snapshot only what differs is written; what follows it may have gone back
                # to what the file holds now.
                old = self.copy.read_page if compare and segment is segments[0] else None
                for pgno, page in decoder:
                    if old is None or not _is_same(pgno, page, old(pgno)):
                        transaction.add(pgno, page)
                        n_pages += 1
                commit = decoder.header.commit
            if not transaction.is_empty:
                transaction.prepare(commit)
                ends = (transaction.start, transaction.end)
                self._remember(replace(self.note, to=last.max_txid, ends=ends, mark=None))
                transaction.commit()
        self._end = self.copy.end()
        self._at_least = 0
        self._remember(
            _Note(
                last.max_txid,
                ends=(self._end,),
                segment="" if last.level else _identity(self.store, last),
                sha256=live.sha256(last),
            )
        )
        if self.copy.trim():
            self._end = self.copy.end()
        size_bytes = sum(segment.size_bytes for segment in segments)
        return Step(last.max_txid, len(segments), size_bytes, n_pages, commit)

    def _check_header(self, segment: SegmentInfo, decoder: Decoder) -> None:
        header = decoder.header
        if (header.min_txid, header.max_txid) != (segment.min_txid, segment.max_txid):
            raise FormatError(f"{segment.key}: it holds other TXIDs than its name says")
        if header.page_size != self.copy.page_size:
            raise ContinuityError(
                f"{segment.key} has pages of {header.page_size} bytes, {self.output} has pages of"
                f" {self.copy.page_size}: the page size was changed; restore anew with -force",
                local_txid=self.txid,
                replica_txid=segment.max_txid,
            )

    def _check_alone(self, transaction: Transaction) -> None:
        """Under the write lock: nobody has written to the copy, and nobody else follows into it."""
        # An empty log: somebody had everything copied into the file, which changes nothing.
        if transaction.start != self._end and transaction.start.n_frames:
            raise _was_changed(self.output, self.txid)
        noted = _read_note(self.output)
        if (noted.txid, noted.to) != (self.note.txid, self.note.to):
            raise ContinuityError(
                f"another process brings {self.output} up to date: end one of the two",
                local_txid=self.txid,
            )

    def _remember(self, note: _Note) -> None:
        _write_note(self.output, note)
        self.note = note


def follow(
    store: ObjectStore,
    output: str | os.PathLike[str],
    *,
    clock: Clock,
    wait: Callable[[float], bool],
    interval_s: float = 1.0,
    on_step: Callable[[Step], object] | None = None,
    overwrite: bool = False,
    parallelism: int = 8,
    integrity_check: IntegrityMode = "none",
    verify: Literal["auto", "full"] = "auto",
    progress: Progress | None = None,
) -> int:
    """Restore a database, or go on where an earlier call ended, and keep it at the newest state.

    A store that does not answer is waited for.

    Args:
        wait: waits so many seconds and says whether to end; ``threading.Event().wait`` does.
        interval_s: between two looks, seconds.
        on_step: called with each state that was reached, the first one included.
        overwrite: restore also if the output exists.

    Returns:
        The TXID that the output holds.

    Raises:
        ReplicaError: as `Follower.open` and `Follower.step`.
    """
    if interval_s <= 0:
        raise ConfigError(f"the interval must be more than 0 s, not {interval_s:g} s")
    follower, made = Follower.open(
        store,
        output,
        clock=clock,
        overwrite=overwrite,
        parallelism=parallelism,
        integrity_check=integrity_check,
        verify=verify,
        progress=progress,
    )
    with contextlib.closing(follower):
        if on_step is not None:
            on_step(_first_step(follower, made))
        n_failed = 0
        while True:
            try:
                step = follower.step()
            except StoreError as error:
                if not error.retryable:
                    raise
                n_failed += 1
                if n_failed == 1:
                    _log.warning("%s; waiting for the store", error)
            else:
                if n_failed:
                    _log.warning("the store answers again")
                n_failed = 0
                if step is not None and on_step is not None:
                    on_step(step)
            pause_s = interval_s
            if n_failed:
                pause_s = max(interval_s, min(_PAUSE_MAX_S, interval_s * 2.0 ** min(n_failed, 10)))
            if wait(pause_s):
                return follower.txid


def update(
    store: ObjectStore,
    output: str | os.PathLike[str],
    *,
    clock: Clock,
    txid: int | None = None,
    timestamp_ms: int | None = None,
    overwrite: bool = False,
    parallelism: int = 8,
    integrity_check: IntegrityMode = "none",
    verify: Literal["auto", "full"] = "auto",
    progress: Progress | None = None,
) -> Step:
    """Bring an existing copy to a later state by fetching what changed; restore a missing one.

    Args:
        txid, timestamp_ms: the state to reach, as for `replica.restore.restore`.
        integrity_check: of a copy that is made; one that is updated is not checked.
        overwrite: restore also if the output exists.

    Raises:
        ReplicaError: as `Follower.open` and `Follower.reach`.
    """
    if txid is not None and timestamp_ms is not None:
        raise ConfigError("give a TXID or a timestamp to restore to, not both")
    follower, made = Follower.open(
        store,
        output,
        clock=clock,
        overwrite=overwrite,
        txid=txid,
        timestamp_ms=timestamp_ms,
        parallelism=parallelism,
        integrity_check=integrity_check,
        verify=verify,
        progress=progress,
    )
    with contextlib.closing(follower):
        if made is not None:
            return _first_step(follower, made)
        return follower.reach(txid=txid, timestamp_ms=timestamp_ms) or Step(follower.txid)


def _first_step(follower: Follower, made: RestoreResult | None) -> Step:
    if made is None:
        return Step(follower.txid)
    return Step(follower.txid, made.n_segments, made.bytes_fetched, made.pages_written, made.commit)


def _first_note(store: ObjectStore, result: RestoreResult) -> _Note:
    """The note for a file that was restored and is about to get its name."""
    if result.source.plan is None or result.txid is None:
        raise RestoreError(
            f"{store.url} is a replica of Litestream 0.3, which can only be restored as a whole:"
            " leave out -f or -delta"
        )
    last = result.source.plan.segments[-1]
    put_into_wal_mode(result.output)
    return _Note(
        result.txid,
        mark=FileMark.of(os.stat(result.output)),
        segment="" if last.level else _identity(store, last),
        sha256=result.source.sha256,
    )


def _identity(store: ObjectStore, segment: SegmentInfo) -> str:
    """By what a segment of level 0 is known again in a listing; empty if by nothing."""
    if store.logical_times:
        return f"{segment.size_bytes} bytes of {segment.created_ms}"
    return segment.etag or ""


def _batches(segments: Sequence[SegmentInfo], at_least: int) -> Iterator[list[SegmentInfo]]:
    """Segments that are applied together; the first of these lists reaches a TXID at least."""
    batch: list[SegmentInfo] = []
    n_bytes = 0
    for segment in segments:
        too_large = n_bytes + segment.size_bytes > _BATCH_BYTES
        if batch and too_large and batch[-1].max_txid >= at_least:
            yield batch
            batch, n_bytes = [], 0
        batch.append(segment)
        n_bytes += segment.size_bytes
    yield batch


def _is_same(pgno: int, page: bytes, found: bytes) -> bool:
    if pgno == 1:
        # The journal mode is the copy's own.
        return page[:18] == found[:18] and page[20:] == found[20:]
    return page == found


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests; on an error what they still do does not matter."""
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="walship-follow")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _size_of(output: Path) -> int:
    try:
        return os.stat(output).st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise RestoreError(
            f"cannot write {output}: {error.strerror}; nothing was changed"
        ) from error


def _read_note(output: Path) -> _Note:
    path = note_path(output)
    try:
        return _Note.parse(path.read_bytes())
    except FileNotFoundError:
        raise OutputExistsError(
            f"{output} exists, and no {path.name} beside it says which TXID it holds: choose"
            " another output, or replace it with -force"
        ) from None
    except FormatError as error:
        raise RestoreError(
            f"{path} cannot be used ({error}): replace the copy with -force, or choose another"
            " output"
        ) from None
    except OSError as error:
        raise RestoreError(f"cannot read {path}: {error.strerror or error}") from error


def _write_note(output: Path, note: _Note) -> None:
    try:
        write_durably(note_path(output), note.pack(), mode=0o644)
    except OSError as error:
        raise RestoreError(
            f"cannot write {note_path(output)}: {error.strerror or error}"
        ) from error


def _check_mark(output: Path, note: _Note) -> None:
    """Refuse a file that was closed completely and looks otherwise now."""
    if note.mark is not None and FileMark.of(os.stat(output)) != note.mark:
        raise _was_changed(output, note.txid)


def _resolved(output: Path, note: _Note, end: LogEnd) -> tuple[_Note, int]:
    """Compare a copy with its note.

    Returns:
        The note, with what became of a transaction that was under way; and the TXID that the next
        one must reach because nobody knows, or 0.
    """
    is_known = note.ends or note.mark is not None  # Litestream's notes know nothing of it
    if is_known and end.n_frames and end not in note.ends:
        raise _was_changed(output, note.txid)
    if not note.to:
        return note, 0
    if end.n_frames and end in note.ends:
        if end == note.ends[-1]:
            return _Note(note.to, ends=(end,)), 0
        return replace(note, to=0, ends=(end,)), 0
    return note, note.to


def _was_changed(output: Path, txid: int) -> ContinuityError:
    return ContinuityError(
        f"another program has written to {output} since it held TXID {format_txid(txid)} of the"
        " replica: it may only be read. Restore it anew with -force, or choose another output",
        local_txid=txid,
    )
