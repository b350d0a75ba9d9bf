"""The engine of one database: puts spool, capture, store and uploader together.

Composition root of `walship.replica`.  The VFS talks to an `Engine` and to nothing below it; an
application sees it as what `walship.replication(db)` returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from .capture import Capture
from .clock import Clock
from .compaction import Levels
from .config.settings import DatabaseSettings
from .continuity import CATCHING_UP, reconcile
from .counts import CheckpointCounts, Checkpoints
from .election import InUseError
from .errors import (
    ClosedError,
    ConfigError,
    ContinuityError,
    NoBackupError,
    ReplicaError,
    StoreUnavailable,
)
from .fence import Fence
from .format.ltx import PageEncoding
from .format.types import format_txid
from .host import Host
from .levels import L0Files
from .listing import replica_head
from .marks import Mark, check_label, put_mark, remove_mark
from .merge_process import MergeProcess
from .pagemap import History, PageMap
from .peers import Message, Peers, Pipe
from .record import TailLost
from .restore import RestoreResult, restore
from .sender import RequestThreads, Sender
from .spool import Fingerprint, Spool, State, new_lineage
from .sqlite import (
    FencedError,
    NotYetReplicated,
    RefusedError,
    SpoolError,
    SqlitePort,
    require_sqlite,
)
from .store.base import ObjectStore, segment_key
from .store.local import fsync_directory, sync_data
from .store.retrying import RetryingStore
from .store.settings import LocalSettings
from .uploader import MAX_IN_FLIGHT, Uploader, error_of
from .validation import Validation
from .verify_process import Job, VerifyProcess
from .waits import countable

__all__ = ["Engine", "Status", "Work", "restore_if_missing"]

log = logging.getLogger("walship")

#: How long the last close waits for a copy of the database to end.  A longer one keeps SQLite from
#: removing the WAL, which then simply stays.
_VIEW_WAIT_S: Final = 5.0
#: Why history is not continuous where ``on-fenced: local`` lets commits be made nevertheless.
_WENT_ON_HERE: Final = "commits went on while another writer had the replica"
#: How much longer than its own ``open-timeout`` a process waits for the one that opened first.
_OPENER_S: Final = 10.0
#: How long an open that failed waits for the store to take the lease back.
_ABANDON_S: Final = 2.0
#: Where page 1 says so: file format versions for writing and reading.
_MODE_OFFSET: Final = 18
_WAL_MODE: Final = b"\2\2"
#: How long `status` waits for the word of the process that uploads; it is on the same machine.
_ASK_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How replication of one database stands; a snapshot, no request is made for it.

    Attributes:
        path: the database.
        replica: where it is shipped to; no secrets.
        state: "opening" (the replica has not answered yet), "ok", "retrying" or "stopped".
        txid: highest TXID given; 0 before the first.
        replicated_txid: highest TXID in the replica, with all before it.
        lag_s: age of the oldest commit that is not in the replica, seconds; 0.0 if all are.
        pending_bytes: bytes sealed in the spool that are not in the replica.
        wal_bytes: size of the ``-wal`` file.
        uploads: segments sent since the database was opened.
        upload_bytes: their bytes.
        last_upload_ms: when the last one arrived, ms since the epoch, or None.
        last_error: the present trouble in one line, or None.
        uploader: whether it is this process that uploads; another one may, on the same database.
        fence: "held" (this database is the replica's writer), "idle" (its lease may have run out;
            the next commit renews it), "lost" (another writer has it) or "none" (switched off, or
            the store cannot).
        last_verification: how the last verification of the replica ended: "sound", "damaged",
            "differs" or "failed" (it could not be done); None if there was none.
        verification_problem: what was wrong, and what to do; None if nothing.
        last_verified_ms: when the replica was last found sound, ms since the epoch, or None.
        last_verified_txid: the state that was found sound then, or None.
        disk_full: whether commits wait for room on the disk, to be made ready for sending.
    """

    path: str
    replica: str
    state: str
    txid: int
    replicated_txid: int
    lag_s: float
    pending_bytes: int
    wal_bytes: int
    uploads: int
    upload_bytes: int
    last_upload_ms: int | None
    last_error: str | None
    uploader: bool
    fence: str
    last_verification: str | None = None
    verification_problem: str | None = None
    last_verified_ms: int | None = None
    last_verified_txid: int | None = None
    disk_full: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong right now."""
        if self.last_verification in ("damaged", "differs"):
            return False
        return self.last_error is None and self.state in ("ok", "opening")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What this process has done for one database since it opened it; numbers only grow.

    Attributes:
        uploads: segments sent.
        upload_bytes: their bytes.
        syncs: how often it was looked for something new to ship.
        sync_errors: how often that failed.
        sync_s: seconds that it took.
        wal_bytes: bytes of the WAL that were made ready for sending.
        checkpoints: what connections of this process did to the WAL, by mode.
        damaged_merges: how often segments that were to be merged turned out to be damaged.
    """

    uploads: int
    upload_bytes: int
    syncs: int
    sync_errors: int
    sync_s: float
    wal_bytes: int
    checkpoints: tuple[Checkpoints, ...]
    damaged_merges: int


