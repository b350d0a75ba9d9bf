"""Proves that what a replica holds can be restored, and is the database.

`verify` restores to a scratch file, has SQLite check it, and compares it page by page with the live
database as it was at the same TXID (`replica.live`), if that is on this machine.  Not a page is
expected to differ: a replica holds pages as they are in the database's file and WAL, page 1 with
its change counter and its WAL mark (bytes 18 and 19) included.  The lock page of databases beyond
1 GiB is no page of the database; SQLite never reads it, and it is left out.

Memory is bounded: eight bytes for each page of the live database go to a file without a name, a
megabyte at a time is held.  The scratch file is as large as the database, and is removed by whoever
verifies next where this process was killed.

The outcome is kept in the state directory (`remember`), for `status` and for the schedule.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, Literal

from .check import integrity_check
from .clock import Clock
from .errors import FormatError, GapError, NoBackupError, ObjectNotFound, RestoreError
from .format.types import format_txid, lock_pgno
from .live import Live, NotComparable, at_txid, replicated_txid, wait_replicated
from .pagemap import hash_pages, page_hash
from .restore import Progress, RestoreResult, restore
from .store.base import ObjectStore

__all__ = [
    "LastVerified",
    "Outcome",
    "Verification",
    "in_words",
    "last_verified",
    "remember",
    "verify",
]

#: What a verification found; "failed": nothing, for it could not be done.
Outcome = Literal["sound", "differs", "damaged", "failed"]

_NAME: Final = "verified"
#: Pages that differ are counted, and so many of them named.
_NAMED_MAX: Final = 10
#: Content held at once.
_CHUNK_BYTES: Final = 1024 * 1024
_HASH_SIZE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a verification found.

    Attributes:
        outcome: "sound"; "damaged": the replica cannot be restored, or SQLite finds fault with what
            comes out; "differs": it can, and is not the database; "failed": it could not be done.
        replica: which one; no secrets.
        txid: the state that was verified; None in a replica of Litestream 0.3, and where there was
            none.
        compared: whether all pages were compared with those of the live database.
        not_compared: why they were not; empty if they were, or if no database was given.
        problem: what is wrong, and what to do, in one line; empty if sound.
        findings: SQLite's words about the restored database.
        n_differing: pages that differ from the live database.
        differing: numbers of the first of them.
        page_size: bytes; 0 if unknown.
        commit: size of the restored database in pages; 0 if unknown.
        bytes_fetched: bytes read from the store.
        time_ms: when it ended, ms since the epoch.
        duration_s: seconds it took.
    """

    outcome: Outcome
    replica: str
    txid: int | None = None
    compared: bool = False
    not_compared: str = ""
    problem: str = ""
    findings: tuple[str, ...] = ()
    n_differing: int = 0
    differing: tuple[int, ...] = ()
    page_size: int = 0
    commit: int = 0
    bytes_fetched: int = 0
    time_ms: int = 0
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it was found sound."""
        return self.outcome == "sound"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastVerified:
    """How the last verification of a database's replica ended.

    Attributes:
        time_ms: when, ms since the epoch.
        outcome: and how.
        replica: of which replica.
        txid: of which state; None if it came to none.
        problem: what was wrong; empty if nothing.
        sound_ms: when the replica was found sound last; None: never.
        sound_txid: which state that was.
    """

    time_ms: int
    outcome: Outcome
    replica: str
    txid: int | None = None
    problem: str = ""
    sound_ms: int | None = None
    sound_txid: int | None = None


@dataclass(slots=True)
class _Live:
    """Hashes of the pages of the live database, in a file."""

    txid: int
    page_size: int
    commit: int
    hashes: BinaryIO


def verify(
    store: ObjectStore,
    clock: Clock,
    scratch: Path,
    *,
    database: Path | None = None,
    directory: Path | None = None,
    parallelism: int = 8,
    progress: Progress | None = None,
    be_gentle: Callable[[], object] = lambda: None,
) -> Verification:
    """Restore a replica's newest state for trial, check it, and compare it with the database.

    Args:
        store: the replica; should retry by itself.
        scratch: name of the scratch file; only one verification may use it at a time.
        database: the live database, where there is one; no connection of this process may be open
            on it.
        directory: its state directory.
        parallelism: requests under way at once, at least 1.
        be_gentle: called when what is left to do holds nobody up and may take its time.

    Raises:
        NoBackupError: there is no replica.
        StoreError: it could not be read.
        RestoreError: the scratch file could not be written.
    """
    started = clock.monotonic()
    trial = _Trial(store, clock, scratch, parallelism, progress)
    with _explained(scratch.parent), tempfile.TemporaryFile(dir=scratch.parent) as hashes:
        live: _Live | None = None
        reason = ""
        if database is not None and directory is not None and database.exists():
            try:
                with at_txid(database, directory, store.url, clock) as view:
                    live = _hash_live(view, hashes)
                wait_replicated(directory, live.txid, clock)
            except NotComparable as error:
                live, reason = None, str(error)
        be_gentle()
        acked_txid = 0 if directory is None else replicated_txid(directory, store.url)
        found = trial.run(live, reason, acked_txid)
    return replace(found, time_ms=clock.now_ms(), duration_s=clock.monotonic() - started)


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RestoreError(
            f"cannot write a scratch file in {directory}: {error.strerror or error} (-scratch DIR "
            "puts it elsewhere)"
        ) from error


def _hash_live(view: Live, hashes: BinaryIO) -> _Live:
    """Write the hash of each page to a file; that of the lock page is 0."""
    locked = lock_pgno(view.page_size)
    expected = 1
    for pgno, run in view.page_runs():
        if expected == locked:  # left out in runs
            hashes.write(bytes(_HASH_SIZE))
        hashes.write(array("Q", [page_hash(page) for page in run]).tobytes())
        expected = pgno + len(run)
    return _Live(view.txid, view.page_size, view.commit, hashes)


class _Trial:
    """One restore to a scratch file, which is inspected and removed."""

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock,
        scratch: Path,
        parallelism: int,
        progress: Progress | None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._scratch = scratch
        self._parallelism = parallelism
        self._progress = progress

    def run(self, live: _Live | None, reason: str, acked_txid: int) -> Verification:
        """Restore and inspect.

        Args:
            live: what must come out, if that is known.
            reason: why it is not.
            acked_txid: what the replica has had from this machine; 0 for nothing.
        """
        found: list[Verification] = []

        def inspect(result: RestoreResult) -> None:
            found.append(self._inspect(result, live, reason, acked_txid))

        txid = None if live is None else live.txid
        try:
            restore(
                self._store,
                self._scratch,
                clock=self._clock,
                txid=txid,
                parallelism=self._parallelism,
                progress=self._progress,
                overwrite=True,
                inspect=inspect,
                keep=False,
            )
        except (FormatError, GapError) as error:
            return self._damaged(txid, reason, f"{error}; {_RENEW}")
        except NoBackupError as error:
            if live is not None:  # compacted, or gone
                return self.run(None, f"{error}", acked_txid)
            if not acked_txid:
                raise
            return self._damaged(txid, reason, f"what was shipped is gone: {error}; {_RENEW}")
        except RestoreError as error:
            if not isinstance(error.__cause__, ObjectNotFound):
                raise
            return self._damaged(txid, reason, str(error))
        return found[0]

    def _damaged(self, txid: int | None, reason: str, problem: str) -> Verification:
        return Verification(
            outcome="damaged",
            replica=self._store.url,
            txid=txid,
            not_compared=reason or "there is nothing to compare it with",
            problem=problem,
        )

    def _inspect(
        self, result: RestoreResult, live: _Live | None, reason: str, acked_txid: int
    ) -> Verification:
        n_differing, differing = 0, list[int]()
        if live is not None:
            n_differing, differing = _compare(result, live)
        findings = tuple(integrity_check(result.output, "full"))
        if not result.output.exists():
            raise RestoreError(f"the scratch file {result.output} was removed; verify again")
        outcome: Outcome = "sound"
        problem = ""
        state = "it" if result.txid is None else f"TXID {format_txid(result.txid)}"
        if live is not None and n_differing:
            outcome = "differs"
            named = ", ".join(map(str, differing[:_NAMED_MAX]))
            more = ", ..." if n_differing > len(differing) else ""
            problem = (
                f"{n_differing} of {max(live.commit, result.commit)} pages of {state} are not "
                f"those of the database (page {named}{more}); {_RENEW}"
            )
        elif live is None and result.txid is not None and result.txid < acked_txid:
            outcome = "damaged"
            problem = (
                f"it ends at TXID {format_txid(result.txid)}, and had {format_txid(acked_txid)} "
                f"before; {_RENEW}"
            )
        elif findings:
            outcome = "damaged"
            problem = f"{state} fails SQLite's integrity check: {findings[0]}"
            if live is not None:
                problem += (
                    "; the database itself has the same pages: it is damaged, not the replica"
                )
            else:
                problem += "; look for an earlier state that passes (restore -integrity-check full)"
        return Verification(
            outcome=outcome,
            replica=self._store.url,
            txid=result.txid,
            compared=live is not None,
            not_compared=reason,
            problem=problem,
            findings=findings,
            n_differing=n_differing,
            differing=tuple(differing),
            page_size=result.page_size,
            commit=result.commit,
            bytes_fetched=result.bytes_fetched,
        )


#: What to do where the replica is not what it should be.
_RENEW: Final = (
    "ship the database anew: close it everywhere, `walship reset DB`, and open it again (`walship "
    "timeline` shows what the replica can still give back)"
)


def _compare(result: RestoreResult, live: _Live) -> tuple[int, list[int]]:
    """How many pages differ, and the numbers of the first of them."""
    page_size = live.page_size
    if result.page_size != page_size:
        return max(live.commit, result.commit), [1]
    first_beyond = min(live.commit, result.commit) + 1
    beyond = abs(live.commit - result.commit)
    n_differing, differing = 0, list[int]()
    locked = lock_pgno(page_size)
    step = _CHUNK_BYTES // page_size
    live.hashes.seek(0)
    with open(result.output, "rb") as file:
        for pgno in range(1, first_beyond, step):
            count = min(step, first_beyond - pgno)
            expected = array("Q", live.hashes.read(count * _HASH_SIZE))
            found = array("Q", hash_pages(memoryview(file.read(count * page_size)), page_size))
            if found == expected:
                continue
            for at, hashed in enumerate(expected):
                if pgno + at != locked and (at >= len(found) or found[at] != hashed):
                    n_differing += 1
                    if n_differing <= _NAMED_MAX:
                        differing.append(pgno + at)
    if beyond and n_differing < _NAMED_MAX:
        differing.append(first_beyond)
    return n_differing + beyond, differing


# --- the last outcome -----------------------------------------------------------------------------


def remember(directory: Path, found: Verification) -> LastVerified:
    """Keep an outcome in a state directory, in one step; what cannot be kept is not missed."""
    before = last_verified(directory, found.replica)
    now = LastVerified(
        time_ms=found.time_ms,
        outcome=found.outcome,
        replica=found.replica,
        txid=found.txid,
        problem=found.problem,
        sound_ms=before.sound_ms if before is not None else None,
        sound_txid=before.sound_txid if before is not None else None,
    )
    if found.ok:
        now = replace(now, sound_ms=found.time_ms, sound_txid=found.txid)
    temporary = directory / f"{_NAME}-{os.getpid()}.tmp"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(asdict(now)), encoding="utf-8")
        temporary.replace(directory / _NAME)
    return now


def last_verified(directory: Path, replica: str = "") -> LastVerified | None:
    """The outcome that a state directory tells of; None if it tells of none.

    Args:
        replica: the replica it must be about; any, if empty.
    """
    try:
        found = LastVerified(**json.loads((directory / _NAME).read_text(encoding="utf-8")))
        return found if not replica or found.replica == replica else None
    except (OSError, ValueError, TypeError):
        return None


def in_words(found: Verification) -> str:
    """A verification in one line, for people."""
    if not found.ok:
        return f"{found.replica} is {found.outcome}: {found.problem}"
    state = (
        "a replica of Litestream 0.3" if found.txid is None else f"TXID {format_txid(found.txid)}"
    )
    text = (
        f"{found.replica} is sound at {state}: {found.commit} pages pass SQLite's integrity check"
    )
    if found.compared:
        return f"{text}, and each is that of the database"
    return (
        f"{text} (not compared with the database: {found.not_compared})"
        if found.not_compared
        else text
    )
