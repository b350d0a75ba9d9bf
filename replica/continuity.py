"""Do the local database and the replica continue each other?  Asked once, before the first TXID.

The files on disk were judged first (`Capture.prove`); here the record is held against what the
replica holds:

====================================================  ============================================
the replica                                           then
====================================================  ============================================
is empty                                              start with a full copy as TXID 1
ends where our record ends                            go on
is ahead by segments whose bytes lie in our spool     they are ours: count them as sent
is ahead of what was restored here, and nobody has    catch up, and go on
opened that since
is ahead, and the database is page for page its head  take over: go on at its TXID + 1
is ahead, and a Litestream state directory beside     take over with a full copy at its TXID + 1
the database holds the very same head
is ahead otherwise, or holds something else           refuse (`adopt`: full copy at its TXID + 1)
has lost its newest objects                           full copy behind what is left
has pages of another size                             refuse: it cannot hold this database
====================================================  ============================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from .capture import Capture
from .catchup import CaughtUp, catch_up
from .clock import Clock
from .errors import (
    ContinuityError,
    FormatError,
    GapError,
    NoBackupError,
    ObjectNotFound,
    RestoreError,
)
from .format.ltx import HEADER_SIZE, Header, decode
from .format.types import format_segment_name, format_txid
from .listing import list_replica, live_segments, replica_head
from .pagemap import History
from .plan import plan
from .record import page_size_changed
from .restore import restore
from .sender import has_sha256, same_bytes
from .spool import State, new_lineage
from .store.base import ObjectStore, SegmentInfo, list_segments, segment_key

__all__ = ["CATCHING_UP", "reconcile"]

log = logging.getLogger("walship.continuity")

#: Why a file is no state of the database: it was being brought up to date.
CATCHING_UP: Final = "the database was being brought up to date with its replica"
#: Attempts at a view of the whole database beside busy writers, and the pause between them.
_VIEW_ATTEMPTS: Final = 200
_VIEW_PAUSE_S: Final = 0.01


def reconcile(
    capture: Capture,
    store: ObjectStore,
    clock: Clock,
    *,
    adopt: bool = False,
    reserve: Callable[[], bool] = lambda: False,
    is_whole: bool = True,
) -> None:
    """Bring record and replica together, or refuse.

    Afterwards the next TXID may be given.  Safe to call again after a `StoreError`.

    Args:
        adopt: in doubt, let the local database become the replica's next TXID.
        reserve: asks for the database file, to bring it up to date; false if a connection has it.
        is_whole: false if something of the replica is known to be lost; then its head is no proof
            of what lies before.

    Raises:
        ContinuityError: they do not continue each other; nothing was written.
        StoreError: the replica could not be read.
    """
    state = capture.state
    if state.lineage and state.replica == store.url:
        if _can_catch_up(capture) and reserve():
            _catch_up(capture, store, clock)
        head = _check_own_record(capture, store, is_whole)
        if head is None:
            _check_suspicion(capture, store, adopt)
            if capture.full_copy_reason is not None and capture.state.acked_txid:
                txid = capture.state.acked_txid
                _check_page_size(capture, store, segment_key(store, 0, txid, txid))
            return
    else:
        head = replica_head(store)
        if head is None:
            _start(capture, store, 0, "first copy to this replica")
            return
    _take_over(capture, store, clock, head, adopt)


def _can_catch_up(capture: Capture) -> bool:
    """Whether the file is what a restore has made of this replica, or a catch-up of it began."""
    state = capture.state
    if state.resync == CATCHING_UP:
        return True
    return (
        not state.resync
        and state.txid == state.acked_txid == state.restored_txid > 0
        and not (state.pieces or state.segments)
        and capture.record.is_untouched()
    )


def _catch_up(capture: Capture, store: ObjectStore, clock: Clock) -> None:
    """Bring a restored file to the newest state of the replica: somebody went on meanwhile."""
    before = capture.state.txid
    path = Path(capture.path)

    def begin() -> None:
        capture.record.amend(durable=True, resync=CATCHING_UP, fingerprint=None, wal_gone=True)

    caught_up: CaughtUp | None = None
    if capture.state.resync != CATCHING_UP and not _was_replaced(store, capture.state):
        try:
            caught_up = catch_up(store, path, before, begin)
        except FormatError as error:
            log.error("%s: %s", path.name, error)
        if caught_up is not None and not caught_up.n_segments:
            return
    if caught_up is None:
        log.warning("%s: not brought up to date; restoring all of it", path.name)
        result = restore(store, path, clock=clock, overwrite=True)
        caught_up = CaughtUp(
            result.txid or 0,
            result.source.sha256,
            result.page_size,
            result.commit,
            result.n_segments,
        )
    log.info(
        "%s: caught up with the replica from txid %s to %s",
        path.name,
        format_txid(before),
        format_txid(caught_up.txid),
    )
    capture.record.restored(caught_up.txid, caught_up.sha256, caught_up.page_size, caught_up.commit)


def _was_replaced(store: ObjectStore, state: State) -> bool:
    """Whether the newest segment that was restored is another one now: Litestream does not ask
    before it puts one in its place."""
    if not state.sha256:
        return False
    try:
        info = store.head(segment_key(store, 0, state.txid, state.txid))
    except ObjectNotFound:
        return False  # compacted
    return not has_sha256(store, info, state.sha256)


def _check_own_record(capture: Capture, store: ObjectStore, is_whole: bool) -> SegmentInfo | None:
    """None if the replica is what the record says; else its head, written by somebody else."""
    state = capture.state
    known = state.acked_txid
    listing = list_segments(store, 0, after_txid=known - 1 if known else None)
    # Some servers keep an empty object where a client died after the headers of its upload; the
    # upload that comes next under its name replaces it.
    newer = [info for info in listing if info.size_bytes]
    if known and not newer:
        left = replica_head(store)
        _replace_what_is_lost(capture, store, known, left, left.max_txid if left else 0)
        return None
    # What is there may lie behind a hole; it gives way, unless nobody can tell what it rests on.
    behind = newer[-1].max_txid if newer and store.logical_times else 0
    if known and not is_whole and not _reaches(store, known):
        _replace_what_is_lost(capture, store, known, None, behind)
        return None
    if all(info.max_txid == known for info in newer):
        if newer and known == state.txid and not _is_recorded(store, newer[0], state):
            return newer[0]
        return None
    live = live_segments(store, [info for info in list_replica(store) if info.size_bytes]).segments
    newest = max(live, key=lambda info: (info.max_txid, -info.level), default=newer[-1])
    if known and not any(info.max_txid >= known for info in live):
        _replace_what_is_lost(capture, store, known, None, behind)
        return None
    ours = {sealed.txid: sealed for sealed in state.segments}
    acked = known
    for info in live:
        if info.level or info.max_txid < known:
            continue
        if info.max_txid == known:
            if known == state.txid and not _is_recorded(store, info, state):
                return newest
            continue
        sealed = ours.get(info.max_txid)
        if sealed is None or not same_bytes(store, store.head(info.key), sealed):
            return newest
        if info.max_txid == acked + 1:
            acked = info.max_txid
    if newest.max_txid > acked and newest in live:
        return newest  # compacted by somebody who has gone on
    if acked > known:
        capture.acknowledge(acked)
    return None


def _reaches(store: ObjectStore, txid: int) -> bool:
    """Whether a restore gets as far as ``txid``."""
    try:
        return plan(live_segments(store, list_replica(store)).segments).max_txid >= txid
    except GapError as gap:
        return gap.reachable_txid >= txid
    except NoBackupError:
        return False


def _replace_what_is_lost(
    capture: Capture, store: ObjectStore, known: int, left: SegmentInfo | None, txid: int
) -> None:
    """The replica has lost what it had acknowledged: ship it all anew, behind ``txid``.

    Args:
        left: what it ends with now, if that can be restored.
    """
    log.error(
        "%s has lost txid %s and what followed; a full copy as txid %s replaces it",
        store.url,
        format_txid(known),
        format_txid(txid + 1),
    )
    if left is not None:
        _check_page_size(capture, store, left.key)
    _start(capture, store, txid, "the replica has lost objects")


def _is_recorded(store: ObjectStore, info: SegmentInfo, state: State) -> bool:
    """Whether the object under our last TXID is the one we put there."""
    if not state.sha256:
        return True  # taken over: its bytes were never ours
    return has_sha256(store, store.head(info.key), state.sha256)


def _check_suspicion(capture: Capture, store: ObjectStore, adopt: bool) -> None:
    """A WAL that vanished: was it checkpointed by another program, or were its commits lost?

    It is suspect if nobody wrote to the main file since our last record.  If then not one page of
    the newest segment is in the database, they were lost, and shipping what is left would ship the
    reversal.
    """
    if not capture.state.suspect:
        return
    state = capture.state
    if state.segments:
        body = capture.record.body(state.segments[-1])
        data = body.read_bytes() if isinstance(body, Path) else body
    elif state.acked_txid:
        name = format_segment_name(state.acked_txid, state.acked_txid)
        data = store.get(store.level_prefix(0) + name)
    else:
        return
    header, pages = decode(data)
    if adopt or any(
        capture.record.main_holds(pgno, page, header.page_size) for pgno, page in pages
    ):
        return
    raise ContinuityError(
        f"{capture.path} has lost commits that {store.url} holds (its -wal file is gone): restore "
        "it with `walship restore`, or open it with adopt=True to go on without them",
        local_txid=state.txid,
        replica_txid=state.acked_txid,
    )


def _start(capture: Capture, store: ObjectStore, txid: int, reason: str) -> None:
    """Begin a lineage of our own behind ``txid`` with a full copy."""
    capture.record.require_full_copy(reason)
    _adopt_head(capture, store, txid)


def _check_page_size(capture: Capture, store: ObjectStore, key: str) -> None:
    """Refuse a database whose pages do not fit those of the segment ``key``.

    A segment with pages of another size would be the end of the replica: nobody could restore it.
    """
    try:
        theirs = Header.unpack(store.get(key, 0, HEADER_SIZE)).page_size
    except (ObjectNotFound, FormatError):
        return
    ours = capture.record.page_size()
    if ours is not None and ours != theirs:
        raise page_size_changed(capture.path, ours, theirs)


def _adopt_head(
    capture: Capture, store: ObjectStore, txid: int, lineage: str | None = None
) -> None:
    with capture.mutex:
        capture.record.begin(
            replace(
                capture.state,
                lineage=lineage or new_lineage(),
                replica=store.url,
                txid=txid,
                sha256="",
                acked_txid=txid,
            )
        )


def _take_over(
    capture: Capture, store: ObjectStore, clock: Clock, head: SegmentInfo, adopt: bool
) -> None:
    state = capture.state
    if capture.record.has_content():
        _check_page_size(capture, store, head.key)
        if _goes_on_from_head(capture, store, clock, head):
            return
        if _litestream_has(capture.path, store, head):
            _start(capture, store, head.max_txid, "taken over from Litestream")
            return
    if adopt:
        _start(capture, store, head.max_txid, "adopted")
        return
    known = state.lineage and state.replica == store.url
    mine = f"its record ends at txid {format_txid(state.txid)}" if known else "it has no record"
    raise ContinuityError(
        f"{store.url} already ends at txid {format_txid(head.max_txid)}, which {capture.path} does "
        f"not continue ({mine}): replace it with `walship restore`, replicate it to a new path, or "
        "make it the replica's next state with `walship reset` (or adopt=True)",
        local_txid=state.txid if known else None,
        replica_txid=head.max_txid,
    )


def _goes_on_from_head(
    capture: Capture, store: ObjectStore, clock: Clock, head: SegmentInfo
) -> bool:
    """Take over if the database is, page for page, the replica's newest state.

    That is restored beside the spool, compared, and becomes the page map.
    """
    path = capture.record.scratch_path("compare")
    try:
        try:
            result = restore(store, path, clock=clock, overwrite=True)
        except (FormatError, RestoreError) as error:
            log.warning("the replica's newest state cannot be restored: %s", error)
            return False
        if result.txid != head.max_txid or not _is_same(capture, path, clock):
            return False
        log.info(
            "%s: the database is the replica's state at txid %s: going on from there",
            os.path.basename(capture.path),
            format_txid(head.max_txid),
        )
        history = History(new_lineage(), store.url)
        capture.resync.describe(path, history, head.max_txid, result.page_size)
        _adopt_head(capture, store, head.max_txid, history.lineage)
        return True
    finally:
        path.unlink(missing_ok=True)


def _is_same(capture: Capture, path: Path, clock: Clock) -> bool:
    for _ in range(_VIEW_ATTEMPTS):
        with open(path, "rb") as file:
            same = capture.resync.equals(file, os.path.getsize(path))
        if same is not None:
            return same
        clock.sleep(_VIEW_PAUSE_S)
    return False


def _litestream_has(path: str, store: ObjectStore, head: SegmentInfo) -> bool:
    """Whether Litestream's state beside the database holds the replica's newest level-0 segment."""
    if head.level != 0:
        return False
    directory, name = os.path.split(path)
    local = Path(directory, f".{name}-litestream", "ltx", "0", head.key.rpartition("/")[2])
    try:
        if local.stat().st_size != head.size_bytes:
            return False
        return _same(_chunks(local), store, head)
    except FileNotFoundError:
        return False


def _chunks(path: Path) -> Iterable[bytes]:
    with open(path, "rb") as file:
        while data := file.read(8 * 1024 * 1024):
            yield data


def _same(chunks: Iterable[bytes], store: ObjectStore, info: SegmentInfo) -> bool:
    offset = 0
    for chunk in chunks:
        if store.get(info.key, offset, len(chunk)) != chunk:
            return False
        offset += len(chunk)
    return offset == info.size_bytes