class Engine:
    """Replication of one database in this process.  Every method may be called from any thread.

    Made by the VFS when the first connection opens the database, closed with the last.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        store: ObjectStore,
        spool: Spool,
        host: Host,
    ) -> None:
        if settings.replica is None:
            raise ConfigError(f"{settings.path} has no replica")
        self.settings = settings
        self.path = str(settings.path)
        self.name = os.path.basename(self.path)
        self._host = host
        self._clock = clock = host.clock
        #: Counted by the VFS.
        self.checkpoints = CheckpointCounts(clock.monotonic)
        self._store = store
        self._spool = spool
        spool.max_bytes = settings.max_spool_bytes
        self._port = SqlitePort(self.path)
        self.capture = Capture(
            self.path,
            spool,
            self._port,
            clock,
            fetch=lambda txid, offset, length: store.get(
                segment_key(store, 0, txid, txid), offset, length
            ),
            encoding=PageEncoding(settings.page_encoding),
            max_sync_wal_bytes=settings.max_sync_wal_bytes,
        )
        local = isinstance(settings.replica.store, LocalSettings)
        in_flight = 1 if local else MAX_IN_FLIGHT
        self.fence = Fence(
            store,
            clock,
            _Memory(self.capture, store.url),
            policy=settings.fence,
            lease_s=settings.fence_lease_s,
            wait_s=settings.fence_wait_s,
            owner=host.owner(self.path),
            process=host.process(),
            is_gone=host.is_gone,
            ended=lambda: self.uploader.is_stopping(),
        )
        try:
            pipe = Pipe(spool.files, spool.directory)
        except OSError as error:
            raise SpoolError(
                f"cannot make a named pipe in {spool.directory}: {error.strerror or error} "
                "(meta-path puts the directory elsewhere)"
            ) from error
        self._peers = Peers(spool.files, spool.directory, pipe, self._handle)
        self._levels = levels = Levels(
            self.name,
            store,
            clock,
            settings.levels,
            directory=spool.directory,
            files=spool.files,
            prove=self.fence.prove,
            acked_txid=lambda: self.capture.state.acked_txid,
            full_txid=lambda: self.capture.state.full_txid,
            encoding=PageEncoding(settings.page_encoding),
            is_stopping=lambda: self.uploader.is_stopping(),
            apart=_apart(settings, host, spool.directory),
        )
        self.uploader = Uploader(
            self.name,
            self.capture,
            clock,
            locks=spool.locks,
            peers=self._peers,
            sender=Sender(self.name, self.capture, store, self.fence, clock, levels.sent),
            # Two more, so that neither a renewal of the lease nor a merge is in the way.
            requests=RequestThreads(self.name, in_flight + 2),
            fence=self.fence,
            levels=levels,
            reconcile=self._reconcile,
            is_reconciled=self._is_reconciled,
            sync_interval_s=settings.replica.sync_interval_s,
            max_in_flight=in_flight,
            give_up=self._refuse,
            refused=self._recorded_refusal,
            watch=self._watch_file,
            rng=host.rng(),
        )
        job = Job(
            store=settings.replica.store,
            url=store.url,
            database=settings.path,
            directory=spool.directory,
        )
        self.validation = Validation(
            self.name,
            spool.directory,
            store.url,
            clock,
            settings.validation_interval_s,
            may_run=lambda: self.uploader.leads and self.uploader.replicated_txid > 0,
            make=lambda: VerifyProcess(job),
        )
        self._closed = False
        self._adopt = settings.adopt
        self._was_alone = spool.alone
        self._last = True
        self._has_waited = False
        # Guards the decision whether connections or a catch-up have the database file.
        self._admission = threading.Lock()
        self._reserved = False
        #: Raised at every commit frame while it is set.
        self.refusal: RefusedError | FencedError | None = None

    @property
    def port(self) -> SqlitePort:
        """Connections of the engine's own to the database."""
        return self._port

    @property
    def clock(self) -> Clock:
        """Tells the time here."""
        return self._clock

    @classmethod
    def open(cls, settings: DatabaseSettings, host: Host | None = None) -> Engine:
        """Lock the state directory, judge the files, and start shipping in the background.

        Must run before this process opens the database.

        Raises:
            RefusedError: another process ships it elsewhere, or SQLite is too old.
            ReplicaError: the settings, the spool or the files cannot be used.
        """
        require_sqlite()
        host = host or Host()
        if settings.replica is None:
            raise ConfigError(f"{settings.path} has no replica")
        directory = settings.meta_path
        try:
            spool = Spool.open(directory, host.clock, host.files)
        except InUseError as error:
            raise RefusedError(f"{settings.path}: {error}") from error
        engine: Engine | None = None
        try:
            store = host.open_store(settings.replica.store)
            if not spool.alone and spool.state.destination not in ("", store.url):
                raise RefusedError(
                    f"{settings.path}: another process ships this database to "
                    f"{spool.state.destination}; one database has one replica"
                )
            engine = cls(settings, store, spool, host)
            if spool.alone:
                engine._begin_alone()
            spool.admit()
            engine._peers.start()
            engine.uploader.start()
            engine.validation.start()
        except BaseException:
            if engine is not None:
                engine._give_up_files()
            spool.close()
            raise
        return engine

    def _begin_alone(self) -> None:
        """No other process has the database open: judge the files as they were left."""
        self.capture.record.amend(refusal=(), admitted=False, destination=self._store.url)
        try:
            self.capture.record.prove()
        except TailLost as lost:
            self._roll_forward(lost)

    def _reconcile(self) -> None:
        is_whole = self.fence.acquire()
        state = self.capture.state
        adopt = self._adopt or state.adopt
        store = self._retrying(attempts=2)
        reconcile(
            self.capture,
            store,
            self._clock,
            adopt=adopt,
            reserve=self._reserve,
            is_whole=is_whole,
        )
        with self._admission:
            self._reserved = False
            self.capture.record.amend(admitted=True, adopt=False)
        log.info(
            "%s -> %s, at txid %s",
            self.name,
            self._store.url,
            format_txid(self.capture.state.txid),
        )

    def _is_reconciled(self) -> bool:
        """Whether the process that opened the database first has let connections in."""
        return self.capture.state.admitted

    def _reserve(self) -> bool:
        """Ask for the database file, to change it; false once connections were let in."""
        with self._admission:
            self._reserved = not self.capture.record.refresh().admitted
            return self._reserved

    def _recorded_refusal(self) -> ReplicaError | None:
        refusal = self.capture.record.refresh(wait=False).refusal
        return error_of(*refusal) if len(refusal) == 2 else None

    def _handle(self, message: Message) -> None:
        """What another process has to say; in the thread that listens."""
        op, sender, number = message.get("op"), message.get("from"), message.get("id")
        if op is None:
            self.uploader.answered(message)
            return
        if op == "status" and isinstance(sender, str):
            self._peers.answer(sender, {"id": number, "status": asdict(self._own_status())})
            return
        # Who rings has the database in WAL mode, whatever was seen of it in this process.
        self.note_wal_mode(True)
        if op == "bell":
            self.uploader.ring()
        elif op == "sync" and isinstance(sender, str):
            self.uploader.request_sync().add_done_callback(
                lambda future: self._answer(sender, number, future)
            )

    def _answer(self, sender: str, number: object, future: Future[int]) -> None:
        """Tell a process what it waits for: that everything is in the replica.

        Why this process ships nothing any more is no answer: it may only be closing, and another
        one goes on.  What holds for all of them is recorded (`_refuse`), and they read that.
        """
        if future.exception() is None:
            self._peers.answer(sender, {"id": number, "txid": future.result()})

    def _watch_file(self) -> None:
        if self._port.has_moved():
            raise RefusedError(
                f"{self.path} was deleted, renamed or replaced while it was open here, and nothing "
                "of it is shipped any more: close it in every process, then open it again"
            )
        if self._port.has_lost_locks():
            raise RefusedError(
                f"SQLite's locks on {self.path} are gone: another SQLite library (the sqlite3 "
                "module?) opened and closed the file in this process; stop that, then restart"
            )

    def _refuse(self, error: ReplicaError, everywhere: bool) -> None:
        """Let no commit pass any more: it could never be shipped."""
        if everywhere:
            with contextlib.suppress(ReplicaError):  # the others find out by themselves
                self.capture.record.amend(refusal=(type(error).__name__, str(error)))
        if self._goes_on_here(error):
            log.warning("%s: commits go on here, and are not shipped any more", self.name)
            # Gates have nothing to keep for this replica.
            with contextlib.suppress(ReplicaError):
                self.capture.record.let_go(_WENT_ON_HERE)
            return
        if not isinstance(error, RefusedError | FencedError):
            error = RefusedError(f"{self.name} takes no more commits: {error}")
        self.refusal = error

    def _goes_on_here(self, error: ReplicaError) -> bool:
        """Whether commits may be made that are not shipped: another writer has the replica, or has
        gone on with it since it took it from this database."""
        if self.settings.on_fenced != "local":
            return False
        went_on = self.capture.full_copy_reason == _WENT_ON_HERE
        return isinstance(error, FencedError) or (isinstance(error, ContinuityError) and went_on)

    def _retrying(self, attempts: int) -> RetryingStore:
        return RetryingStore(self._store, self._clock, self._host.rng(), attempts=attempts)

    def _roll_forward(self, lost: TailLost) -> None:
        """Bring back commits that the disk lost but spool and replica still have.

        What is sealed is sent, then the newest state is restored in the database's place; the
        files that were found are kept beside it.  Interrupted, it is done again at the next open:
        from the record on that says so until the last one the local files do not count.
        """
        state = self.capture.state
        log.error("%s: %s; rolling forward from %s", self.name, lost, self._store.url)
        if state.lineage == "" or state.replica != self._store.url:
            raise ContinuityError(
                f"{self.path}: {lost}, and its record belongs to another replica "
                f"({state.replica or 'none'}): restore it from there",
                local_txid=state.txid,
            )
        self.fence.acquire()
        self.capture.freeze_pieces()
        state = self.capture.state
        sender = Sender(self.name, self.capture, self._store, self.fence, self._clock)
        for sealed in state.segments:
            sender.send(sealed)
        made = Path(f"{self.path}.rolled-forward")
        restored = _Restored(self._spool, History(state.lineage, self._store.url))
        result = restore(
            self._retrying(attempts=5),
            made,
            clock=self._clock,
            overwrite=True,
            inspect=restored.inspect,
        )
        if result.txid is None or result.txid < state.txid:
            made.unlink()
            raise ContinuityError(
                f"{self.path}: {lost}, and {self._store.url} ends before it: nothing was changed",
                local_txid=state.txid,
                replica_txid=result.txid,
            )
        kept = state.set_aside or f"{self.name}.damaged-{self._clock.now_ms()}"
        self._spool.record(replace(state, set_aside=kept))
        self._replace_files(made, Path(self.path).with_name(kept))
        log.warning("%s: rolled forward; the damaged files are kept as %s*", self.name, kept)
        restored.record(result, self.path, self._clock)
        self.capture.record.prove()

    def _replace_files(self, new: Path, kept: Path) -> None:
        """Put a database in the place of ours, whose files are kept under another name."""
        files = self._spool.files
        try:
            for suffix in ("-shm", "-wal", ""):
                found, aside = f"{self.path}{suffix}", f"{kept}{suffix}"
                if os.path.exists(found):
                    # What is aside already was found first: then this is a later attempt's.
                    if os.path.exists(aside):
                        files.unlink(found)
                    else:
                        files.rename(found, aside)
            files.rename(new, self.path)
            files.sync_directory(new.parent)
        except OSError as error:
            raise SpoolError(
                f"cannot replace {self.path} by its state in the replica: {error}"
            ) from error

    def note_wal_mode(self, in_wal_mode: bool) -> None:
        """What page 1 says: nothing of ours opens the database before it is in WAL mode."""
        if in_wal_mode != self.capture.in_wal_mode:
            self.capture.in_wal_mode = in_wal_mode
            self.uploader.retry_now()

    # -- for the VFS --------------------------------------------------------------------------

    def before_reading(self) -> None:
        """A connection reads for the first time: it shall not find us setting up the wal-index.

        Without a busy timeout it would be told that the database is locked.
        """
        if self.capture.in_wal_mode:
            self._port.published()

    def wait_ready(self) -> None:
        """Wait, up to ``open-timeout``, for the replica's answer.

        Raises:
            ContinuityError: database and replica do not continue each other.
            FencedError: another writer has the replica, and ``on-fenced`` is not ``local``.
            StoreUnavailable: the file is half way to a newer state; it must not be used.
        """
        if self._has_waited:
            return
        limit_s = self.settings.open_timeout_s + self.settings.fence_wait_s
        try:
            answered = self.uploader.wait_reconciled(limit_s)
            if not (answered or self._was_alone or self.uploader.leads):
                # The process that came first decides when its own time is up, a little before or
                # after.
                answered = self.uploader.wait_reconciled(_OPENER_S)
        except (FencedError, ContinuityError) as error:
            if not self._goes_on_here(error):
                raise
            with self._admission:
                self._admit_unanswered()
                self._has_waited = True
            return
        with self._admission:
            if not answered:
                self._admit_unanswered()
            self._has_waited = True
        if not answered:
            is_silent = self.uploader.progress.last_error is None
            log.warning(
                "%s: %s %s; commits stay in the WAL until it does",
                self.name,
                self._store.url,
                "does not answer" if is_silent else "does not take anything yet",
            )

    def _admit_unanswered(self) -> None:
        """The replica does not answer: let connections in, if the files are not being changed."""
        state = self.capture.record.refresh()
        if self._reserved or state.resync == CATCHING_UP:
            raise StoreUnavailable(
                f"{self.path} is being brought up to date with {self._store.url}, which does not "
                "answer in time: open it again later, or set open-timeout higher"
            )
        if not state.admitted:
            if not (self._was_alone or self.uploader.leads):
                raise StoreUnavailable(
                    f"{self.path} is still being opened by another process, which waits for "
                    f"{self._store.url}: open it again later"
                )
            self.capture.record.amend(admitted=True)

    @staticmethod
    def sync_descriptor(fd: int) -> None:
        """Make what was written to a file survive a power cut; the GIL is free meanwhile."""
        sync_data(fd)

    @staticmethod
    def sync_directory_of(path: str) -> None:
        """Make the name of a file survive a power cut; the GIL is free meanwhile."""
        fsync_directory(Path(path).parent)

    def main_descriptor(self) -> int | None:
        """A descriptor on the main file to sync it through, so that the GIL is free meanwhile."""
        return self._port.descriptor()

    def gate_restart(self, header: bytes, read_main: Callable[[int, int], bytes]) -> None:
        """See `Capture.gate_restart`; what to do when the spool is full is the user's choice."""
        self._gate(lambda: self.capture.gate_restart(header, read_main))
        self.validation.resume()  # whatever looked like the last close was none

    def gate_discard(self, read_main: Callable[[int, int], bytes]) -> None:
        """See `Capture.gate_discard`."""
        self._gate(lambda: self.capture.gate_discard(read_main))

    def _gate(self, drain: Callable[[], None]) -> None:
        policy = self.settings.spool_full
        deadline = self._clock.monotonic() + self.settings.spool_full_timeout_s
        while True:
            try:
                drain()
                if self.capture.outgrows_database():
                    self.uploader.merge_soon()
                return
            except SpoolError as error:
                if policy != "resync" and self.refusal is not None:
                    raise self.refusal from error  # nothing will make room in the spool any more
                if policy == "block" and self._clock.monotonic() < deadline:
                    self._clock.sleep(0.05)
                    continue
                if policy != "resync":
                    raise
                log.error("%s: %s; the WAL is let go and a resync follows", self.name, error)
                self.capture.record.require_full_copy(f"the spool could not be written: {error}")
                return

    def before_close(self) -> None:
        """The last connection is about to checkpoint and delete the WAL: drain, and get out."""
        self.validation.pause()
        self._levels.leave_database()
        try:
            self.capture.drain()
        except ReplicaError as error:
            log.error("%s: %s", self.name, error)
        self._port.close(wait_s=_VIEW_WAIT_S)

    def after_last_close(self) -> None:
        """SQLite is done with the files: a copy that is still to be made may read them."""
        self._port.open()

    def after_open(self) -> None:
        """A connection is opening: plain connections of our own are allowed again."""
        self._port.open()
        self._levels.enter_database()
        self.validation.resume()

    def note_trouble(self, error: Exception) -> None:
        """Something failed where SQLite could not be told; the gate will meet it again."""
        log.error("%s: %s", self.name, error)

    def before_fork(self) -> None:
        """Nothing of ours may be half done, and no connection of ours open, in the child."""
        # In the order in which a capture takes them.
        self._port.pause_views(_VIEW_WAIT_S)
        self.capture.mutex.acquire()
        self._port.pause_probe()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._port.resume()
        self.capture.mutex.release()

    def after_fork_in_child(self) -> None:
        """This process replicates nothing: its copies of connections must not write."""
        self._closed = True
        self.refusal = RefusedError(
            f"{self.name} was opened before this process was forked: open databases after the fork"
        )
        self._port.close_in_child()
        self._peers.close_in_child()
        self.validation.forget()
        self._levels.forget()
        self._spool.close()  # the lock is the parent's: a record lock is not inherited

    # -- for the application ------------------------------------------------------------------

    def sync(self, timeout: float | None = None) -> int:
        """Wait until everything committed so far is in the replica.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            The TXID that holds the newest commit; 0 if nothing was ever committed.

        Raises:
            NotYetReplicated: the time ended first; what is committed is local and will be shipped.
            ReplicaError: it can never be shipped (fenced, refused).
        """
        timeout = countable(timeout)
        future = self.sync_future()
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise self.not_yet(timeout) from None

    def tend(self, *, snapshot: bool, timeout: float) -> int:
        """Merge and clean up what is due now; with everything committed so far in the replica.

        Args:
            snapshot: also make one, whatever its interval.

        Returns:
            The TXID of the newest snapshot.

        Raises:
            RefusedError: another process uploads.
            NotYetReplicated: the time ended first.
            ReplicaError: it cannot be done; the message says why.
        """
        deadline = self._clock.monotonic() + timeout
        self.sync(timeout)
        if not self.uploader.leads:
            raise RefusedError(f"{self.name}: another process uploads, and it alone can do this")
        future = self._levels.demand(snapshot=snapshot)
        self.uploader.ring()
        try:
            return future.result(max(0.0, deadline - self._clock.monotonic()))
        except TimeoutError:
            raise self.not_yet(timeout) from None

    def sync_future(self) -> Future[int]:
        """As `sync`, without blocking: what it would return or raise, but for the time-out.

        Resolved from the uploader's thread; whoever loses interest cancels it.
        """
        if self._closed:
            raise ClosedError(f"replication of {self.name} is closed")
        self._require_wal_mode()
        return self.uploader.request_sync()

    def _require_wal_mode(self) -> None:
        """Raises RefusedError where a wait would never end: only the WAL can be shipped."""
        if self.capture.in_wal_mode or not self.capture.record.has_content():
            return
        # Whoever put it into WAL mode need not have come by here.
        if self._port.read_main(_MODE_OFFSET, len(_WAL_MODE)) == _WAL_MODE:
            self.note_wal_mode(True)
            return
        raise RefusedError(
            f"{self.path} is not in WAL mode, and nothing of it is replicated: run PRAGMA "
            "journal_mode=WAL (walship.connect does)"
        )

    def not_yet(self, timeout: float | None) -> NotYetReplicated:
        """What to raise when a wait of so many seconds ended first."""
        status = self.status()
        trouble = f" ({status.last_error})" if status.last_error else ""
        return NotYetReplicated(
            f"{self.name}: not in {self._store.url} after {timeout or 0:g} s{trouble}; everything "
            "committed is safe on this disk and will be shipped",
            txid=status.txid or None,
            replicated_txid=status.replicated_txid,
        )

    def mark(self, label: str, timeout: float | None, *, replace: bool) -> Mark:
        """See `Replication.mark`."""
        check_label(label)
        txid = self.sync(timeout)
        if not txid:
            raise RefusedError(f"{self.name} is empty: there is no state to mark yet")
        mark = Mark(label, txid, self._clock.now_ms())
        put_mark(self._retrying(attempts=5), mark, replace=replace)
        return mark

    def unmark(self, label: str) -> Mark:
        """See `Replication.unmark`."""
        return remove_mark(self._retrying(attempts=5), label)

    def status(self) -> Status:
        """How replication stands; makes no request to the replica."""
        mine = self._own_status()
        if mine.uploader or mine.state == "stopped":
            return mine
        answer = self._peers.ask({"op": "status"}, _ASK_S)
        if answer is None and self._peers.leader_pid is not None:
            trouble = f"process {self._peers.leader_pid}, which uploads, does not answer"
            return replace(mine, state="retrying", last_error=trouble)
        if answer is None or not isinstance(answer.get("status"), dict):
            return mine
        try:
            return replace(Status(**answer["status"]), uploader=False)
        except TypeError:  # another version of this library
            return mine

    def _own_status(self) -> Status:
        """What this process knows by itself."""
        state = self.capture.state
        uploader = self.uploader
        progress = uploader.progress
        trouble = uploader.fatal or self.refusal
        if not self._closed:
            try:
                state = self.capture.record.refresh(wait=False)
            except SpoolError as gone:
                trouble = trouble or gone
        error = str(trouble) if trouble is not None else progress.last_error
        if self._closed or trouble is not None:
            name = "stopped"
        elif progress.last_error is not None:
            name = "retrying"
        else:
            name = "ok" if uploader.reconciled else "opening"
        verified = self.validation.last()
        return Status(
            path=self.path,
            replica=self._store.url,
            state=name,
            txid=state.txid,
            replicated_txid=uploader.replicated_txid,
            lag_s=uploader.lag_s(),
            pending_bytes=state.pending_bytes,
            wal_bytes=_size_of(self.path + "-wal"),
            uploads=progress.uploads,
            upload_bytes=progress.upload_bytes,
            last_upload_ms=progress.last_upload_ms,
            last_error=error,
            uploader=uploader.leads,
            fence=self._fence_state(),
            last_verification=None if verified is None else verified.outcome,
            verification_problem=None if verified is None else verified.problem or None,
            last_verified_ms=None if verified is None else verified.sound_ms,
            last_verified_txid=None if verified is None else verified.sound_txid,
            disk_full=progress.disk_full,
        )

    def work(self) -> Work:
        """What this process has done for the database so far."""
        progress = self.uploader.progress
        return Work(
            uploads=progress.uploads,
            upload_bytes=progress.upload_bytes,
            syncs=progress.syncs,
            sync_errors=progress.sync_errors,
            sync_s=progress.sync_s,
            wal_bytes=self.capture.sealer.wal_bytes,
            checkpoints=self.checkpoints.all(),
            damaged_merges=self._levels.n_damaged,
        )

    def l0_files(self) -> L0Files | None:
        """The replica's segments of level 0 when they were looked at last; None if not by us."""
        return self._levels.l0 if self.uploader.leads else None

    def _fence_state(self) -> str:
        if isinstance(self.uploader.fatal, FencedError):
            return "lost"
        if not self.fence.works:
            return "none"
        return "held" if self.fence.holds() else "idle"

    # -- life ---------------------------------------------------------------------------------

    def depart(self) -> bool:
        """No connection of this process is open any more.

        Returns:
            Whether no other process has the database open either: then this one still counts as
            present, and `ship` is left to do.  Else it does not any more, and must be closed before
            a connection is opened here again.
        """
        try:
            with self.capture.mutex:
                self._last = self._spool.leave()
        except SpoolError as error:  # the directory is gone: nobody else can be in it
            self.note_trouble(error)
            self._last = True
        return self._last

    def ship(self, timeout: float) -> bool:
        """Ship what is committed and give the lease up, so that the next writer need not wait.

        Args:
            timeout: seconds to wait at most.

        Returns:
            False if something stayed behind.
        """
        deadline = self._clock.monotonic() + timeout
        drained = self.drain(timeout)
        if not drained and self.capture.in_wal_mode:
            return False
        # A store that does not answer is not waited for.
        released = self.uploader.release_lease()
        with contextlib.suppress(TimeoutError, CancelledError):
            released.result(max(0.0, deadline - self._clock.monotonic()))
        return drained

    def leave(self, timeout: float) -> bool:
        """The program ends: `ship`, unless other processes have the database open and will.

        Returns:
            False if something stayed behind that nobody else will ship.
        """
        return not self.depart() or self.ship(timeout)

    def abandon(self) -> None:
        """No connection could be opened: stop, and keep no other writer waiting for the lease."""
        if self.depart():
            with contextlib.suppress(TimeoutError, CancelledError):
                self.uploader.release_lease().result(_ABANDON_S)
        self.uploader.stop()
        self.release()

    def come_back(self) -> None:
        """A connection was opened after `leave` had begun."""
        with self.capture.mutex:
            self._spool.locks.attend()

    def drain(self, timeout: float) -> bool:
        """Ship what is committed, for at most ``timeout`` seconds; False if something stayed."""
        try:
            self._require_wal_mode()
        except RefusedError as error:
            log.warning("%s", error)
            return False
        future = self.uploader.request_sync()
        try:
            future.result(timeout)
        except (TimeoutError, ReplicaError):
            future.cancel()
            return False
        return True

    def close_within(self, seconds: float) -> None:
        """The last close waits so long for uploads, in place of ``shutdown-sync-timeout``."""
        self.settings = replace(self.settings, shutdown_sync_timeout_s=seconds)

    def close(self, drained: bool) -> None:
        """Stop, and say what stays behind.  Call `leave` first.  Safe to call twice.

        What was not shipped stays in the WAL and the spool, and goes out after the next open.
        """
        if self._closed:
            return
        self._closed = True
        self.uploader.stop()
        if not drained and self.uploader.fatal is None and self.capture.in_wal_mode:
            state = self.capture.state
            sealed = f" ({state.pending_bytes} bytes of it sealed)" if state.pending_bytes else ""
            log.warning(
                "%s: closed before everything was in %s: what follows txid %s%s is on this disk, "
                "and shipped after the next open",
                self.name,
                self._store.url,
                format_txid(self.uploader.replicated_txid),
                sealed,
            )
        self.release()

    def release(self) -> None:
        """Give up files, connections and the lock at once, shipping nothing."""
        self._closed = True
        self.validation.stop()
        self._levels.stop()
        self._port.remove_empty_wal()
        self._give_up_files()

    def _give_up_files(self) -> None:
        self._port.release()
        self._peers.close()
        self.capture.close()
        with self.capture.mutex:
            self._spool.close()
        self._store.close()


def _apart(settings: DatabaseSettings, host: Host, directory: Path) -> MergeProcess | None:
    if host.slots is None or settings.replica is None:
        return None
    return MergeProcess(
        settings.replica.store,
        host.slots,
        host.requests,
        database=settings.path,
        directory=directory,
    )


class _Memory:
    """What the fence has to remember, in the journal."""

    def __init__(self, capture: Capture, url: str) -> None:
        self._capture = capture
        self._url = url

    def nonces(self) -> tuple[str, ...]:
        return self._capture.state.nonces

    def keep_nonces(self, nonces: tuple[str, ...]) -> None:
        self._capture.record.amend(durable=True, nonces=nonces)

    def is_tested(self) -> bool:
        return self._capture.state.fence_tested == self._url

    def keep_tested(self) -> None:
        self._capture.record.amend(fence_tested=self._url)


def restore_if_missing(settings: DatabaseSettings, host: Host | None = None) -> bool:
    """Restore the database if its file is missing or empty and the replica has data.

    Afterwards its position is known, so replication goes on incrementally.

    Returns:
        Whether something was restored.

    Raises:
        StoreError: the replica could not be asked; starting with an empty database would fork it.
        RestoreError: the restore failed; no file appeared.
    """
    host = host or Host()
    clock = host.clock
    path = Path(settings.path)
    if settings.replica is None or _size_of(path) > 0:
        return False
    raw = host.open_store(settings.replica.store)
    store = RetryingStore(raw, clock, host.rng(), attempts=3)
    directory = settings.meta_path
    try:
        spool = Spool.open(directory, clock, host.files)
    except InUseError:
        return False  # it is being closed in another thread
    try:
        if not spool.alone or _size_of(path) > 0:
            return False  # the process that has it has seen to it
        if replica_head(store) is None and not _has_old_layout(store):
            return False
        restored = _Restored(spool, History(new_lineage(), raw.url))
        result = restore(store, path, clock=clock, overwrite=True, inspect=restored.inspect)
        log.info(
            "%s: restored from %s, txid %s", path.name, store.url, format_txid(result.txid or 0)
        )
        restored.record(result, str(path), clock)
        return True
    except NoBackupError:
        return False
    finally:
        spool.close()
        raw.close()


def _has_old_layout(store: ObjectStore) -> bool:
    return next(iter(store.list("generations/")), None) is not None


class _Restored:
    """Notes what is known of a database that is being restored: its state is the replica's.

    Args:
        history: the one that its record will go on with.
    """

    def __init__(self, spool: Spool, history: History) -> None:
        self._spool = spool
        self._history = history
        self._mtime_ns = 0

    def inspect(self, result: RestoreResult) -> None:
        """Make the page map while nobody can know the file: a moment later somebody may write."""
        self._mtime_ns = self._spool.files.stat(result.output).st_mtime_ns
        if result.txid is not None:
            PageMap(self._spool.directory, self._spool.files).describe(
                result.output, self._history, txid=result.txid, page_size=result.page_size
            )

    def record(self, result: RestoreResult, path: str, clock: Clock) -> None:
        """Record that the database at ``path`` is at that TXID, with no WAL."""
        if result.txid is None:
            return
        clock.sleep(0.02)  # a younger file could change again without a visible sign
        fingerprint = Fingerprint.of(path, self._spool.files)
        before = self._spool.state
        written = fingerprint.mtime_ns != self._mtime_ns
        self._spool.record(
            State(
                lineage=self._history.lineage,
                replica=self._history.replica,
                nonces=before.nonces,
                fence_tested=before.fence_tested,
                destination=before.destination,
                admitted=before.admitted,
                adopt=before.adopt,
                txid=result.txid,
                sha256=result.source.sha256,
                acked_txid=result.txid,
                restored_txid=result.txid,
                commit=result.commit,
                page_size=result.page_size,
                resync="somebody wrote to the database as soon as it was restored"
                if written
                else "",
                wal_gone=not written,
                fingerprint=None if written else fingerprint,
            ),
            drop_pieces=True,
            drop_segments=True,
        )


def _size_of(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
